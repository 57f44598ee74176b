"""Settings that all tests share."""

from hypothesis import settings

# No deadline: machines are shared. Derandomized: a red run must be red again.
settings.register_profile("ftw_optim", deadline=None, derandomize=True)
settings.load_profile("ftw_optim")
