"""Which parameters ``last_blocks`` and ``spread_blocks`` accept."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ftw_optim import last_blocks, spread_blocks
from tests.support.models import SmallGPT, transformers_model


def accepted(model: nn.Module, count: int) -> set[str]:
    predicate = last_blocks(model, count)
    return {name for name, parameter in model.named_parameters() if predicate(name, parameter)}


def test_the_last_blocks_are_those_at_the_end_of_the_stack() -> None:
    model = SmallGPT(depth=12)
    names = [name for name, _ in model.named_parameters()]
    assert accepted(model, 1) == {name for name in names if name.startswith("blocks.11.")}
    assert accepted(model, 11) == {
        name for name in names if name.startswith("blocks.") and not name.startswith("blocks.0.")
    }


@pytest.mark.parametrize(
    ("family", "lora", "prefix"),
    [
        ("llama", False, "model.layers.1."),
        ("gpt2", False, "transformer.h.1."),
        ("llama", True, "base_model.model.model.layers.1."),
    ],
)
def test_the_stack_is_found_in_model_families_and_under_peft(family: str, lora: bool, prefix: str) -> None:
    import torch

    model = transformers_model(family, lora=lora)(torch.float32, 2).model
    found = accepted(model, 1)
    assert found
    assert found == {name for name, _ in model.named_parameters() if name.startswith(prefix)}


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.decoder = nn.ModuleList(Experts() for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def test_stacks_inside_blocks_do_not_count_and_of_two_the_last_does() -> None:
    names = {name for name, _ in EncoderDecoder().named_parameters()}
    assert accepted(EncoderDecoder(), 2) == {name for name in names if name.startswith(("decoder.1.", "decoder.2."))}


def test_counts_and_models_that_do_not_fit_are_refused() -> None:
    for count in (0, 3):
        with pytest.raises(ValueError, match="count must be from 1 to the 2 blocks of 'blocks'"):
            last_blocks(SmallGPT(), count)
        with pytest.raises(ValueError, match="count must be from 1 to the 2 blocks of 'blocks'"):
            spread_blocks(SmallGPT(), count)
    with pytest.raises(ValueError, match="Expected a stack of repeated blocks"):
        last_blocks(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="Expected a stack of repeated blocks"):
        spread_blocks(nn.Linear(2, 2), 1)


def stack(depth: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(depth))})


def test_few_blocks_are_spread_over_the_depth() -> None:
    assert spread_blocks(stack(30), 4).blocks == ("layers.3.", "layers.11.", "layers.18.", "layers.26.")
    assert spread_blocks(stack(5), 1).blocks == ("layers.2.",)


@given(data=st.data(), depth=st.integers(1, 40))
def test_spread_blocks_are_as_many_as_asked_for_at_even_distances(data: st.DataObject, depth: int) -> None:
    count = data.draw(st.integers(1, depth))
    places = [int(block.split(".")[1]) for block in spread_blocks(stack(depth), count).blocks]
    assert len(set(places)) == count
    assert places == sorted(places)
    steps = [later - earlier for earlier, later in itertools.pairwise(places)]
    assert not steps or max(steps) - min(steps) <= 1
    # As far from both ends, but for rounding.
    assert abs(places[0] - (depth - 1 - places[-1])) <= 1


def test_blocks_of_two_classes_of_one_kind_are_one_stack() -> None:
    """As in hybrid models, whose attention layers and mixers have a common parent."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    class Attention(Layer):
        pass

    class Mixer(Layer):
        pass

    model = nn.ModuleDict({"layers": nn.ModuleList([Mixer(), Attention(), Mixer()]), "head": nn.Linear(2, 2)})
    assert last_blocks(model, 2).blocks == ("layers.1.", "layers.2.")
