"""The optimizer in whose metric gradients are compared: an AdamW with a state, which does not step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import Trainer

from ftw_optim._preconditioners.maps import Preconditioner
from ftw_optim._step.losses import token_losses
from ftw_optim._step.preconditioner_of import preconditioner_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FixedMetric:
    """The ``P`` of an AdamW's coming step, the same for every record and target.

    Attributes:
        optimizer: the AdamW.
        parameters: what it trains, by name.
        reference: the gradient that the coming step is expected to see, by name: the mean of some records of the pool.
    """

    optimizer: torch.optim.AdamW
    parameters: Mapping[str, nn.Parameter]
    reference: Mapping[str, Tensor]

    def maps(self) -> dict[str, Preconditioner]:
        """``P`` of every parameter, by name."""
        flat = [gradient.flatten() for gradient in self.reference.values()]
        size = torch.cat([part.square().mean()[None] * part.numel() for part in flat]).sum()
        usual = (size / sum(part.numel() for part in flat)).sqrt()
        # A parameter whose records have no gradient is expected to see one of the usual size, as in a sketched step.
        expected = {name: torch.where(one.any(), one, usual) for name, one in self.reference.items()}
        return {
            name: preconditioner_of(self.optimizer, parameter, expected[name])
            for name, parameter in self.parameters.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The metric as tensors and plain values."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {
            "order": [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups],
            "optimizer": self.optimizer.state_dict(),
            "reference": dict(self.reference),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> FixedMetric:
        """The metric that :meth:`state_dict` described."""
        optimizer = _adamw(parameters, state["order"])
        optimizer.load_state_dict(state["optimizer"])
        reference = {name: one.to(parameters[name].device) for name, one in state["reference"].items()}
        return cls(optimizer=optimizer, parameters=parameters, reference=reference)


def warmed_up(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    learning_rate: float,
    given: Path | None = None,
    tick: Callable[[], object] = lambda: None,
) -> FixedMetric:
    """The metric of an AdamW that has seen some batches, and moved nothing.

    Without a given state, AdamW makes one step on each batch's mean gradient at a learning rate of zero: its moments
    and its count fill, as they would in training, and no parameter changes. With one, the moments are the given ones,
    and the batches only tell what gradient the coming step is expected to see.

    Args:
        model: the model, in evaluation mode.
        parameters: what is trained, by name.
        batches: batches of records.
        learning_rate: of the coming step, where no state is given.
        given: a file with an AdamW's ``state_dict()``, or a directory with ``optimizer.pt``, as a Trainer's checkpoint.
        tick: called after each batch.

    Raises:
        ValueError: the gradient of a batch is not finite, or the given state is not that of these parameters.
        FileNotFoundError: there is no such file.
    """
    optimizer = _adamw(parameters, [list(parameters)]) if given is None else given_state(model, parameters, given)
    for group in optimizer.param_groups if given is None else []:
        group["lr"] = 0.0
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for number, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(token_losses(model, batch).mean())
        for name, parameter in parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not bool(parameter.grad.isfinite().all()):
                raise ValueError(
                    f"Expected finite gradients of the records that tell the metric, but that of {name} is not, in "
                    f"batch {number} of {len(batches)}. Leave such records out, or take another --seed."
                )
            sums[name] += parameter.grad / len(batches)
        if given is None:
            optimizer.step()
        tick()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups if given is None else []:
        group["lr"] = learning_rate
    return FixedMetric(optimizer=optimizer, parameters=parameters, reference=sums)


def state_file(path: Path) -> Path:
    """The file of an AdamW's state: itself, or ``optimizer.pt`` in a directory, as a Trainer's checkpoint has it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = path / "optimizer.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"Expected the state of an AdamW, but there is no file {path}.")
    return path


def given_state(model: nn.Module, parameters: Mapping[str, nn.Parameter], path: Path) -> torch.optim.AdamW:
    """An AdamW with the state of a file.

    Which state is whose is told by the names in the file; without names, by the order of the model's parameters, or of
    those with decay before those without, as a Trainer groups them. All shapes must agree.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no AdamW's state, or one of other parameters.
    """
    path = state_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not {"state", "param_groups"} <= found.keys():
        raise ValueError(f"Expected what AdamW.state_dict() returned in {path}, got {_keys(found)}.")
    groups, states = found["param_groups"], found["state"]
    for state in states.values():
        if not {*MOMENTS, "step"} <= state.keys():
            raise ValueError(
                f"Expected the state of an AdamW ({', '.join(MOMENTS)}, step) in {path}, got {_keys(state)}. Other "
                "optimizers are not read: leave --optimizer-state, and the moments are those of some records."
            )
    if not states:
        raise ValueError(f"Expected an AdamW that has stepped in {path}, but its state is empty.")
    counts = [len(group["params"]) for group in groups]
    orders = list(_orders(model, parameters, groups))
    for order in orders:
        if len(order) != sum(counts) or set(order) != parameters.keys():
            continue
        numbers = [number for group in groups for number in group["params"]]
        pairs = [(states.get(number), parameters[name]) for number, name in zip(numbers, order, strict=True)]
        if all(state is None or state["exp_avg"].shape == parameter.shape for state, parameter in pairs):
            rest = iter(order)
            optimizer = _adamw(parameters, [[next(rest) for _ in range(count)] for count in counts])
            optimizer.load_state_dict({"state": states, "param_groups": groups})
            return optimizer
    raise ValueError(
        f"Expected the state of the {len(parameters)} parameters that are trained here, but {path} holds that of "
        f"{sum(counts)}, in groups of {', '.join(map(str, counts))}, and in no known order do their shapes agree. Name "
        "the model, adapter or --last-blocks that this optimizer trained."
    )


def _orders(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], groups: Sequence[Mapping[str, Any]]
) -> Iterator[list[str]]:
    """The names of the parameters in the orders that a file may have them in."""
    if all("param_names" in group for group in groups):
        yield [name.removeprefix("module.") for group in groups for name in group["param_names"]]
    if sum(1 for group in groups if group["params"]) > 1:
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it reads no trainer
        yield sorted(parameters, key=lambda name: name not in decayed)
    yield list(parameters)


def _adamw(parameters: Mapping[str, nn.Parameter], order: Sequence[Sequence[str]]) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": [parameters[name] for name in names]} for names in order])


def _keys(found: Any) -> str:
    return ", ".join(map(str, list(found)[:8])) if isinstance(found, Mapping) else type(found).__name__
