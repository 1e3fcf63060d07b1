"""Property tests here are about values, not about the speed of a shared machine."""

from hypothesis import settings

settings.register_profile("values", deadline=None)
settings.load_profile("values")
