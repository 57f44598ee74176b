"""Settings that all tests share."""

import os

# Before the hub's client is imported: trainers would ask a hub for models, and tell it what they are used for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

# No deadline: machines are shared. Derandomized: a red run must be red again.
settings.register_profile("ftw_optim", deadline=None, derandomize=True)
settings.load_profile("ftw_optim")

torch.set_num_threads(1)  # the models are tiny: a second thread would only be waited for
