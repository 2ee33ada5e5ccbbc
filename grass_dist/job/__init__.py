"""The processes of a job: how they find, watch and lose each other, and how they end."""
