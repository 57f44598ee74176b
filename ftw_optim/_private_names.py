"""Private names of PyTorch and of the frameworks that this package reads, with the releases they were checked in.

Imports PyTorch alone: a class is looked up among the modules that are imported already. Who reads a private name adds
it here; a test compares this list with the code. PyTorch's are checked when this module is imported, first of all of
the package; an integration calls :func:`check_private_names` for its framework when it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import unwrap
from types import FunctionType, ModuleType
from typing import Any, final

import torch  # noqa: F401  (what is checked must have been imported)


@final
@dataclass(frozen=True, kw_only=True)
class PrivateNames:
    """The private names of one package.

    Attributes:
        package: the name it is installed by.
        oldest: the oldest release in which the names were checked by the tests.
        newest: the newest one.
        names: those that must be there, by the dotted name of their class or module.
        sought: those that may be missing: the code asks first, and older or newer releases have none.
    """

    package: str
    oldest: str
    newest: str
    names: Mapping[str, tuple[str, ...]]
    sought: tuple[str, ...] = ()


TORCH = PrivateNames(
    package="torch",
    oldest="2.8.0",
    newest="2.14.1",
    names={
        "torch._C._autograd": ("_profiler_enabled", "_top_saved_tensors_default_hooks"),
        "torch._C._functions": ("AccumulateGrad",),
        "torch._C._functions.AccumulateGrad": ("_input_metadata", "_sequence_nr"),
        "torch._C._functions.MulBackward0": ("_saved_other",),
        "torch._C._functions.SelectBackward0": ("_saved_dim",),
        "torch._C._functions.ViewBackward0": ("_saved_self_sym_sizes",),
        "torch.Tensor": ("_backward_hooks", "_base", "_post_accumulate_grad_hooks", "_version"),
        "torch.autograd": ("_get_sequence_nr",),
        "torch.nn.Module": ("_compiled_call_impl", "_forward_pre_hooks", "_modules", "_parameters"),
        "torch.nn.modules.conv._ConvNd": ("_reversed_padding_repeated_twice",),
        "torch.nn.modules.instancenorm._InstanceNorm": ("_get_no_batch_dim",),
        "torch.nn.parallel.DistributedDataParallel": ("_comm_hooks",),
        "torch.optim.Optimizer": (
            "_optimizer_load_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_state_dict_post_hooks",
            "_optimizer_state_dict_pre_hooks",
            "_optimizer_step_post_hooks",
            "_optimizer_step_pre_hooks",
            "_patch_step_function",
            "_warned_capturable_if_run_uncaptured",
        ),
        "torch.utils._pytree": ("tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"),
    },
    sought=(
        "_dynamo",  # once something has been compiled; importing it takes a second
        "_get_backend",  # of a process group, which not every build has; so is the next
        "_timeout",
        "_orig_mod",  # of a compiled module
    ),
)
TRANSFORMERS = PrivateNames(
    package="transformers",
    oldest="4.56.2",
    newest="5.24.0",
    names={
        "transformers.Trainer": (
            "_get_collator_with_removed_columns",
            "_get_train_sampler",
            "_load_optimizer_and_scheduler",
            "_prepare_inputs",
            "_remove_unused_columns",
            "_save_optimizer_and_scheduler",
            "_set_signature_columns_if_needed",
            "_signature_columns",
            "_train_batch_size",
        ),
    },
    sought=("_loss_shifts_labels",),  # of newer releases; see integrations/_trainers/releases.py
)
TRL = PrivateNames(
    package="trl",
    oldest="0.24.0",
    newest="1.16.0",
    names={"trl.trainer.sft_trainer.SFTTrainer": ("_metrics", "_prepare_dataset", "_total_train_tokens")},
    sought=("_is_vision_dataset", "_precompute_ref_logps"),  # the second of the releases whose pairs are known
)
LIGHTNING = PrivateNames(
    package="lightning",
    oldest="2.5.6",
    newest="2.6.6",
    names={
        "lightning.pytorch.LightningModule": ("_on_before_batch_transfer",),
        "lightning.pytorch.loops.fit_loop._FitLoop": ("_skip_backward",),
    },
)
ACCELERATE = PrivateNames(
    package="accelerate",
    oldest="1.10.1",
    newest="1.15.0",
    names={},
    sought=("_hf_hook", "_old_forward"),  # of modules that it has put hooks around
)
PEFT = PrivateNames(
    package="peft",
    oldest="0.17.1",
    newest="0.21.2",
    names={},
    sought=("_peft_gradient_checkpointing_forward_hooks",),  # of releases with an activated LoRA
)
DATASETS = PrivateNames(
    package="datasets",
    oldest="4.0.0",
    newest="5.2.0",
    names={"datasets.IterableDataset": ("_ex_iterable",)},
)
ALL = (TORCH, TRANSFORMERS, TRL, LIGHTNING, ACCELERATE, PEFT, DATASETS)


def check_private_names(of: PrivateNames) -> None:
    """Check that a package, which is imported, has the private names that are read of it; some microseconds each.

    Raises:
        ImportError: some are missing; the message names them, the release, and those that were checked.
    """
    missing = list(_missing(of.names))
    if missing:
        try:
            installed = version(of.package)
        except PackageNotFoundError:
            installed = "of an unknown release"
        raise ImportError(
            f"Expected {of.package} with the private names {', '.join(missing)}, which ftw_optim reads, but "
            f"{of.package} {installed} has none of that name: they have moved. They were checked in {of.package} "
            f"{of.oldest} to {of.newest}; install one of these releases, or a newer ftw_optim."
        )


def _missing(names: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for place, wanted in names.items():
        owner = _found(place)
        if owner is None:
            yield place
        else:
            yield from (f"{place}.{name}" for name in wanted if not _has(owner, name))


def _found(place: str) -> Any:
    """The class or module of a dotted name; None where it is not there."""
    first, *path = place.split(".")
    found: Any = sys.modules.get(first)
    for name in path:
        found = getattr(found, name, None)
    return found


def _has(owner: Any, name: str) -> bool:
    """Whether a module or class has an attribute, or its methods give it to their instances."""
    if hasattr(owner, name):
        return True
    if isinstance(owner, ModuleType):
        return False
    for kind in owner.__mro__:
        for method in vars(kind).values():
            function = unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType):
                code = function.__code__
                if name in code.co_names or name in code.co_consts:
                    return True
    return False


check_private_names(TORCH)
