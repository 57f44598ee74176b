"""Adam and Lion with a low-bit state, which is dequantised: bitsandbytes and torchao."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from ftw_optim._preconditioners.maps import Diagonal
from ftw_optim._preconditioners.registry import register_preconditioner
from ftw_optim._preconditioners.rules.adam import adam
from ftw_optim._preconditioners.rules.signs import NOTE, frozen_sign

State = dict[str, Any]


def torchao_adam(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """Adam's map; the state is in tensor subclasses that hold 4 or 8 bits."""
    return adam(param, {**group, "decoupled_weight_decay": group["is_adamw"]}, state, reference)


def bitsandbytes_adam(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """Adam's map; the state is quantised in blocks, or float32 under other names. Decay is always decoupled."""
    _refuse_tricks(group)
    names = {"step": state["step"], "exp_avg_sq": _dequantised(state, 2)} if "state2" in state else {}
    return adam(param, {**group, "decoupled_weight_decay": True}, names, reference)


def bitsandbytes_lion(param: Tensor, group: State, state: State, reference: Tensor | None) -> Diagonal:
    """Lion's map; the state is quantised in blocks, or float32 under other names. Decay is always decoupled."""
    _refuse_tricks(group)
    group = {**group, "decoupled_weight_decay": True}
    return frozen_sign(param, group, _dequantised(state, 1) if "state1" in state else None, reference)


for _name in ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW"):
    register_preconditioner(f"torchao.optim.adam.{_name}", attributes=("is_adamw",))(torchao_adam)
for _module, _prefixes in (("adam", ("Adam", "PagedAdam")), ("adamw", ("AdamW", "PagedAdamW"))):
    for _prefix in _prefixes:
        for _bits in ("", "8bit", "32bit"):
            register_preconditioner(f"bitsandbytes.optim.{_module}.{_prefix}{_bits}", attributes=("args",))(
                bitsandbytes_adam
            )
for _prefix in ("Lion", "PagedLion"):
    for _bits in ("", "8bit", "32bit"):
        register_preconditioner(f"bitsandbytes.optim.lion.{_prefix}{_bits}", attributes=("args",), note=NOTE)(
            bitsandbytes_lion
        )


def _dequantised(state: State, which: int) -> Tensor:
    """The first or second moment, in float32."""
    stored: Tensor = state[f"state{which}"]
    if f"absmax{which}" not in state:
        return stored.float()
    functional = import_module("bitsandbytes.functional")  # which the optimizer itself is part of
    moment: Tensor = functional.dequantize_blockwise(
        stored.contiguous(), absmax=state[f"absmax{which}"], code=state[f"qmap{which}"], blocksize=BLOCK
    )
    return moment.view_as(stored)


BLOCK = 256
"""Entries that share one scale in the 8-bit optimizers of bitsandbytes."""


def _refuse_tricks(group: State) -> None:
    if getattr(group["args"], "max_unorm", 0.0) > 0.0:
        raise NotImplementedError("Expected max_unorm 0, which clips each update by the norm of its parameter.")
