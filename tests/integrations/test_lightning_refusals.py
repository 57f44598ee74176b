"""Automatic optimisation, loops of one's own, and what Lightning's modules refuse."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ftw_optim import SelectiveOptimizer, token_losses
from ftw_optim.integrations.lightning import SelectiveModuleMixin
from tests.support.lightning_runs import CASES, QUIET, Base, Loader, Log, Plain, Selective, selective_of, trainer_of
from tests.support.models import Case

pytestmark = QUIET


def test_under_automatic_optimisation_it_is_the_inner_optimizer_and_says_so_once() -> None:
    logs = [Log(), Log()]
    for wrapped, log in zip((False, True), logs, strict=True):
        case = CASES["llama"]()

        class Automatic(Plain):
            def configure_optimizers(self, wrapped: bool = wrapped) -> Any:
                optimizer = super().configure_optimizers()
                if not wrapped:
                    return optimizer
                return SelectiveOptimizer(optimizer, self.model, lambda: token_losses(self.model, self.case.target))

        trainer = trainer_of(log, accumulate_grad_batches=2, gradient_clip_val=0.3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(Automatic(case), Loader(case))
        about = [
            str(one.message) for one in said if "SelectiveOptimizer is its inner optimizer here" in str(one.message)
        ]
        assert len(about) == wrapped
    torch.testing.assert_close(logs[1].steps, logs[0].steps, rtol=0, atol=0)


def test_a_manual_loop_of_ones_own_is_told_to_use_the_optimizer_itself() -> None:
    """Lightning's stand-in has the optimizer's methods and would keep their state to itself."""

    class Manual(Base):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return SelectiveOptimizer(optimizer, self.model, lambda: token_losses(self.model, self.case.target))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            stand_in: Any = self.optimizers()
            with pytest.raises(RuntimeError, match=r"self\.optimizers\(use_pl_optimizer=False\)"):
                stand_in.backward(lambda: token_losses(self.model, batch))
            selective: Any = self.optimizers(use_pl_optimizer=False)
            selective.backward(lambda: token_losses(self.model, batch))
            stand_in.step(select=False)
            selective.zero_grad()

    case = CASES["llama"]()
    before = copy.deepcopy(list(case.model.parameters()))
    trainer = trainer_of(max_epochs=1)
    trainer.fit(Manual(case), Loader(case))
    assert trainer.global_step == 7
    assert int(trainer.optimizers[0].state_dict()["selective"]["backwards"]) == 7
    assert not torch.equal(before[0], next(case.model.parameters()))


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    case = CASES["llama"]()

    def refused(error: type[Exception], match: str, module: Any = None, **options: Any) -> None:
        with pytest.raises(error, match=match):
            trainer_of(**options).fit(module or Selective(case), Loader(case))

    refused(
        ValueError, "accumulate_grad_batches must be a positive integer", selective_of(case, accumulate_grad_batches=0)
    )
    refused(ValueError, r"select_from must be one of \('window', 'batch'\)", selective_of(case, select_from="epoch"))
    refused(ValueError, "Expected automatic_optimization to be True", selective_of(case, automatic_optimization=False))
    refused(ValueError, "refresh_every must be a positive integer", selective_of(case, options={"refresh_every": 0}))
    refused(TypeError, "gradient_clip_val must be a number", selective_of(case, gradient_clip_val="much"))
    refused(ValueError, 'must be "norm" or "value"', selective_of(case, gradient_clip_algorithm="max"))
    refused(
        ValueError,
        "gradient_clip_val to be set once, got 0.5 on the module and 1.0",
        selective_of(case, gradient_clip_val=0.5),
        gradient_clip_val=1.0,
    )

    class Two(Selective):
        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.parameters()), torch.optim.SGD(self.parameters())]

    refused(RuntimeError, "multiple optimizers is only supported with manual optimization", Two(case))
    two = Two(case)
    two.automatic_optimization = False  # as that message advises
    refused(ValueError, "with one optimizer: give all parameters to one, in groups", two)

    class Unmonitored(Selective):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer), "monitor": "unknown"}

    refused(Exception, r"on metric unknown which is not available.*selection/cosine", Unmonitored(case))

    class Hidden(Selective):
        def configure_callbacks(self) -> list[Any]:
            return []

    refused(RuntimeError, r"super\(\)\.configure_callbacks\(\)", Hidden(case))

    class NoLosses(SelectiveModuleMixin, Base):
        pass

    refused(NotImplementedError, r"NoLosses to define target_dataloader\(\)", NoLosses(case))
    with pytest.raises(NotImplementedError, match=r"NoLosses to define candidate_losses\(batch\)"):
        NoLosses(case).candidate_losses({})
    with pytest.raises(TypeError, match="to define candidate_losses"):
        type("WithItsOwn", (Selective,), {"training_step": Plain.training_step})
    with pytest.raises(TypeError, match="SelectiveModuleMixin before its other bases"):
        type("Behind", (Plain, SelectiveModuleMixin), {})


def test_a_backward_of_ones_own_is_refused_by_name() -> None:
    """In front of the mixin, behind it, and on an instance."""

    class Backwards(Base):
        def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
            loss.backward()

    case = CASES["llama"]()

    def made(*bases: type, **attributes: Any) -> type:
        return type("Made", bases, attributes)

    with pytest.raises(TypeError, match=r"got Made\.backward: gradients come from the selection"):
        made(Selective, backward=Backwards.backward)
    with pytest.raises(TypeError, match=r"got Backwards\.backward"):
        made(SelectiveModuleMixin, Backwards)
    with pytest.raises(TypeError, match=r"got Backwards\.backward"):
        made(Backwards, SelectiveModuleMixin)
    for name, message in (("backward", "got a backward that is set on"), ("training_step", "got a training_step that")):
        module = Selective(case)
        setattr(module, name, lambda *_: None)
        with pytest.raises(TypeError, match=message):
            trainer_of().fit(module, Loader(case))
    assert made(SelectiveModuleMixin, Plain)  # whose training step is what the selective one replaces


def test_other_strategies_are_refused() -> None:
    """Those that divide the model, or drive the optimizer themselves."""
    trainer = trainer_of()
    trainer.strategy.__class__ = type("OtherStrategy", (type(trainer.strategy).__mro__[1],), {})
    module = Selective(CASES["llama"]())
    (callback,) = module.configure_callbacks()
    with pytest.raises(NotImplementedError, match="Expected SingleDeviceStrategy or DDPStrategy, got OtherStrategy"):
        callback.setup(trainer, module, "fit")
    callback.setup(trainer, module, "validate")


def test_ddp_of_one_process_selects() -> None:
    case = CASES["llama"]()
    with mock.patch.dict(os.environ):  # in which it leaves the address of its process group
        trainer = trainer_of(strategy="ddp", max_steps=1)
        module = Selective(case)
        trainer.fit(module, Loader(case))
        assert trainer.global_step == 1
        assert module._selecting is None
        torch.distributed.destroy_process_group()
