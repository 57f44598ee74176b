"""Models that FSDP2 shards: what it leaves behind, what others set on it, and what cannot be right in shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

from ftw_optim import GreedyFilter, KeepAll, SelectiveOptimizer, UniformWeights
from ftw_optim._capture.owners import owners
from ftw_optim._layers.linear import linear
from ftw_optim._layers.registry import LayerRule
from ftw_optim._ranks import owners as ranks_owners
from ftw_optim._ranks import scattering
from ftw_optim._ranks.scattering import Scattered
from tests.support.grids import slow
from tests.support.processes import Failure, Processes
from tests.support.rank_runs import CANDIDATES, TARGETS, Net, made, mesh_of, rows_of, sharded, whole


class Tied(Net):
    """The last layer and the embedding are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 11)
        self.first = nn.Linear(11, 11)
        self.last = nn.Linear(11, 23, bias=False)
        self.last.weight = self.embedding.weight


class Checkpointed(Net):
    """The first layer runs again in the backward pass."""

    reentrant = False

    def forward(self, tokens: Tensor, *, rare: bool = False) -> Tensor:
        hidden = checkpoint(self.first, self.embedding(tokens), use_reentrant=self.reentrant)
        hidden = self.norm(torch.tanh(hidden))
        return self.last(hidden + self.rare(hidden) if rare else hidden)


class Reentrant(Checkpointed):
    reentrant = True


class Frozen(Net):
    """The embedding is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.requires_grad_(False)


def _whole_group(net: nn.Module) -> None:
    fully_shard(net, mesh=mesh_of((dist.get_world_size(),)))


def _layers(net: nn.Module, **settings: Any) -> None:
    sharded(net, (dist.get_world_size(),), **settings)


def _other_divisor(net: nn.Module) -> None:
    _layers(net)
    net.set_gradient_divide_factor(1.0)
    net.set_force_sum_reduction_for_comms(True)


WAYS: dict[str, tuple[type[Net], Callable[[nn.Module], None]]] = {
    "one group": (Net, _whole_group),
    "tied": (Tied, _whole_group),
    "checkpointed": (Checkpointed, _layers),
    "frozen": (Frozen, _layers),
    "divided by others": (Net, _other_divisor),
}


def steps(
    kind: type[Net],
    shard: Callable[[nn.Module], None] | None,
    *,
    evaluate: bool = False,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float = 1e-2,
    bursts_at: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A job of four steps, or what one process does with all candidates.

    Args:
        kind: of the model.
        shard: shards it; None: one process.
        evaluate: whether the model is run without gradients before every step.
        optimizer: the inner one.
        lr: its learning rate.
        bursts_at: a step that is made once more, after a backward pass through all layers that failed.
        options: of the selective optimizer.
    """
    torch.manual_seed(3)
    net = kind().double()
    candidates = CANDIDATES[:2].flatten(0, 1)
    if shard is not None:
        shard(net)
        candidates = CANDIDATES[dist.get_rank()]
    inner: Any = optimizer
    selective = SelectiveOptimizer(
        inner([p for p in net.parameters() if p.requires_grad], lr=lr),
        net,
        lambda: rows_of(net, TARGETS, rare=True),
        **{"filter": GreedyFilter(keep=3), **options},
    )

    def losses(rows: Tensor | None = None) -> Tensor:
        return rows_of(net, candidates if rows is None else candidates[rows], rare=True)

    grams = []
    for number in range(4):
        if evaluate:
            with torch.no_grad():
                rows_of(net, TARGETS)
        if number == bursts_at:
            Bursting.now, selective.scored = True, None
            with pytest.raises(ValueError, match="burst"):
                selective.backward(losses)
            Bursting.now, selective.scored = False, options.get("scored")
        selective.step(losses)
        assert selective.selection is not None
        grams.append(selective.selection.gram)
    return {"grams": grams, "parameters": [whole(p.detach()).clone() for p in net.parameters()]}


@pytest.mark.parametrize("combine", ["factors", slow("graph")])
@pytest.mark.parametrize("way", [name if name == "tied" else slow(name) for name in WAYS])
def test_shards_of_all_kinds_are_one_model(way: str, combine: str, two_processes: Processes) -> None:
    kind, shard = WAYS[way]
    found = two_processes.run(steps, kind, shard)
    _same(found, steps(kind, None))


def test_an_evaluation_between_steps_leaves_nothing_behind(two_processes: Processes) -> None:
    _same(two_processes.run(_evaluating), steps(Net, None, evaluate=True))


def _evaluating() -> dict[str, Any]:
    return steps(Net, _layers, evaluate=True)


def _same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for one in found:
        for gram, other in zip(one["grams"], expected["grams"], strict=True):
            torch.testing.assert_close(gram, other, rtol=1e-11, atol=1e-14)
        for value, other in zip(one["parameters"], expected["parameters"], strict=True):
            torch.testing.assert_close(value, other, rtol=1e-11, atol=1e-12)


def in_small_buckets(combine: str) -> dict[str, Any]:
    """A job in which every parameter is sent for itself, and the most bytes of gradients that waited to be sent."""
    most, add = [0], Scattered.add

    def noting(self: Scattered, name: str, whole: Tensor) -> None:
        most[0] = max(most[0], self._bytes + whole.nbytes)
        add(self, name, whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scattering, "BUCKET", 800)
        patch.setattr(ranks_owners, "BUCKET", 800)
        patch.setattr(Scattered, "add", noting)
        return {**steps(Net, _layers, combine=combine), "most": most[0]}


@pytest.mark.parametrize("combine", ["graph", slow("factors"), slow("rerun")])
def test_gradients_in_many_buckets_are_the_same_and_never_many_at_once(combine: str, two_processes: Processes) -> None:
    found = two_processes.run(in_small_buckets, combine)
    _same(found, steps(Net, None))
    largest = max(p.numel() * 8 for p in Net().parameters())
    assert all(one["most"] <= 800 + largest for one in found)
    assert all(one["most"] > 0 for one in found)


class SignOfMean(torch.optim.Optimizer):
    """An optimizer that no rule knows: steps along a running mean, scaled by its running size."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                size = state.setdefault("size", torch.zeros_like(parameter))
                size.mul_(0.9).add_(parameter.grad.square(), alpha=0.1)
                parameter.add_(parameter.grad / (size.sqrt() + 1e-3), alpha=-group["lr"])


def with_another_optimizer(alone: bool = False) -> dict[str, Any]:
    """A job of steps with an optimizer that is tried out."""
    return steps(Net, None if alone else _layers, optimizer=SignOfMean)


def test_an_optimizer_that_is_tried_out_is_tried_on_whole_parameters(two_processes: Processes) -> None:
    _same(two_processes.run(with_another_optimizer), with_another_optimizer(alone=True))


class Bursting(torch.autograd.Function):
    """Fails in its backward pass when it is told to."""

    now = False

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if Bursting.now:
            raise ValueError("burst")
        return gradient


class Burst(Net):
    """A model whose backward pass may fail in its middle."""

    def forward(self, tokens: Tensor, *, rare: bool = False) -> Tensor:
        hidden = self.norm(torch.tanh(Bursting.apply(self.first(self.embedding(tokens)))))
        return self.last(hidden + self.rare(hidden) if rare else hidden)


def after_a_burst(alone: bool = False) -> dict[str, Any]:
    """A job whose second step fails in its backward pass at first, with what the steps after that do."""
    # What FSDP2 keeps of the pass that failed are whole parameters, of layers that no later pass of scores comes to.
    options: dict[str, Any] = {"combine": "graph", "scored": _of_the_last_layer, "bursts_at": None if alone else 1}
    return steps(Burst, None if alone else _layers, optimizer=torch.optim.SGD, lr=0.3, **options)


def _of_the_last_layer(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("last")


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"),
    reason="FSDP2 of torch 2.8 takes no pass after one that failed, and says so",
)
def test_steps_after_a_backward_pass_that_failed_are_right(two_processes: Processes) -> None:
    _same(two_processes.run(after_a_burst), after_a_burst(alone=True))


def plain_or_kept_whole(plain: bool, combine: str) -> list[Tensor]:
    """A job of FSDP2's own training, or of a selection that keeps all rows alike."""
    torch.manual_seed(3)
    net = Net().double()
    _layers(net)
    candidates = CANDIDATES[dist.get_rank()]
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    selective = SelectiveOptimizer(
        inner,
        net,
        lambda: rows_of(net, TARGETS, rare=True),
        filter=KeepAll(),
        weight=UniformWeights(),
        combine=combine,
    )
    for _ in range(3):
        if plain:
            inner.zero_grad()
            rows_of(net, candidates, rare=True).mean().backward()
            inner.step()
        else:
            selective.step(lambda rows=None: rows_of(net, candidates if rows is None else candidates[rows], rare=True))
    return [whole(p.detach()).clone() for p in net.parameters()]


@pytest.mark.parametrize("combine", ["factors", slow("graph"), slow("rerun")])
def test_with_all_kept_alike_it_is_fsdps_own_training(combine: str, two_processes: Processes) -> None:
    plain, kept = (two_processes.run(plain_or_kept_whole, way, combine)[0] for way in (True, False))
    for one, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def short(policy: bool) -> dict[str, Any]:
    """A job in float32, computed in bfloat16 where FSDP2 is told so."""
    torch.manual_seed(3)
    net = Net()
    settings = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)}
    _layers(net, **(settings if policy else {}))
    candidates = CANDIDATES[dist.get_rank()]
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW(net.parameters(), lr=1e-2), net, lambda: rows_of(net, TARGETS), combine="graph"
    )
    optimizer.backward(lambda: rows_of(net, candidates))
    assert optimizer.selection is not None
    return {
        "gram": optimizer.selection.gram,
        "dtypes": {p.grad.dtype for p in net.parameters() if p.grad is not None},
    }


def test_mixed_precision_changes_the_products_by_its_rounding_alone(two_processes: Processes) -> None:
    exact, rounded = (two_processes.run(short, policy)[0] for policy in (False, True))
    assert rounded["dtypes"] == {torch.float32}
    size = float(exact["gram"].diagonal().max())
    difference = float((exact["gram"] - rounded["gram"]).abs().max()) / size
    assert 0.0 < difference < 5e-2


def corrupted() -> None:
    """A job whose rule for linear layers is wrong by a tenth."""
    _model, optimizer, losses = made(shards=True)
    rules = {id(one.rule): one.rule for one in owners(optimizer._structure.of(optimizer.model))}
    linears: list[Any] = [rule for rule in rules.values() if isinstance(rule, LayerRule) and rule.function is linear]
    for rule in linears:
        object.__setattr__(rule, "function", _wrong)
    try:
        optimizer.step(losses)
    finally:
        for rule in linears:
            object.__setattr__(rule, "function", linear)


def _wrong(module: nn.Module, inputs: tuple[Any, ...], output_grad: Tensor) -> Any:
    return linear(module, inputs, 1.1 * output_grad)


def test_the_self_check_sees_shards(two_processes: Processes) -> None:
    for one in two_processes.outcomes(corrupted):
        assert isinstance(one, Failure)
        assert one.kind == "RuntimeError", one.text
        assert "autograd" in one.text


class Attending(Net):
    """A layer that is run again for its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(11, 1, batch_first=True)

    def forward(self, tokens: Tensor, *, rare: bool = False) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(self.embedding(tokens))))
        return self.last(self.attention(hidden, hidden, hidden, need_weights=False)[0])


def refused(what: str) -> None:
    """A job that is refused by name."""
    torch.manual_seed(3)
    net: nn.Module = {"attention": Attending, "reentrant": Reentrant}.get(what, Net)()
    count = dist.get_world_size()
    if what == "no fsdp":
        mesh = mesh_of((count,))
        net.first.weight = nn.Parameter(distribute_tensor(net.first.weight.detach(), mesh))
    elif what == "another axis":
        net.unused = nn.Linear(4, 4)
        fully_shard(net, mesh=mesh_of((count,)), shard_placement_fn=_second_axis)
    else:
        _layers(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        candidates = CANDIDATES[dist.get_rank()]
        optimizer = SelectiveOptimizer(torch.optim.AdamW(net.parameters()), net, lambda: rows_of(net, TARGETS))
        optimizer.step(lambda: rows_of(net, candidates))


def _second_axis(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(1) if parameter.shape == (4, 4) else None


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("attention", "is run again for the gradients of attention."),
        slow("reentrant", "use_reentrant=False"),
        slow("no fsdp", "a DTensor without fully_shard"),
        slow("another axis", "divided along its first axis"),
    ],
)
def test_what_cannot_be_right_in_shards_is_refused_by_name(what: str, said: str, two_processes: Processes) -> None:
    for one in two_processes.outcomes(refused, what):
        assert isinstance(one, Failure)
        assert one.kind == "NotImplementedError"
        assert said in one.text


def resumed(directory: str, number: int, read: bool) -> dict[str, Any]:
    """A job of some steps, from a checkpoint where one is to be read; another is written."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    torch.manual_seed(3)
    net = Net().double()
    net.unused.requires_grad_(False)  # a parameter without state has none to read either
    if several:
        _layers(net)
    # All ranks together have the same candidates, however many they are.
    ranks, own = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
    candidates = CANDIDATES.flatten(0, 1).tensor_split(ranks)[own]
    optimizer = SelectiveOptimizer(
        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2),
        net,
        lambda: rows_of(net, TARGETS, rare=True),
        filter=GreedyFilter(keep=3),
    )
    if read:
        state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
        load(state, checkpoint_id=f"{directory}/{number - 1}")
        set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for _ in range(2):
        optimizer.step(lambda: rows_of(net, candidates, rare=True))
    state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
    save(state, checkpoint_id=f"{directory}/{number}")
    return {
        "selections": optimizer.selections,
        "parameters": [whole(p.detach()).clone() for p in net.parameters()],
    }


@pytest.mark.slow
def test_checkpoints_go_from_two_processes_to_four_and_to_one(
    tmp_path: Path, two_processes: Processes, four_processes: Processes
) -> None:
    for number, processes in enumerate((two_processes, four_processes)):
        processes.run(resumed, str(tmp_path), number, number > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        last = resumed(str(tmp_path), 2, True)
        (tmp_path / "alone").mkdir()
        for number in range(3):
            never = resumed(str(tmp_path / "alone"), number, number > 0)
    assert last["selections"] == never["selections"]
    for one, other in zip(last["parameters"], never["parameters"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def copies_that_begin_apart() -> None:
    """A job: HSDP whose second half of the ranks made another model."""
    torch.manual_seed(3)
    net = Net().double()
    if dist.get_rank() >= 2:
        with torch.no_grad():
            net.norm.bias.add_(1e-9)
    sharded(net, (2, 2))
    optimizer = SelectiveOptimizer(torch.optim.AdamW(net.parameters()), net, lambda: rows_of(net, TARGETS))
    optimizer.step(lambda: rows_of(net, CANDIDATES[dist.get_rank()]))


@pytest.mark.slow
def test_copies_of_a_part_that_differ_are_told(four_processes: Processes) -> None:
    for one in four_processes.outcomes(copies_that_begin_apart):
        assert isinstance(one, Failure)
        assert one.kind == "ValueError"
        assert "Expected equal copies of norm.bias and its state, but the part from row" in one.text
