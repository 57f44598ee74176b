"""Per-candidate losses against Transformers' own, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftw_optim import KeepAll, SelectiveOptimizer, UniformWeights, count_label_tokens, token_losses
from tests.support.models import VOCABULARY, transformers_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_token_mean_is_the_models_own_loss_of_each_row(family: str) -> None:
    case = transformers_model(family)(torch.float32, 4)
    own = [case.model(**{key: value[row : row + 1] for key, value in case.candidates.items()}).loss for row in range(4)]
    torch.testing.assert_close(token_losses(case.model, case.candidates), torch.stack(own))


class Logits(nn.Module):
    """Returns given logits, bare or in what models put them into."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.scores, self.wrap = nn.Parameter(torch.randn(2, 5, VOCABULARY)), wrap

    def forward(self, input_ids: Tensor) -> Any:
        return self.wrap(self.scores)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_mean_of_token_sums_is_the_models_own_loss_of_the_batch(family: str) -> None:
    case = transformers_model(family)(torch.float32, 4)
    losses = token_losses(case.model, case.candidates, reduction="token_sum")
    torch.testing.assert_close(losses.mean(), case.model(**case.candidates).loss)
    assert (case.candidates["labels"] != -100).sum(1).unique().numel() > 1, "else both reductions are the same"


@pytest.mark.parametrize("one_selection", [True, False])
def test_token_sums_of_a_window_accumulate_to_the_trainers_own_gradient(one_selection: bool) -> None:
    """Over all label tokens of unequal micro-batches, one of them without any; Transformers' own loss is the oracle."""
    case = transformers_model("llama")(torch.float64, 7)
    case.candidates["labels"][4:6] = -100
    window = [{key: value[rows] for key, value in case.candidates.items()} for rows in torch.arange(7).split([4, 2, 1])]
    tokens = count_label_tokens(*window)
    assert tokens == int((case.candidates["labels"][:, 1:] != -100).sum())

    for batch in window:
        case.model(**batch, num_items_in_batch=tokens).loss.backward()
    expected = [parameter.grad for parameter in case.model.parameters()]
    case.model.zero_grad()

    optimizer = SelectiveOptimizer(
        torch.optim.SGD(case.model.parameters()),
        case.model,
        lambda: token_losses(case.model, case.target, reduction="token_sum"),
        filter=KeepAll(),
        weight=UniformWeights(),
    )
    given = {"reduction": "token_sum", "label_tokens": tokens}
    if one_selection:
        optimizer.backward(lambda: (token_losses(case.model, batch, candidates=7, **given) for batch in window))
    else:
        for batch in window:
            optimizer.backward(lambda batch=batch: token_losses(case.model, batch, **given))
    torch.testing.assert_close([parameter.grad for parameter in case.model.parameters()], expected)


WRAPPINGS = {"bare": lambda x: x, "tuple": lambda x: (x, None), "mapping": lambda x: {"past": None, "logits": x}}


@pytest.mark.parametrize("way", WRAPPINGS)
def test_sums_and_means_over_the_labels_that_count(way: str) -> None:
    model = Logits(WRAPPINGS[way])
    ids = torch.randint(VOCABULARY, (2, 5))
    labels = torch.tensor([[7, -100, 3, 4, -100], [1, -100, -100, -100, -100]])
    batch = {"input_ids": ids, "labels": labels}
    scores = torch.log_softmax(model.scores, -1)
    expected = torch.stack([-(scores[0, 1, 3] + scores[0, 2, 4]), torch.zeros(())])
    summed = token_losses(model, batch, reduction="token_sum")
    torch.testing.assert_close(summed, expected)  # 2 rows share 2 labels
    torch.testing.assert_close(
        token_losses(model, batch, reduction="token_sum", label_tokens=torch.tensor(8), candidates=6), expected * 6 / 8
    )
    torch.testing.assert_close(token_losses(model, batch), expected / torch.tensor([2.0, 1.0]))
    summed.sum().backward()
    assert model.scores.grad is not None
    assert not model.scores.grad[1].any(), "a row whose labels do not count has no gradient"


@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
def test_a_batch_without_any_label_has_losses_and_gradients_of_zero(reduction: str) -> None:
    model = Logits()
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": torch.full((2, 5), -100)}
    assert count_label_tokens(batch) == 0
    losses = token_losses(model, batch, reduction=reduction)
    assert losses.tolist() == [0.0, 0.0]
    losses.sum().backward()
    assert model.scores.grad is not None
    assert not model.scores.grad.any()


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
    with pytest.raises(ValueError, match='label_tokens and candidates are those of a window for reduction="token_sum"'):
        token_losses(model, {"input_ids": ids, "labels": ids}, label_tokens=3)
    with pytest.raises(ValueError, match="Expected a batch with labels"):
        count_label_tokens({"input_ids": ids})
    with pytest.raises(ValueError, match=r"Expected logits \(n, t, vocabulary\) for labels of shape \(2, 4\)"):
        token_losses(model, {"input_ids": ids, "labels": ids[:, 1:]})
