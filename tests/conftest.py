"""What holds for all unit tests: no example of hypothesis has a time limit of its own."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
