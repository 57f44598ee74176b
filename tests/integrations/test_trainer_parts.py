"""What the trainers share: documents of packed rows, losses of windows, columns for the log, idle steps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ftw_optim._matching.selection import Selection
from ftw_optim.integrations._trainers.columns import WithColumns
from ftw_optim.integrations._trainers.packing import documents_of
from ftw_optim.integrations._trainers.realised import after_idle_step
from ftw_optim.integrations._trainers.window import IDS, SOURCES, MicroBatch, Window
from tests.support.optimizers import INNER, twin_of, warmed_up, warns_of_overloads

# ---------------------------------------------------------------------- documents

LENGTHS = [3, 1, 4, 2]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
OWNERS = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None]
ENDS = torch.tensor([0, 3, 4, 8, 10], dtype=torch.int32)
EVERYWHERE = torch.ones(1, 10, dtype=torch.bool)


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": POSITIONS},
        {"seq_idx": OWNERS.to(torch.int32)},
        {"cu_seq_lens_q": ENDS},
        {"position_ids": POSITIONS, "seq_idx": OWNERS, "cu_seq_lens_q": ENDS, "max_length_q": 4},
    ],
    ids=lambda batch: ", ".join(batch),
)
def test_documents_are_found_by_whatever_tells_their_boundaries(batch: dict[str, Any]) -> None:
    found = documents_of(batch, EVERYWHERE)
    assert found is not None
    assert torch.equal(found.sample_ids, OWNERS)
    assert found.origins == [0, 1, 2, 3]


def test_documents_without_labels_are_no_candidates() -> None:
    counted = EVERYWHERE & (OWNERS != 0) & (OWNERS != 2)
    found = documents_of({"position_ids": POSITIONS}, counted)
    assert found is not None
    assert found.sample_ids.tolist() == [[-1, -1, -1, 0, -1, -1, -1, -1, 1, 1]]
    assert found.origins == [1, 3]


def test_documents_of_several_rows() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    found = documents_of({"position_ids": positions}, torch.ones(2, 4, dtype=torch.bool))
    assert found is not None
    assert found.sample_ids.tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize(
    "batch",
    [
        {},
        {"position_ids": torch.arange(10)[None]},
        {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 10)},
        {"cu_seq_lens_q": torch.tensor([0, 10])},
    ],
    ids=str,
)
def test_rows_of_one_document_each(batch: dict[str, Any]) -> None:
    assert documents_of(batch, EVERYWHERE) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "end at the number of tokens, 10, got 4"),
        ({"seq_idx": torch.zeros(1, 3)}, r"Expected seq_idx of the tokens' shape \(1, 10\)"),
    ],
)
def test_boundaries_of_other_tokens(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        documents_of(batch, EVERYWHERE)


# ---------------------------------------------------------------------- windows


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


# ---------------------------------------------------------------------- columns


def test_columns_pass_the_collator_by() -> None:
    seen: list[Any] = []

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(rows)
        return {"labels": torch.tensor([row["labels"] for row in rows])}

    rows = [{"labels": [1, 2, 3], "name": "a", "from": "x"}, {"labels": [1, 2, 3], "name": "b", "from": "y"}]
    columns = WithColumns(collator, {IDS: "name", SOURCES: "from"})
    batch = MicroBatch.of(columns(rows))
    assert all(set(row) == {"labels"} for row in seen)
    assert batch.columns == {IDS: ["a", "b"], SOURCES: ["x", "y"]}
    assert set(batch.inputs) == {"labels"}


def test_columns_of_packed_rows_belong_to_documents() -> None:
    batch = {
        "labels": torch.tensor([[-100, 1, 1, -100, 2, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),  # the last is padding
        IDS: ["a", "b"],
    }
    assert MicroBatch.of(batch).columns == {IDS: ["a", "b"]}
    with pytest.raises(ValueError, match=f"one value of {SOURCES} for each of the packed documents, got 1"):
        MicroBatch.of({**batch, SOURCES: ["x"]})


# ---------------------------------------------------------------------- idle steps


@warns_of_overloads
@pytest.mark.parametrize("name", INNER)
def test_an_idle_step_is_that_at_zero_gradient_and_leaves_no_trace(name: str) -> None:
    optimizer, parameter = warmed_up(INNER[name], 3)
    gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=parameter.dtype)
    twins = [twin_of(optimizer) for _ in range(2)]
    for one in (one for group in optimizer.param_groups for one in group["params"]):
        one.grad = gradient.clone()
    before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
    tensors = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
    with after_idle_step(optimizer):
        idle = parameter.detach().clone()
    assert torch.equal(parameter, before)
    leaves, expected = tree_leaves(optimizer.state_dict()), tree_leaves(state)
    for one, other in zip(leaves, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, gradient)
    kept = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
    assert all(one is other for one, other in zip(kept, tensors, strict=True))

    def stepped(twin: Any, given: Tensor) -> Tensor:
        parameters = [one for group in twin.param_groups for one in group["params"]]
        for one in parameters:
            one.grad = given.clone()
        torch.manual_seed(0)
        twin.step()
        return parameters[0].detach()  # type: ignore[no-any-return]

    torch.testing.assert_close(idle, stepped(twins[0], torch.zeros_like(gradient)), rtol=0, atol=0)
    torch.manual_seed(0)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), stepped(twins[1], gradient), rtol=0, atol=0)
