"""The output layer on label positions only: the same losses and gradients as on all positions, or on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftw_optim import KeepAll, NonNegativeLeastSquares, SelectiveOptimizer, token_losses
from ftw_optim._step.label_head import label_logits
from tests.support.families import SIZES, seeded
from tests.support.models import precision, with_lora

CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 4, "tie_word_embeddings": True},
    "Gemma": {"head_dim": 4},
    "Gemma2": {"head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 0.1},
    "Mistral": {},
    "Phi": {},
    "Phi3": {},
    "StableLm": {},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "Olmo2": {},
    "GPTNeoX": {},
    "Starcoder2": {},
}


def model_of(name: str) -> nn.Module:
    import transformers  # here, since importing it takes seconds

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **CAUSAL[name]})
    model: nn.Module = seeded(lambda: getattr(transformers, f"{name}ForCausalLM")(config))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.double().train()


def batch_of(n: int = 4, t: int = 9, *, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of several lengths without labels, one row with padding, and one without any label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (n, t), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, t - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for row in range(n):
        labels[row, : 2 + 2 * row] = -100
    labels[n - 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Sizes:
    """The number of positions that a model's output layer ran on, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[int] = []
        layer = model.get_output_embeddings()  # type: ignore[operator]
        layer.register_forward_hook(lambda module, args, output: self.seen.append(output.shape[:-1].numel()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained head", "lora"])
@pytest.mark.parametrize("name", CAUSAL)
def test_losses_and_selection_are_those_of_all_positions(name: str, kind: str) -> None:
    model, batch = model_of(name), batch_of()
    if kind == "lora":
        model = seeded(lambda: with_lora(model)).double().train()
    sizes, selected = Sizes(model), []
    for head in ("all", "labels"):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            model,
            lambda head=head: token_losses(model, batch_of(seed=1), head=head)[:3],
            metric="euclidean",
            filter=KeepAll(),
            weight=NonNegativeLeastSquares(),
        )
        with precision(torch.float64):
            losses = token_losses(model, batch, head=head)
            optimizer.backward(lambda head=head: token_losses(model, batch, head=head))
        selected.append((losses, optimizer.selection.gram, optimizer.selection.cross_gram))
        for parameter in model.parameters():
            parameter.grad = None
    assert min(sizes.seen) < batch["labels"].numel() / 2, "nothing was left out"
    for one, other in zip(*selected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["token_mean", "token_sum"])
def test_it_is_what_a_model_gets_that_allows_it(reduction: str) -> None:
    model, batch = model_of("Llama"), batch_of()
    sizes = Sizes(model)
    found = token_losses(model, batch, reduction=reduction, head="auto")
    assert sizes.seen[-1] == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(found, token_losses(model, batch, reduction=reduction, head="all"))


class Model(nn.Module):
    """A small model whose logits go through a function."""

    def __init__(self, after: Any = None, *, calls: int = 1, find: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 6), nn.Linear(6, 40)
        self.after, self.calls, self.find = after, calls, find

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if self.find else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        for _ in range(self.calls):
            logits: Tensor = self.head(self.embed(input_ids).cumsum(1))
        return logits if self.after is None else self.after(logits)


NOT_ALLOWED: Mapping[str, Model] = {
    "a softmax over positions": Model(lambda x: x.softmax(1)),
    "a running sum": Model(lambda x: x.cumsum(1)),
    "the mean over all": Model(lambda x: x - x.mean()),
    "a bias of each position": Model(lambda x: x + torch.arange(9.0)[:, None]),
    "a shift": Model(lambda x: x.roll(1, 1)),
    "a normalisation over the batch": Model(lambda x: x / x.norm()),
    "an output layer that runs twice": Model(calls=2),
    "no output layer": Model(find=False),
    "several rows for a position": Model(lambda x: x.repeat(2, 1, 1)[: len(x)] if len(x) > 1 else x.repeat(2, 1, 1)),
}


@pytest.mark.parametrize("kind", NOT_ALLOWED)
def test_a_model_that_does_more_with_positions_keeps_all(kind: str) -> None:
    torch.manual_seed(0)
    model, batch = NOT_ALLOWED[kind], batch_of()
    state = torch.get_rng_state()
    found = token_losses(model, batch, head="auto")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, token_losses(model, batch))
    with pytest.raises(ValueError, match=r'head="labels" needs another model: .*head="all"'):
        token_losses(model, batch, head="labels")


def test_dropout_draws_the_same_whether_or_not_positions_are_chosen() -> None:
    class Dropping(Model):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.head(nn.functional.dropout(self.embed(input_ids), 0.5))
            return logits if self.after is None else self.after(logits)

    for after in (None, lambda x: x - x.mean(1, keepdim=True)):
        found = []
        model = seeded(lambda: Dropping(after))  # noqa: B023
        for head in ("all", "auto", "auto"):
            torch.manual_seed(3)
            found.append(token_losses(model, batch_of(), head=head))
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[0], found[2])


class Flat(nn.Module):
    """A trained layer behind the output layer, which runs on all positions of all rows in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(0, 1))
        return y.view(*x.shape[:2], 40)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 40))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Shifted(Model):
    """Positions that the whole model owns, before the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 180).view(30, 6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids).cumsum(1) + self.shift[: input_ids.shape[1]])
        return logits


class Around(nn.Module):
    """A bias around the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.bias = nn.Linear(6, 40, bias=False), nn.Parameter(torch.linspace(-1, 1, 40))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(x)
        return y + self.bias


class Biased(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = Around()  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder  # type: ignore[return-value]


class Gated(Model):
    """A mixture of positions that is nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids).cumsum(1))
        return logits + self.gate * logits.cumsum(1)


class Inside(Model):
    """The output layer in a checkpoint."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            logits: Tensor = self.head(x.cumsum(1).tanh())
            return logits

        logits: Tensor = checkpoint(run, self.embed(input_ids), use_reentrant=self.reentrant)
        return logits


KEEP_ALL: Mapping[str, Callable[[], Model]] = {
    "a layer on flattened positions": lambda: Model(Flat()),
    "a norm": lambda: Model(nn.LayerNorm(40)),
    "a scale": lambda: Model(Scaled()),
    "a parameter of the whole model": Shifted,
    "a module around": Biased,
    "a gate that is shut": Gated,
    "a checkpoint": lambda: Inside(reentrant=False),
    "a reentrant checkpoint": lambda: Inside(reentrant=True),
    "a hook before": lambda: _hooked(before=True),
    "a hook behind": lambda: _hooked(before=False),
}


def _hooked(*, before: bool) -> Model:
    model = Model()
    if before:
        model.head.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(1, keepdim=True),))
    else:
        model.head.register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True))
    return model


@pytest.mark.parametrize("combine", ["factors", "graph"])
@pytest.mark.parametrize("kind", KEEP_ALL)
def test_training_is_the_same_where_only_the_graph_shows_that_positions_matter(kind: str, combine: str) -> None:
    """Steps with equal numbers of labels first, and then with others."""
    runs = []
    for head in ("all", "auto"):
        model = seeded(KEEP_ALL[kind]).double()
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            lambda head=head, model=model: token_losses(model, labelled([2, 3], seed=9), head=head),
            metric="euclidean",
            filter=KeepAll(),
            combine=combine,
        )
        grams = []
        for counts in ([2, 2, 2, 2], [1, 3, 2, 2], [5, 1, 1, 1]):
            batch = labelled(counts, seed=counts[0])
            optimizer.step(lambda head=head, model=model, batch=batch: token_losses(model, batch, head=head))
            assert optimizer.selection is not None
            grams.append(optimizer.selection.gram)
        runs.append((grams, dict(model.named_parameters())))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-12)


def labelled(counts: list[int], *, seed: int) -> dict[str, Tensor]:
    """Rows with so many labels, at their ends."""
    ids = torch.randint(40, (len(counts), 9), generator=torch.Generator().manual_seed(seed))
    late = torch.arange(9) >= 9 - torch.tensor(counts)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(late, torch.tensor(-100))}


class Varying(Model):
    """What it does with positions depends on its inputs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        hidden = self.embed(input_ids).cumsum(1)
        if "keep" in options:
            hidden = hidden[:, -options["keep"] :]
        if "chunk" in options:
            return torch.cat([self.head(one) for one in hidden.split(options["chunk"], dim=1)], dim=1)
        logits: Tensor = self.head(hidden)
        if "bias" in options:
            logits = logits + options["bias"]
        return logits / options["heat"][:, None, None] if "heat" in options else logits


@pytest.mark.parametrize("options", ["chunk", "bias", "heat"])
def test_a_later_batch_may_show_that_positions_matter(options: str) -> None:
    """As many labels as positions, so that a bias for each position would fit both."""
    model, batch = seeded(Varying), labelled([4, 2, 1, 2], seed=0)
    token_losses(model, batch)
    more = {"chunk": 4, "bias": torch.arange(9.0)[:, None], "heat": torch.tensor([0.5, 1.0, 2.0, 4.0])}[options]
    found = token_losses(model, {**batch, options: more})
    torch.testing.assert_close(found, token_losses(model, {**batch, options: more}, head="all"))
    torch.testing.assert_close(token_losses(model, batch), token_losses(model, batch, head="all"))


def test_logits_of_fewer_positions_than_labels_are_refused_as_without() -> None:
    model, batch = seeded(Varying), labelled([4], seed=0)
    token_losses(model, batch)
    for head in ("all", "auto"):
        with pytest.raises(ValueError, match="Expected logits"):
            token_losses(model, {**batch, "keep": 4}, head=head)


def test_a_batch_that_fails_says_nothing_of_the_model() -> None:
    model, batch = seeded(Model), labelled([4, 2, 1, 2], seed=0)
    for head in ("auto", "labels"):
        with pytest.raises((IndexError, ValueError)):
            token_losses(model, {**batch, "input_ids": batch["input_ids"] + 40}, head=head)
    sizes = Sizes(model)
    token_losses(model, batch, head="labels")
    assert sizes.seen == [9]


def test_an_output_layer_that_is_exchanged_is_looked_at_anew() -> None:
    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.cumsum(1))

    model, batch = seeded(Model), labelled([4, 2, 1, 2], seed=0)
    token_losses(model, batch)
    model.head = Mixing(6, 40)
    torch.testing.assert_close(token_losses(model, batch), token_losses(model, batch, head="all"))


def test_without_gradients_all_positions_are_run() -> None:
    model, batch = seeded(Model), labelled([4, 2, 1, 2], seed=0)
    sizes = Sizes(model)
    with torch.no_grad():
        token_losses(model, batch)
    assert sizes.seen == [36]


def test_rows_packed_from_several_candidates_keep_theirs() -> None:
    model = seeded(Model).double()
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 4, 4, 4, -1]])
    targets = ids.roll(-1, 1).masked_fill(torch.arange(18).view(2, 9) % 3 == 1, -100).masked_fill(documents < 0, -100)

    def losses(head: str) -> Tensor:
        starts = torch.tensor([[True, False, False, True, False, False, False, True, False]])

        def run() -> Tensor:
            hidden = model.embed(ids)  # each token by itself, so that documents do not leak
            logits: Tensor = model.head(torch.where(starts[..., None], hidden, hidden.sin()))
            return logits

        values, _ = label_logits(model, run, targets, head).losses()
        owners = documents.where(documents >= 0, 5).flatten()
        return values.new_zeros(6).index_add(0, owners, values.flatten())[:5]

    found = []
    for head in ("all", "labels"):
        optimizer = SelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, lambda: losses("all")[:2], metric="euclidean"
        )
        optimizer.backward(lambda head=head: losses(head), sample_ids=documents)
        found.append(optimizer.selection.gram)
    torch.testing.assert_close(found[0], found[1])


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head must be one of 'auto', 'labels', 'all', got 'some'"):
        token_losses(Model(), batch_of(), head="some")
