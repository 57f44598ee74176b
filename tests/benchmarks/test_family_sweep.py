"""``benchmarks/families.py``: small configurations, verdicts that notice what is wrong, and a short run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import token_losses

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from families import command
from families.check import verdict
from families.configs import VOCABULARY as SMALL_VOCABULARY
from families.configs import smaller
from families.models import Case, NotBuilt

from tests.support.models import VOCABULARY, SmallGPT, seeded


class Mixing(SmallGPT):
    """Every row sees the mean of all rows."""

    def forward(self, input_ids: Tensor, **unused: Any) -> Tensor:
        x = self.tokens(input_ids)
        return self.head(self.norm(x + x.mean(0, keepdim=True)))  # type: ignore[no-any-return]


class Drawing(SmallGPT):
    """Another scale at each pass."""

    def forward(self, input_ids: Tensor, **unused: Any) -> Tensor:
        return super().forward(input_ids) * torch.rand(())


class Rolled(nn.Module):
    """Each row of a batch gets the gradients of the row before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, **unused: Any) -> Tensor:
        logits: Tensor = self.model(input_ids)
        if logits.requires_grad and len(logits) > 1:
            logits.register_hook(lambda gradient: gradient.roll(1, 0))
        return logits


def case_of(model: nn.Module) -> Case:
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Tensor]:
        ids = torch.randint(1, VOCABULARY, (4, 7), generator=generator)
        return {"input_ids": ids, "labels": ids}

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return token_losses(model, batch, head="all")

    return Case(model.train(), [batch(), batch()], losses, losses)


@pytest.mark.parametrize("combine", command.WAYS)
def test_a_model_that_treats_each_row_by_itself_is_exact(combine: str) -> None:
    found = verdict(case_of(seeded(SmallGPT)), combine)
    assert found.word == "exact"
    assert found.error is not None
    assert found.error < 1e-5


@pytest.mark.parametrize("planted", ["rows mixed", "gradients of other rows"])
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("combine", command.WAYS)
def test_a_planted_error_is_refused_or_found(planted: str, combine: str, self_check: bool) -> None:
    model = seeded(Mixing if planted == "rows mixed" else lambda: Rolled(SmallGPT()))
    found = verdict(case_of(model), combine, self_check=self_check)
    assert found.word in ("refused", "WRONG")
    if combine == "factors" and not self_check:  # "graph" always compares the sum
        assert found.word == "WRONG"
        assert found.error is not None
        assert found.error > 1e-2


def test_a_model_that_draws_random_numbers_is_not_judged() -> None:
    with pytest.raises(NotBuilt, match="random"):
        verdict(case_of(seeded(Drawing)), "factors")


def test_sizes_become_small_and_every_kind_of_layer_stays() -> None:
    small = smaller(
        {
            "hidden_size": 4096,
            "num_hidden_layers": 6,
            "layer_types": ["linear", "linear", "linear", "full", "linear", "full"],
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "attention_dropout": 0.1,
            "eos_token_id": 151645,
            "rope_theta": 1e6,
            "text_config": {"model_type": "x", "d_model": 1024, "n_layer": 1},
        }
    )
    assert small["layer_types"] == ["linear", "full"]
    assert small["num_hidden_layers"] == 2
    assert small["hidden_size"] == small["text_config"]["d_model"] == 32
    assert small["num_attention_heads"] == 2 * small["num_key_value_heads"] == 4
    assert small["attention_dropout"] == 0.0
    assert small["eos_token_id"] < SMALL_VOCABULARY
    assert small["rope_theta"] == 1e6
    assert small["text_config"]["n_layer"] == 1


@pytest.mark.slow
def test_a_run_over_two_families_keeps_its_table(tmp_path: Path) -> None:
    rows = command.main(["--families", "opt", "umt5", "--ways", "factors", "--out", str(tmp_path)])
    cells = {row.family.architecture: [str(cell.word) for cell in row.cells.values()] for row in rows}
    assert cells == {
        "OPTForCausalLM": ["exact", "exact"],
        "UMT5ForConditionalGeneration": ["refused", "exact"],  # its relative bias is an index of pairs of positions
    }
    assert all(0 < row.parameters < 100_000 for row in rows)
    kept = (tmp_path / "families.txt").read_text()
    assert "float32, factors: 1 exact, 1 refused" in kept
    assert "relative_attention_bias" in kept


def test_an_unknown_family_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--families", "llama", "lama"])
    assert "lama" in capsys.readouterr().err
