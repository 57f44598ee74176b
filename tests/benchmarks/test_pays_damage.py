"""Spoiled records of the comparison in seconds, arms that may or may not see them, and target rows that only guide."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pays import arms, command, training
from pays.arms import ARMS, HONEST, Method, Sizes
from pays.damage import DAMAGES, MARK, damaged
from pays.peers import RandomWeights, SmallLossFilter
from pays.proposals import Known, similar_and_sound

from ftw_optim import Matching, SelectiveOptimizer, UniformWeights

RECORDS = [{"prompt": f"Say {n}.", "response": f"It is {n} of many words", "source": f"s{n % 2}"} for n in range(400)]


def quick_lab(*arguments: str) -> training.Lab:
    options = command.parse_arguments(["--quick", *arguments])
    return command.prepare(options, *command.load(options))[0]


def test_damage_is_a_share_of_the_records_each_by_its_prompt_alone() -> None:
    shares = {"foreign": 0.2, "looped": 0.3}
    found = damaged(RECORDS, shares, seed=1)
    marked = [record for record in found if record["source"].endswith(MARK)]
    assert 0.42 < len(marked) / len(RECORDS) < 0.58
    assert [record["prompt"] for record in found] == [record["prompt"] for record in RECORDS]
    for record, before in zip(found, RECORDS, strict=True):
        assert (record is before) == (record not in marked)
        assert record["source"].removesuffix(MARK) == before["source"]
    assert damaged(RECORDS, shares, seed=1) == found
    assert damaged(RECORDS, shares, seed=2) != found
    # Which ones does not depend on their order.
    again = damaged(RECORDS[::-1], shares, seed=1)[::-1]
    assert [record["source"] for record in again] == [record["source"] for record in found]


def test_each_kind_does_what_its_name_says() -> None:
    draw, response = random.Random(0), "one two three four five six seven eight"
    spoiled = {kind: [make(response, "another", draw) for _ in range(50)] for kind, make in DAMAGES.items()}
    assert set(spoiled["foreign"]) == {"another"}
    assert all(response.startswith(text) and len(text) <= len(response) / 2 + 3 for text in spoiled["truncated"])
    assert {len(set(text.split())) for text in spoiled["looped"]} == {1, 2}
    assert {len(text.split()) for text in spoiled["looped"]} == {8}
    assert all(text.startswith("one") for text in spoiled["looped"])
    assert len(set(spoiled["placeholder"])) > 2
    assert len(set(spoiled["refusal"])) > 2
    assert min(len(text.split()) for text in spoiled["refusal"]) > 10
    assert all(response not in text for texts in spoiled.values() for text in texts)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"burnt": 0.1}, "one of foreign, truncated, looped, placeholder, refusal, got burnt"),
        ({"foreign": 0.0}, "positive"),
        ({"foreign": 0.6, "looped": 0.4}, "less than one"),
    ],
)
def test_damage_that_cannot_be_is_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        damaged(RECORDS, shares)


def test_only_the_stream_is_damaged_and_only_the_told_arm_avoids_it(tmp_path: Path) -> None:
    lab = quick_lab("--out", str(tmp_path), "--damage", "foreign=0.4", "looped=0.2")
    made = lab.setting
    read = made.stream(steps=1, read_ahead=100, seed=0)[0]
    assert sum(example.source.endswith(MARK) for example in read) > 40
    held_out = [*made.pool_test, *made.guide, *made.validation, *made.test, *made.own_examples()]
    assert held_out
    assert not any(example.source.endswith(MARK) for example in held_out)
    known = Known(embeddings=torch.zeros(1, 1), guide=made.guide, own_source=[], seed=0)
    chosen = similar_and_sound(known).choose(read, 8)
    assert len(chosen) == 8
    assert not any(example.source.endswith(MARK) for example in chosen)


@pytest.mark.parametrize("given", ["looped", "burnt=0.1"])
def test_a_kind_without_a_share_is_refused(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(["--quick", "--out", str(tmp_path), "--damage", given])
    assert "expected KIND=SHARE" in capsys.readouterr().err


def test_arms_that_must_be_told_run_only_where_there_is_something_to_tell(tmp_path: Path) -> None:
    def default(*more: str) -> set[str]:
        return set(command.parse_arguments(["--quick", "--out", str(tmp_path), *more]).arms)

    assert default("--damage", "looped=0.3") == set(ARMS)
    assert default() == set(ARMS) - arms.SOUND


def _matching(losses: list[float], seed: int = 0) -> Matching:
    n = len(losses)
    return Matching(
        gram=torch.eye(n).double(),
        cross_gram=torch.ones(n).double(),
        target_energy=1.0,
        losses=torch.tensor(losses),
        generator=torch.Generator().manual_seed(seed),
    )


def test_small_losses_are_kept_and_nothing_else_counts() -> None:
    assert SmallLossFilter(keep=0.5)(_matching([3.0, 1.0, 2.0, 1.0])).tolist() == [1, 3]
    assert SmallLossFilter(keep=0.1)(_matching([3.0, 2.0])).tolist() == [1]


def test_random_weights_are_uniform_over_all_that_sum_to_one() -> None:
    drawn = torch.stack([RandomWeights()(_matching([1.0] * 3, seed)).weights for seed in range(600)])
    torch.testing.assert_close(drawn.sum(dim=1), torch.ones(600).double())
    assert bool((drawn >= 0).all())
    torch.testing.assert_close(drawn.mean(dim=0), torch.full((3,), 1 / 3).double(), rtol=0.08, atol=0)
    # Of a Dirichlet distribution with parameters 1.
    torch.testing.assert_close(drawn.var(dim=0), torch.full((3,), 1 / 18).double(), rtol=0.2, atol=0)


def test_a_mean_over_tokens_counts_a_row_by_its_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = quick_lab("--out", str(tmp_path))
    run = training.Run(arm="adamw-n-tokens", steps=1, lr=1e-3, seed=0)
    (read,) = lab.setting.stream(steps=1, read_ahead=12, seed=0)
    rows = read[: lab.sizes.candidates]
    counts = torch.tensor([len(row.tokens) - row.prompt_length for row in rows], dtype=torch.float64)
    assert len(set(counts.tolist())) > 1
    gradients: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def watching(self: torch.optim.AdamW, *arguments: Any) -> Any:
        gradients.extend(parameter.grad.clone() for parameter in lab.top.adapters() if parameter.grad is not None)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    lab.perform(run, [read], lambda: None)
    lab.top.reset(0)
    losses = lab.top(lab.entrance.rows(rows))
    wanted = torch.autograd.grad((losses * (counts / counts.sum()).float()).sum(), lab.top.adapters())
    for found, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, expected)
    by_source = Counter()
    for row, count in zip(rows, counts.tolist(), strict=True):
        by_source[row.source] += count / float(counts.sum())
    assert {source: share for source, (_, share) in run.sources.items()} == pytest.approx(by_source)


def test_a_selection_by_token_is_given_what_a_mean_over_tokens_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = quick_lab("--out", str(tmp_path))
    run = training.Run(arm="ftw-tokens", steps=1, lr=1e-3, seed=0)
    (read,) = lab.setting.stream(steps=1, read_ahead=12, seed=0)
    rows = read[: lab.sizes.candidates]
    given: list[torch.Tensor] = []
    step = SelectiveOptimizer.step

    def watching(self: SelectiveOptimizer, closure: Any) -> Any:
        given.append(closure().detach())
        return step(self, closure)

    monkeypatch.setattr(SelectiveOptimizer, "step", watching)
    lab.perform(run, [read], lambda: None)
    lab.top.reset(0)
    counts = torch.tensor([float(len(row.tokens) - row.prompt_length) for row in rows])
    losses = lab.top(lab.entrance.rows(rows)).detach()
    (found,) = given
    torch.testing.assert_close(found.mean(), (losses * counts).sum() / counts.sum())
    torch.testing.assert_close(found, losses * counts / counts.mean())


def test_rows_that_guide_are_not_trained_on_and_are_charged_when_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = quick_lab("--out", str(tmp_path))
    rows: list[list[Any]] = []
    inner = lab.entrance.rows

    def watching(examples: Any) -> Any:
        rows.append(list(examples))
        return inner(examples)

    monkeypatch.setattr(lab.entrance, "rows", watching)
    method = Method(filter=ARMS["target+honest"].method.filter, weight=UniformWeights(), **HONEST)  # type: ignore[union-attr]
    assert method == ARMS["target+honest"].method
    run = training.Run(arm="target+honest", steps=6, lr=1e-3, seed=0)
    stream = lab.setting.stream(steps=6, read_ahead=12, seed=0)
    lab.perform(run, stream, lambda: None)
    half = len(lab.setting.guide) // 2
    guides, trained = lab.setting.guide[:half], lab.setting.guide[half:]
    seen = Counter(
        kind
        for batch in rows
        for kind, own in (("guide", guides), ("trained", trained))
        if set(map(id, batch)) <= set(map(id, own))
    )
    assert seen == {"guide": 3, "trained": 6}
    sizes: Sizes = lab.sizes
    assert run.rows[-1] == (6 * (sizes.candidates - sizes.target_rows), 6 * sizes.target_rows + 3 * sizes.target_rows)
