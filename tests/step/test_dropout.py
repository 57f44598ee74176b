"""Dropout while training: every candidate's gradient is that of the masks of the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.capturing import check_common_graph
from tests.support.families import case_of, family, model_of
from tests.support.models import Case, SmallGPT, drawn, language_model, precision, seeded, with_lora


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("name", ["small-gpt", "gpt2", "bert", "t5", "lora", "attention", "encoder"])
def test_dropout_in_training_is_the_one_of_the_pass(name: str, keep_graph: bool) -> None:
    with precision(torch.float64):
        if name in ("attention", "encoder"):
            layer: nn.Module = seeded(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.4))
            if name == "attention":
                layer = layer.self_attn  # type: ignore[assignment]
            model = _Attending(layer).double()
            x = drawn(3, 5, 4)
            check_common_graph(model, lambda: model(x).square().sum((1, 2)), keep_graph=keep_graph)
            return
        if name == "small-gpt":
            case = language_model(seeded(lambda: SmallGPT(dropout=0.3)).double(), 4)
        elif name == "lora":
            base = model_of("llama", attention_dropout=0.2)
            case = case_of("llama", seeded(lambda: with_lora(base, lora_dropout=0.3)).double(), 4)
        else:
            dropouts = {
                "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.2},
                "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
                "t5": {"dropout_rate": 0.3},
            }
            case = family(name, torch.float64, 4, **dropouts[name])
            for parameter_name, parameter in case.model.named_parameters():
                parameter.requires_grad_("relative_attention_bias" not in parameter_name)
        if name == "gpt2":
            _positions_without_dropout(case)
        check_common_graph(case.model, case.losses, keep_graph=keep_graph, rtol=1e-9)


def _positions_without_dropout(case: Case) -> None:
    """Position embeddings that are looked up once have one mask in a bare run, and one for each row in ours."""
    inner: Any = case.model
    inner.transformer.drop.p = 0.0


class _Attending(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if isinstance(self.layer, nn.MultiheadAttention):
            hidden, weights = self.layer(hidden, hidden, hidden)
            hidden = hidden + weights.diagonal(dim1=1, dim2=2)[..., None]  # both outputs count
        else:
            hidden = self.layer(hidden)
        scores: Tensor = self.last(hidden)
        return scores
