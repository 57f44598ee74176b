"""Scores, standard errors and redundancy against autograd, one record at a time, and what the files say of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftw_optim import last_blocks, token_losses
from ftw_optim.integrations.streaming import pad
from ftw_optim.score._metric import given_state
from ftw_optim.score._model import load_model, trained
from ftw_optim.score._ranking import RANKED_BY, rank_records
from ftw_optim.score._records import encoder
from ftw_optim.score._scoring import Options, score_pool
from ftw_optim.score._store import Rows
from tests.support.models import precision
from tests.support.oracles import adamw_map, mean_gradient, redundancies
from tests.support.scored import byte_tokenizer, read_lines, small_llama, text_records, write_lines

RATE = 3e-4


def quiet(dim: int | None) -> Options:
    """Options in which the metric comes from all records, in batches in their order."""
    return Options(dim=dim, learning_rate=RATE, warm_up=3, batch_size=4, block=5, max_length=64, say=lambda line: None)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    pool = write_lines(tmp_path / "pool.jsonl.gz", text_records(12, seed=1))
    return pool, write_lines(tmp_path / "sums.jsonl", text_records(5, seed=2, source="sums"))


def prepared(kind: str, tmp_path: Path) -> nn.Module:
    """A model of which the last block, or adapters, are trained."""
    model = small_llama()
    if kind == "last block":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(last_blocks(model, 1)(name, parameter))
        return model
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    found, _ = load_model(str(tmp_path / "model"), lora=2, blocks=2, seed=0, device="cpu", dtype=torch.float64)
    return found


def gradient_of(model: nn.Module, record: dict[str, str]) -> dict[str, Tensor]:
    """The gradient of one record's own loss, by autograd."""
    sample = encoder(byte_tokenizer(), 64)(record)
    assert sample is not None
    parameters = trained(model)
    found = torch.autograd.grad(token_losses(model, pad([dict(sample)]), head="all")[0], list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("kind", ["last block", "adapters"])
def test_whole_gradients_give_what_autograd_gives(kind: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    with precision(torch.float64):
        model = prepared(kind, tmp_path)
        of_pool = [gradient_of(model, record) for record in text_records(12, seed=1)]
        of_target = [gradient_of(model, record) for record in text_records(5, seed=2, source="sums")]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        out, found = score_pool(model, byte_tokenizer(), *files, tmp_path / "out", options=quiet(None))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batches = [mean_gradient(of_pool[at : at + 4]) for at in (0, 4, 8)]
    maps = {name: adamw_map(batches, lr=RATE, name=name) for name in batches[0]}

    def rows(gradients: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([torch.cat([(maps[n].sqrt() * g[n]).flatten() for n in maps]) for g in gradients])

    pool_rows, target_rows = rows(of_pool), rows(of_target)
    products = pool_rows @ target_rows.T
    scores = products.mean(dim=1)
    lines = read_lines(out)

    def column(name: str) -> Tensor:
        return torch.tensor([line[name] for line in lines], dtype=torch.float64)

    size = float(scores.abs().max())
    torch.testing.assert_close(column("score"), scores, rtol=1e-9, atol=1e-10 * size)
    torch.testing.assert_close(column("standard_error"), products.std(dim=1) / 5**0.5, rtol=1e-9, atol=1e-10 * size)
    torch.testing.assert_close(column("redundancy"), redundancies(pool_rows, scores), rtol=1e-8, atol=1e-10)
    lengths = pool_rows.norm(dim=1) * target_rows.mean(dim=0).norm()
    torch.testing.assert_close(column("cosine"), scores / lengths, rtol=1e-8, atol=1e-10)
    assert column("rank").tolist() == [1 + int((scores > score).sum()) for score in scores]
    assert not column("sketch_error").any()
    assert [line["source"] for line in lines] == [record["source"] for record in text_records(12, seed=1)]
    assert [line["id"] for line in lines] == [f"pool/{number}" for number in range(12)]
    assert found.records == found.ranked == 12
    assert [line["rank"] for line in found.best] == list(range(1, 11))
    assert [line["rank"] for line in found.worst] == list(range(12, 2, -1))


def test_sketches_keep_to_their_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    with precision(torch.float64):
        model = prepared("last block", tmp_path)
        whole = read_lines(score_pool(model, byte_tokenizer(), *files, tmp_path / "whole", options=quiet(None))[0])
        out, _ = score_pool(model, byte_tokenizer(), *files, tmp_path / "sketched", options=quiet(256))
    off = torch.tensor(
        [(a["score"] - b["score"]) / b["sketch_error"] for a, b in zip(whole, read_lines(out), strict=True)]
    )
    assert (off != 0).all()
    assert float(off.abs().max()) < 4.0  # in units of the largest standard error
    assert float(off.square().mean().sqrt()) < 1.5
    assert (tmp_path / "sketched" / "gradients.bin").stat().st_size == 12 * 256 * 8


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(RANKED_BY))
def test_ranks_and_redundancy_hold_for_any_rows(
    tmp_path_factory: pytest.TempPathFactory, n: int, m: int, compared: int, seed: int, by: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, 8, dtype=torch.float64, generator=generator)
    drawn[n // 2] = drawn[0]  # the same direction twice
    drawn[n // 3] = 0.0
    folder = tmp_path_factory.mktemp("rows")
    rows = Rows(folder / "rows", width=8, dtype=torch.float64)
    rows.append(drawn)
    rows.append(torch.full((1, 8), torch.nan, dtype=torch.float64))
    records = [{"id": str(at), "source": "s", "loss": 0.0, "begins": ""} for at in range(n + 1)]
    target = torch.randn(m, 8, dtype=torch.float64, generator=generator)
    found = rank_records(rows, records, target, folder / "scored", sketch_error=0.0, compared=compared, by=by)
    lines = read_lines(folder / "scored")
    assert found.ranked == n
    assert found.records == n + 1
    assert lines[-1]["rank"] is None
    assert lines[-1]["score"] is None
    ranked = sorted(lines[:-1], key=lambda line: line["rank"])
    assert [line["rank"] for line in ranked] == list(range(1, n + 1))
    assert all(a[by] >= b[by] - 1e-12 for a, b in pairwise(ranked))
    assert all(0.0 <= line["redundancy"] <= 1.0 for line in ranked)
    assert ranked[0]["redundancy"] == 0.0
    assert (ranked[0]["standard_error"] is None) == (m == 1)
    pair = [lines[0], lines[n // 2]]
    if n // 3 not in (0, n // 2) and n // 2 > 0 and min(line["rank"] for line in pair) <= compared:
        assert max(pair, key=lambda line: line["rank"])["redundancy"] == pytest.approx(1.0)


@pytest.mark.parametrize("layout", ["one group", "as a Trainer", "named"])
def test_a_given_state_finds_its_parameters(layout: str, tmp_path: Path) -> None:
    model = small_llama()
    parameters = trained(model)
    decayed = [name for name in parameters if "norm" not in name]
    orders = {"one group": [list(parameters)], "as a Trainer": [decayed, [n for n in parameters if n not in decayed]]}
    order = orders.get(layout, [list(reversed(parameters))])
    groups = [
        {"params": [(name, parameters[name]) if layout == "named" else parameters[name] for name in names], "lr": 1e-5}
        for names in order
    ]
    adamw = torch.optim.AdamW(groups)
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    adamw.step()
    torch.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    for path in (tmp_path, tmp_path / "optimizer.pt"):
        found = given_state(model, parameters, path)
        assert {group["lr"] for group in found.param_groups} == {1e-5}
        for number, parameter in enumerate(parameters.values()):
            torch.testing.assert_close(
                found.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1 * (number + 1))
            )


def test_a_given_state_is_what_gradients_are_compared_by(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Twice the root of the second moment and no new gradient to speak of: half of each score."""
    found = []
    with precision(torch.float64):
        for times in (1.0, 4.0):
            model = prepared("last block", tmp_path)
            parameters = trained(model)
            adamw = torch.optim.AdamW(parameters.values(), lr=1e-3)
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            adamw.step()
            for state in adamw.state.values():
                state["exp_avg_sq"] += 1e6 * times
                state["step"] += 10_000
            path = tmp_path / f"{times}.pt"
            torch.save(adamw.state_dict(), path)
            for name, value in small_llama().state_dict().items():
                model.state_dict()[name].copy_(value)
            options = Options(dim=None, warm_up=1, max_length=64, optimizer_state=path, say=lambda line: None)
            out, _ = score_pool(model, byte_tokenizer(), *files, tmp_path / f"out{times}", options=options)
            found.append(torch.tensor([line["score"] for line in read_lines(out)]))
    torch.testing.assert_close(found[1], found[0] / 2, rtol=1e-5, atol=0.0)
