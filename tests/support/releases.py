"""Releases that tests must know of: what an older one names otherwise, counts otherwise, or does wrong itself."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version
from inspect import getsource
from typing import Any

import pytest
from packaging.version import Version
from transformers import Trainer, TrainingArguments

FIELDS = {field.name for field in fields(TrainingArguments)}
COUNTS_FIRST_LABEL = "_loss_shifts_labels" not in getsource(Trainer)
"""Whether the trainer counts the first label of a row, which nothing predicts, among those that it divides by."""
OLDER = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning",  # its checkpoints were reentrant by default
    "ignore:Could not find a config file in:UserWarning",  # PEFT, of a model that came from nowhere
)
"""Warnings of older Transformers and PEFT that newer ones do not give."""

EARLY_PYTHON = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
"""What torch.compile says of the first release of Python 3.13."""


def older(name: str, release: str) -> bool:
    """Whether an older release of a package is installed than this."""
    return Version(version(name)) < Version(release)


resumes_in_first_epoch_alone = pytest.mark.skipif(
    older("accelerate", "1.15"), reason="accelerate shuffles the rest of a resumed epoch as the first epoch before 1.15"
)


knows_pairs = pytest.mark.skipif(older("trl", "1.16"), reason="trainers of pairs are others before TRL 1.16")


def named_here(settings: dict[str, Any]) -> dict[str, Any]:
    """Training arguments under the names that the installed release has for them."""
    found = dict(settings)
    if "activation_checkpointing" in found and "activation_checkpointing" not in FIELDS:
        found["gradient_checkpointing"] = found.pop("activation_checkpointing")
        found["gradient_checkpointing_kwargs"] = {
            "use_reentrant": False
        }  # as it is by default where it has its new name
    if found.get("train_sampling_strategy") == "group_by_length" and "train_sampling_strategy" not in FIELDS:
        del found["train_sampling_strategy"]
        found["group_by_length"] = True
    return found
