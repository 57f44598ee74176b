"""Losses of a window of micro-batches, and what it reports of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.window import Window


def window(weighting: str, **options: Any) -> Window:
    """Of token losses that are the tokens themselves."""
    batches: list[dict[str, Any]] = [
        {"input_ids": torch.tensor([[0, 1, 2], [0, 3, 0]]), "labels": torch.tensor([[0, 1, 2], [0, 3, -100]])},
        {"input_ids": torch.tensor([[0, 4, 5, 6, 7]]), "labels": torch.tensor([[-100, 4, 5, 6, 7]])},
    ]

    def positions(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        return shifted.clamp(min=0).double(), shifted != -100

    return Window.of(batches, positions, weighting, **{"over_window": True, **options})


def losses_of(one: Window) -> list[float]:
    found = one.closure()()
    return (found if isinstance(found, Tensor) else torch.cat(list(found))).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("joined", [False, True])
def test_the_two_weightings(joined: bool) -> None:
    assert losses_of(window("token_mean", joined=joined)) == pytest.approx([1.5, 3.0, 5.5])
    # The mean over the candidates is the mean over all seven tokens.
    assert losses_of(window("token_sum", joined=joined)) == pytest.approx([3 * 3 / 7, 3 * 3 / 7, 3 * 22 / 7])
    # That of the micro-batches' means: (6 / 3 + 22 / 4) / 2.
    if not joined:
        by_batch = losses_of(window("token_sum", over_window=False))
        assert sum(by_batch) / 3 == pytest.approx((6 / 3 + 22 / 4) / 2)


def test_some_rows_of_a_window_run_again() -> None:
    again = window("token_sum", joined=True).closure()(rows=torch.tensor([2, 0]))
    assert again.tolist() == pytest.approx([3 * 22 / 7, 3 * 3 / 7])


def selection(
    losses: list[float], kept: list[int], weights: list[float], rejected: list[int], skipped: bool
) -> Selection:
    nothing = Selection.nothing(torch.tensor(losses), torch.ones(len(losses), dtype=torch.bool))
    return replace(
        nothing,
        kept=torch.tensor(kept, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        skipped=skipped,
    )


@pytest.mark.parametrize("weighting", ["token_sum", "token_mean"])
def test_the_reported_loss_is_that_of_a_token_under_the_weights(weighting: str) -> None:
    one = window(weighting)
    losses = losses_of(one)
    nan = [losses[0], float("nan"), losses[2]]
    # By tokens: candidates of 2, 1 and 4 with 3, 3 and 22 in all; by candidates: means of 1.5, 3 and 5.5.
    expected = {
        "token_sum": [28 / 7, (3 * 0.75 + 22 * 0.25) / (2 * 0.75 + 4 * 0.25), 22 / 4, 25 / 6],
        "token_mean": [10 / 3, 1.5 * 0.75 + 5.5 * 0.25, 5.5, 3.5],
    }[weighting]
    found = [
        one.token_loss(selection(losses, [2, 0, 1], [1 / 3] * 3, [], skipped=False)),
        one.token_loss(selection(losses, [2, 0], [0.25, 0.75], [], skipped=False)),
        one.token_loss(selection(nan, [2], [1.0], [1], skipped=False)),
        one.token_loss(selection(nan, [], [], [1], skipped=True)),
    ]
    assert [float(loss) for loss in found] == pytest.approx(expected, rel=1e-6)
    assert one.token_loss(selection(nan, [], [], [0, 1, 2], skipped=True)).isnan()


def test_micro_batches_without_any_document_are_left_out() -> None:
    packed = {"position_ids": torch.tensor([[0, 1, 0, 1]]), "input_ids": torch.ones(1, 4, dtype=torch.int64)}
    empty = {**packed, "labels": torch.full((1, 4), -100)}
    full = {**packed, "labels": torch.tensor([[-100, 1, -100, 1]])}
    one = Window.of([empty, full], lambda _: (torch.ones(1, 4), torch.ones(1, 4)), "token_sum", over_window=True)
    assert [len(batch) for batch in one.batches] == [2]
    assert Window.of([empty], lambda _: None, "token_sum", over_window=True).batches == []  # type: ignore[arg-type, return-value]


def test_what_cannot_be_put_into_one_batch() -> None:
    packed = {
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
        "input_ids": torch.ones(1, 4, dtype=torch.int64),
        "labels": torch.tensor([[-100, 1, -100, 1]]),
    }
    with pytest.raises(ValueError, match="packed rows cannot be put together"):
        Window.of([packed, packed], lambda _: None, "token_sum", over_window=True, joined=True)  # type: ignore[arg-type, return-value]
    image = {"labels": torch.ones(2, 3, dtype=torch.int64), "pixels": torch.ones(2, 5, 5)}
    with pytest.raises(ValueError, match=r"pixels has the shape \(2, 5, 5\)"):
        Window.of([image, image], lambda _: None, "token_sum", over_window=True, joined=True)  # type: ignore[arg-type, return-value]


def test_losses_of_other_positions_are_an_error() -> None:
    batch = {"labels": torch.ones(2, 3, dtype=torch.int64)}
    one = Window.of([batch], lambda _: (torch.ones(2, 2), torch.ones(2, 2)), "token_sum", over_window=True)
    with pytest.raises(ValueError, match=r"labels' shape \(2, 3\), got \(2, 2\)"):
        one.losses()
