"""Per-candidate losses against Transformers' own, one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import token_losses
from tests.models import VOCABULARY, transformers_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_token_mean_is_the_models_own_loss_of_each_row(family: str) -> None:
    case = transformers_model(family)(torch.float32, 4)
    own = [case.model(**{key: value[row : row + 1] for key, value in case.candidates.items()}).loss for row in range(4)]
    torch.testing.assert_close(token_losses(case.model, case.candidates), torch.stack(own))


class Logits(nn.Module):
    """Returns given logits, bare or in a tuple."""

    def __init__(self, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.scores, self.as_tuple = nn.Parameter(torch.randn(2, 5, VOCABULARY)), as_tuple

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, None]:
        return (self.scores, None) if self.as_tuple else self.scores


@pytest.mark.parametrize("as_tuple", [False, True])
def test_sums_and_means_over_the_labels_that_count(as_tuple: bool) -> None:
    model = Logits(as_tuple=as_tuple)
    ids = torch.randint(VOCABULARY, (2, 5))
    labels = torch.tensor([[7, -100, 3, 4, -100], [1, -100, -100, -100, -100]])
    batch = {"input_ids": ids, "labels": labels}
    scores = torch.log_softmax(model.scores, -1)
    expected = torch.stack([-(scores[0, 1, 3] + scores[0, 2, 4]), torch.zeros(())])
    summed = token_losses(model, batch, reduction="token_sum")
    torch.testing.assert_close(summed, expected)
    torch.testing.assert_close(token_losses(model, batch), expected / torch.tensor([2.0, 1.0]))
    summed.sum().backward()
    assert model.scores.grad is not None
    assert not model.scores.grad[1].any(), "a row whose labels do not count has no gradient"


def test_half_precision_logits_are_summed_in_float32() -> None:
    model = Logits().bfloat16()
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": torch.ones(2, 5, dtype=torch.long)}
    assert token_losses(model, batch).dtype == torch.float32


def test_what_is_missing_is_named() -> None:
    model = Logits()
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Expected a batch with labels.*\['input_ids'\]"):
        token_losses(model, {"input_ids": ids})
    with pytest.raises(ValueError, match='reduction must be "token_mean"'):
        token_losses(model, {"input_ids": ids, "labels": ids}, reduction="mean")
    with pytest.raises(ValueError, match=r"Expected logits \(n, t, vocabulary\) for labels of shape \(2, 4\)"):
        token_losses(model, {"input_ids": ids, "labels": ids[:, 1:]})
