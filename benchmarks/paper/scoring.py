"""Scores of a causal language model: the most likely choice, and the words of an answer that are accepted."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pays.records import Record
from torch import nn
from transformers import PreTrainedTokenizerBase

from .sources import LETTERS, with_examples

ANSWER_TOKENS = 32
SHOTS = {"mmlu": 5, "tydiqa": 1}


def scorer(
    task: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Record],
    questions: Sequence[Record],
    *,
    batch: int,
    longest: int,
) -> Callable[[], list[float]]:
    """A function that scores each of the questions, between 0 and 1.

    Args:
        task: ``"mmlu"`` or ``"tydiqa"``.
        model: the model, which is trained meanwhile.
        tokenizer: its tokenizer.
        examples: that stand in front of each question, as many as :data:`SHOTS` says.
        questions: what is asked.
        batch: questions at a time.
        longest: tokens of a prompt; of a longer one the beginning is left out.
    """
    prompts = [_tokens(tokenizer, with_examples(one, examples, SHOTS[task]))[-longest:] for one in questions]
    score = _choices if task == "mmlu" else _answers

    @torch.no_grad()
    def scores() -> list[float]:
        found: list[float] = []
        for at in range(0, len(questions), batch):
            found += score(model, tokenizer, prompts[at : at + batch], questions[at : at + batch])
        return found

    return scores


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    # As records are encoded for training: the response stands on a line of its own.
    return list(tokenizer(f"{prompt}\n").input_ids)


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """The prompts side by side, padded on the left, so that what comes next is at the end of each."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    mask = torch.tensor(masks, device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": mask, "position_ids": positions}


def _choices(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], questions: Sequence[Record]
) -> list[float]:
    """1 where the letter of the right choice is the most likely one of its question's letters."""
    inputs = _padded(prompts, next(model.parameters()).device)
    logits = model(**inputs, use_cache=False).logits[:, -1].float().cpu()
    letters = torch.tensor([tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in LETTERS])
    found = []
    for row, question in zip(logits, questions, strict=True):
        offered = letters[: len(question["choices"])]
        found.append(float(int(row[offered].argmax()) == question["answer"]))
    return found


def _answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], questions: Sequence[Record]
) -> list[float]:
    """The F1 of what the model writes, up to the end of the line, with the accepted answer that it is most like."""
    inputs = _padded(prompts, next(model.parameters()).device)
    written: list[list[int]] = [[] for _ in prompts]
    # One token after another, without the options of a generation config, which a checkpoint may bring along.
    for _ in range(ANSWER_TOKENS):
        coming = model(**inputs, use_cache=False).logits[:, -1].argmax(dim=1)
        for row, token in enumerate(coming.tolist()):
            written[row].append(token)
        inputs = {
            "input_ids": torch.cat([inputs["input_ids"], coming[:, None]], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(coming)[:, None]], dim=1),
            "position_ids": torch.cat([inputs["position_ids"], inputs["position_ids"][:, -1:] + 1], dim=1),
        }
        if all(tokenizer.eos_token_id in row for row in written):
            break
    found = []
    for row, question in zip(written, questions, strict=True):
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end]).strip().split("\n")[0]
        found.append(max(f1(text, answer) for answer in question.get("answers") or [question["response"]]))
    return found


def f1(written: str, answer: str) -> float:
    """The harmonic mean of the shares of words that a text and an answer have in common, as TyDiQA is scored."""
    first, second = Counter(words(written)), Counter(words(answer))
    shared = (first & second).total()
    if not shared:
        return float(not first and not second)
    return 2 * shared / (first.total() + second.total())


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation of any script."""
    spaced = "".join(
        " " if character in string.punctuation or unicodedata.category(character).startswith("P") else character
        for character in text.lower()
    )
    return spaced.split()
