"""Predicates for the option ``scored``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import nn


@final
@dataclass(frozen=True)
class LastBlocks:
    """Accepts the parameters below the named blocks; made by :func:`last_blocks`."""

    blocks: tuple[str, ...]

    def __call__(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the parameter is in one of the blocks."""
        return name.startswith(self.blocks)


def last_blocks(model: nn.Module, count: int) -> LastBlocks:
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
    stacks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and _are_alike([type(block) for block in module]):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size:
                stacks[name] = (size, len(module))
    if not stacks:
        raise ValueError(
            f"Expected a stack of repeated blocks (a ModuleList or Sequential of one class) in {type(model).__name__}, "
            "found none. Give scored= a predicate (name, parameter) -> bool of your own."
        )
    largest = max(size for size, _ in stacks.values())
    # A decoder has cross-attention that its encoder lacks, and is the last one all the same.
    stack = [name for name, (size, _) in stacks.items() if 2 * size >= largest and not _inside(name, stacks)][-1]
    length = stacks[stack][1]
    if not 1 <= count <= length:
        raise ValueError(f"count must be from 1 to the {length} blocks of {stack!r}, got {count!r}.")
    prefix = f"{stack}." if stack else ""
    return LastBlocks(tuple(f"{prefix}{index}." for index in range(length - count, length)))


def _are_alike(classes: list[type]) -> bool:
    """Whether some blocks share a class or a base class beside ``Module``: hybrid models mix attention and mixers."""
    common = set.intersection(*(set(cls.__mro__) for cls in classes)) if classes else set()
    return bool(common - set(nn.Module.__mro__))


def _inside(name: str, stacks: dict[str, tuple[int, int]]) -> bool:
    """Whether a stack lies inside of another one, as the experts of a block do."""
    return any(name != other and name.startswith(f"{other}." if other else "") for other in stacks)
