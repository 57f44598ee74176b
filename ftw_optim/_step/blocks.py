"""Predicates for the option ``scored``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import nn


@final
@dataclass(frozen=True)
class InBlocks:
    """Accepts the parameters below the named blocks; made by :func:`last_blocks` and :func:`spread_blocks`."""

    blocks: tuple[str, ...]

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the parameter is in one of the blocks."""
        return name.startswith(self.blocks)


def last_blocks(model: nn.Module, count: int) -> InBlocks:
    """A predicate for ``scored`` that accepts the last repeated blocks of a model, without embeddings and head.

    The blocks are the children of the largest stack in the model: the ``ModuleList`` or ``Sequential`` of modules of
    one kind that holds most parameters. Of several similar ones, such as an encoder's and a decoder's, it is the last.

    Args:
        model: a model with a stack of blocks, such as any Transformer.
        count: number of blocks, counted from the end.

    Returns:
        ``(name, parameter) -> bool``.

    Raises:
        ValueError: there is no such stack, or it has fewer blocks.
    """
    stack = _Stack.of(model, count)
    return stack.pick(range(stack.length - count, stack.length))


def spread_blocks(model: nn.Module, count: int) -> InBlocks:
    """A predicate for ``scored`` that accepts blocks spread evenly over a model's depth, without embeddings and head.

    The middle one of each of ``count`` equal parts of the stack that :func:`last_blocks` describes: of 30 blocks, 4 are
    3, 11, 18 and 26, counted from 0. They cost less than all blocks to compare by, and see more of the model than its
    end.

    Args:
        model: a model with a stack of blocks, such as any Transformer.
        count: number of blocks.

    Returns:
        ``(name, parameter) -> bool``.

    Raises:
        ValueError: there is no such stack, or it has fewer blocks.
    """
    stack = _Stack.of(model, count)
    return stack.pick((2 * part + 1) * stack.length // (2 * count) for part in range(count))


@dataclass(frozen=True)
class _Stack:
    """The repeated blocks of a model: the name of what holds them, and how many there are."""

    name: str
    length: int

    def pick(self, places: Iterable[int]) -> InBlocks:
        """A predicate for some of the blocks."""
        prefix = f"{self.name}." if self.name else ""
        return InBlocks(tuple(f"{prefix}{place}." for place in places))

    @classmethod
    def of(cls, model: nn.Module, count: int) -> _Stack:
        """The largest stack, if it has as many blocks as are asked for."""
        stacks = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and _are_alike([type(block) for block in module]):
                size = sum(parameter.numel() for parameter in module.parameters())
                if size:
                    stacks[name] = (size, len(module))
        if not stacks:
            raise ValueError(
                "Expected a stack of repeated blocks (a ModuleList or Sequential of one class) in "
                f"{type(model).__name__}, found none. Give scored= a predicate (name, parameter) -> bool of your own."
            )
        largest = max(size for size, _ in stacks.values())
        # A decoder has cross-attention that its encoder lacks, and is the last one all the same.
        name = [name for name, (size, _) in stacks.items() if 2 * size >= largest and not _inside(name, stacks)][-1]
        length = stacks[name][1]
        if not 1 <= count <= length:
            raise ValueError(f"count must be from 1 to the {length} blocks of {name!r}, got {count!r}.")
        return cls(name, length)


def _are_alike(classes: list[type]) -> bool:
    """Whether some blocks share a class or a base class beside ``Module``: hybrid models mix attention and mixers."""
    common = set.intersection(*(set(cls.__mro__) for cls in classes)) if classes else set()
    return bool(common - set(nn.Module.__mro__))


def _inside(name: str, stacks: dict[str, tuple[int, int]]) -> bool:
    """Whether a stack lies inside of another one, as the experts of a block do."""
    return any(name != other and name.startswith(f"{other}." if other else "") for other in stacks)
