"""Holds what the processes of a job need to find, watch and lose each other, and to end."""
