"""Settings and fixtures that all tests share."""

import os
from collections.abc import Iterator

# Before the hub's client is imported: trainers would ask a hub for models, and tell it what they are used for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before numpy, scipy and torch are: two workers have two cores, and the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from ftw_optim._layers.registry import rules_apart

pytest.register_assert_rewrite("tests.support")

# No deadline: machines are shared. Derandomized: a red run must be red again.
settings.register_profile("ftw_optim", deadline=None, derandomize=True)
settings.load_profile("ftw_optim")

torch.set_num_threads(1)  # the models are tiny: a second thread would only be waited for


@pytest.fixture
def restored_rules() -> Iterator[None]:
    """Layer rules that a test registers are forgotten after it."""
    with rules_apart():
        yield
