"""What stands around or in a model of several processes: DDP or FSDP2, whose own sums are left out; else it is refused.

FSDP2 sums gradients where they arrive at its parameters. The passes of a step end before that, at the outputs of layers
or at the whole parameters that stand in for shards, and what they give is summed by the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from ftw_optim._capture.plan import CapturePlan
from ftw_optim._capture.stand_ins import is_sharded, noting_stand_ins
from ftw_optim._capture.structure import Structure
from ftw_optim._layers.registry import LayerRule
from ftw_optim._ranks.shards import layout_of

_REFUSED = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "FSDP1",
    "deepspeed.runtime.engine.DeepSpeedEngine": "DeepSpeed",
    "deepspeed.runtime.pipe.engine.PipelineEngine": "a DeepSpeed pipeline",
    "torch.nn.parallel.data_parallel.DataParallel": "nn.DataParallel",
}


@contextmanager
def without_own_sums(plan: CapturePlan, members: Sequence[int], *, meet: Callable[[], None]) -> Iterator[None]:
    """A block in which DDP around the model, or in it, sums no gradients: the step sums the combined ones itself.

    A wrapper that is not part of the model, as where a framework wraps it later, is found when it is called.

    Args:
        plan: what is captured of which model.
        members: the processes of the selection, which must be those of the wrapper.
        meet: called before each forward pass in which the processes wait for each other's shards.

    Raises:
        NotImplementedError: something around the model cannot be right in several processes.
    """
    structure = plan.structure
    structure.once("parts", lambda: _refuse_parts(structure, members))
    _refuse_whole_layers(plan)
    held: dict[DistributedDataParallel, tuple[bool, bool]] = {}

    def hold(wrapper: DistributedDataParallel) -> None:
        if wrapper not in held:
            refuse_wrapper(wrapper, members)
            held[wrapper] = wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync
            # Nor are buffers sent: a rank whose closure fails before it runs the model would keep the others waiting.
            wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False

    def look(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            hold(module)
        elif (kind := _refused(module)) is not None:
            raise _not_in_several(kind)

    inside = [module for module in structure.modules.values() if isinstance(module, DistributedDataParallel)]
    handles = []
    try:
        for module in inside:
            hold(module)
        if not inside and not structure.sharding:
            handles.append(register_module_forward_pre_hook(look))
        for outer in structure.outermost:  # before the hook of FSDP2 that brings the shards together
            handles.append(outer.register_forward_pre_hook(lambda *_: meet(), prepend=True))
        with noting_stand_ins(structure):
            yield
    except BaseException:
        structure.forget_failed_pass()
        raise
    finally:
        structure.reshard()  # FSDP2 leaves whole parameters where no backward pass of its own has followed a forward
        for handle in handles:
            handle.remove()
        for wrapper, (sums, sends) in held.items():
            wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = sums, sends


def _refuse_parts(structure: Structure, members: Sequence[int]) -> None:
    """Refuse models that hold parts of their parameters in other ways than FSDP2 does."""
    for module in structure.modules.values():
        if (kind := _refused(module)) is not None:
            raise _not_in_several(kind)
    for name, parameter in structure.parameters.items():
        if not is_sharded(parameter):
            continue
        if not structure.sharding:
            raise _not_in_several(f"{name}, a DTensor without fully_shard")
        layout_of(name, parameter, members)


def _refuse_whole_layers(plan: CapturePlan) -> None:
    """Refuse layers that are run again for their gradients, and need all of their parameters then."""
    structure = plan.structure
    for owner in plan.owners if structure.sharding else ():
        again = owner.rule is None or (isinstance(owner.rule, LayerRule) and owner.rule.replays)
        sharded = [name for name in owner.parameters.values() if is_sharded(structure.parameters[name])]
        if again and sharded:
            raise NotImplementedError(
                f"Expected layers with a rule in a model that FSDP2 shards, but {owner.name!r} "
                f"({type(owner.module).__name__}) is run again for the gradients of {', '.join(sharded[:3])}, whose "
                "parts are elsewhere then. Freeze it, leave it out of fully_shard (ignored_params), or use "
                "DistributedDataParallel."
            )


def _refused(module: nn.Module) -> str | None:
    for one in type(module).__mro__:
        found = _REFUSED.get(f"{one.__module__}.{one.__qualname__}")
        if found is not None:
            return found
    return None


def refuse_wrapper(wrapper: DistributedDataParallel, members: Sequence[int]) -> None:
    """Refuse settings of DDP that would be without effect, or wrong.

    Raises:
        NotImplementedError: it has one of them, or other processes than ``members``.
    """
    if (own := dist.get_process_group_ranks(wrapper.process_group)) != list(members):
        raise NotImplementedError(
            f"Expected a DistributedDataParallel over the processes {list(members)} of the selection, got one over "
            f"{own}: its other processes would drift apart. Give both the same group, as process_group and ranks."
        )
    if wrapper.static_graph:
        raise NotImplementedError(
            "Expected DistributedDataParallel(static_graph=False), got True: it counts on sums of its own in every "
            "backward pass. Leave static_graph out, or give SelectiveOptimizer and the closures the module inside."
        )
    if getattr(wrapper, "_comm_hooks", None):
        raise NotImplementedError(
            "Expected a DistributedDataParallel without a communication hook, got one: the combined gradient is summed "
            "by SelectiveOptimizer, and the hook would never be called. Remove it."
        )


def _not_in_several(kind: str) -> NotImplementedError:
    return NotImplementedError(
        f"Expected DistributedDataParallel, fully_shard (FSDP2) or a plain module in a run of several processes, got "
        f"{kind}: a selection over all of its processes is not supported."
    )
