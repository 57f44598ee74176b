"""Modules of Lightning with selection: the oracle's gradients, and what is logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import GreedyFilter, Selection, token_losses
from tests.support.lightning_runs import CASES, QUIET, Loader, Selective, losses_of, selective_of, trainer_of
from tests.support.models import Case
from tests.support.oracles import candidate_gradients

pytestmark = QUIET


@pytest.mark.parametrize("select_from", ["window", "batch"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_that_lightning_sees_is_the_oracles(name: str, select_from: str) -> None:
    """``sum w_i g_i`` of gradients formed one candidate at a time, with masks, padding and LoRA, over some steps."""
    case = CASES[name]()
    expected: dict[str, Tensor] = {}
    compared = []

    class Checked(Selective):
        def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                expected.clear()
                self.pool: list[dict[str, Tensor]] = []
            self.pool.append(batch)

        def log_selection(self, selection: Selection, loss: Tensor) -> None:
            super().log_selection(selection, loss)
            batches = self.pool if select_from == "window" else self.pool[-1:]
            scale = len(batches) / 2
            rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            gradients = candidate_gradients(Case(oracle, rows, rows, losses_of))
            for index, weight in zip(selection.kept.tolist(), selection.weights.tolist(), strict=True):
                for key, gradient in gradients[index].items():
                    expected[key] = expected.get(key, torch.zeros(())) + scale * weight * gradient

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for key, parameter in self.case.model.named_parameters():
                if parameter.requires_grad and key in expected:
                    torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-6, atol=1e-8)
            compared.append(len(expected))

    oracle = case.model  # unchanged until the step
    module = Checked(case)
    module.options, module.accumulate_grad_batches, module.select_from = (
        {"filter": GreedyFilter(keep=2)},
        2,
        select_from,
    )
    trainer_of(max_epochs=1).fit(module, Loader(case))
    assert len(compared) == 4
    assert min(compared) == len([p for p in case.model.parameters() if p.requires_grad])


def test_what_a_selection_came_to_is_logged_and_its_target_evaluated_once() -> None:
    """The second half of a step, which Lightning gives a closure of its own, evaluates nothing."""
    case, calls = CASES["llama"](), []

    class Counted(Selective):
        def target_losses(self, batch: dict[str, Tensor]) -> Tensor:
            calls.append(batch)
            return super().target_losses(batch)

    module = Counted(case)
    module.options, module.accumulate_grad_batches = {"filter": GreedyFilter(keep=1)}, 2
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, Loader(case))
    assert len(calls) == trainer.global_step == 4
    logged = {name.removeprefix("selection/"): float(value) for name, value in trainer.logged_metrics.items()}
    selection = trainer.optimizers[0].selection
    assert logged.pop("loss") == pytest.approx(float(selection.weighted_loss()))
    assert logged == pytest.approx(
        {
            "kept_share": 0.5,
            "effective_size": selection.effective_size,
            "cosine": selection.cosine,
            "residual": selection.residual,
            "predicted_decrease": selection.predicted_decrease,
            "rejected": 0.0,
            "skipped": 0.0,
            **{f"ms_{phase}": spent for phase, spent in selection.milliseconds.items()},
        }
    )


def test_kept_candidates_are_run_again_where_batches_have_rows() -> None:
    """With ``combine="rerun"``, which takes one batch."""
    found = []
    for combine in ("factors", "rerun"):
        case = CASES["llama"]()
        module = selective_of(case, options={"filter": GreedyFilter(keep=1), "combine": combine})
        trainer = trainer_of(max_epochs=1)
        trainer.fit(module, Loader(case))
        assert trainer.optimizers[0].selection.combine == combine
        found.append(list(module.parameters()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_the_model_is_the_child_that_holds_what_is_trained() -> None:
    case = CASES["llama"]()

    class Two(Selective):
        """Parameters in two children: then its own forward is called."""

        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.scale = nn.Linear(1, 1, bias=False).double()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

        def forward(self, **batch: Tensor) -> Tensor:
            logits = self.model(**batch).logits
            return logits * (1 + self.scale(torch.ones_like(logits[..., :1])))

        def candidate_losses(self, batch: dict[str, Tensor]) -> Tensor:
            return token_losses(self, batch)

    for kind in (Selective, Two):
        module = kind(CASES["llama"]())
        trainer = trainer_of(max_epochs=1)
        trainer.fit(module, Loader(case))
        assert trainer.optimizers[0].model is (module if kind is Two else module.model)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, Loader(case))  # once more: wrapped anew
        assert trainer.global_step == 14
