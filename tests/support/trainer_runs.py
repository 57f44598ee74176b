"""Tiny models, data and settings that the tests of trainers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ftw_optim import KeepAll, UniformWeights
from ftw_optim.integrations.transformers import SelectiveTrainer
from tests.support.models import with_lora
from tests.support.releases import COUNTS_FIRST_LABEL, named_here

WORDS = [f"w{number}" for number in range(40)]
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "dataloader_pin_memory": False,
}
"""Of every trainer in the tests: one step a log, on the CPU, told to nobody."""
HARD: dict[str, Any] = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "gradient_accumulation_steps": 3,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
}
"""Decay, clipping, a schedule and accumulation, with a last window of each epoch that is not complete."""


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def model(family: str = "qwen3", **changes: Any) -> nn.Module:
    """A random model with a vocabulary for the tokenizer above; the same at each call."""
    settings = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))  # type: ignore[no-any-return]


def examples(count: int, *, seed: int = 0, longest: int = 11) -> list[dict[str, list[int]]]:
    """Ragged sequences, most with a prompt that does not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(4, longest, (), generator=generator))
        ids = torch.randint(3, len(WORDS) + 3, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, 3, (), generator=generator))
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator: padding on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([list(row[key]) + [value] * (longest - len(row[key])) for row in rows])

    masks = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": torch.tensor(masks)}


class Watch(TrainerCallback):
    """Keeps what the trainer sees of each step: ``.grad`` when the optimizer steps, and the parameters after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor | None]] = []
        self.parameters: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in kwargs["model"].named_parameters()}
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parameters.append(
            {n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        )


class Stop(TrainerCallback):
    """Ends training as a kill would: in the middle, after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Recording:
    """A selection log in memory, which outlives the trainers that write it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def record(self, step: int, selection: Any, **columns: Any) -> None:
        self.steps.append({"step": step, "selection": selection, **columns})

    def state_dict(self) -> dict[str, Any]:
        return {"length": len(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del self.steps[state["length"] :]


def numbered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with columns for the log, neither of which a model knows."""
    return [{**row, "number": number, "origin": f"source {number % 3}"} for number, row in enumerate(rows)]


def alone(model: nn.Module, row: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The sum of one sample's token losses, run by itself without padding, and how many tokens have one."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    scores = model(input_ids=ids).logits[0, :-1]
    losses = nn.functional.cross_entropy(scores, labels, ignore_index=-100, reduction="sum")
    return losses, int((labels != -100).sum())


Alone = tuple[torch.Tensor, list[dict[str, torch.Tensor]]]
"""Losses of some samples, and the gradient of each."""


def gradients_alone(model: nn.Module, rows: Sequence[dict[str, Any]], weighting: str) -> Alone:
    """The losses of some samples as the candidates of one step, and their gradients, one sample at a time."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = [alone(model, row) for row in rows]
    window = sum(tokens for _, tokens in own)
    if COUNTS_FIRST_LABEL:
        window += sum(row["labels"][0] != -100 for row in rows)
    losses, found = [], []
    for total, tokens in own:
        loss = total * len(rows) / window if weighting == "token_sum" else total / max(tokens, 1)
        gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True, allow_unused=True)
        losses.append(loss.detach())
        found.append(dict(zip(trained, gradients, strict=True)))
    return torch.stack(losses), found


def inner_product(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return sum(float((left[name] * right[name]).sum()) for name in left)


def check_against_samples_alone(
    model: nn.Module,
    watch: Watch,
    recording: Recording,
    rows: Callable[[list[Any]], Sequence[dict[str, Any]]],
    targets: Callable[[int], Sequence[dict[str, Any]]],
    weighting: str | Callable[[nn.Module, Sequence[dict[str, Any]]], Alone],
    *,
    tolerance: float,
) -> None:
    """What a trainer with the euclidean metric saw in ``.grad`` at each step is the weighted sum of the gradients of
    samples run alone, and what it compared them with is the target's.

    Args:
        model: as it was before the first step.
        watch: of the run.
        recording: of the run.
        rows: ``ids -> samples``.
        targets: ``step -> samples``.
        weighting: of tokens; or a function ``(model, samples) -> losses, gradients``, one sample at a time.
        tolerance: relative.
    """
    gradients_of = partial(gradients_alone, weighting=weighting) if isinstance(weighting, str) else weighting
    trained = dict(model.named_parameters())
    assert len(watch.gradients) == len(recording.steps)
    chosen = 0
    for number, (step, seen) in enumerate(zip(recording.steps, watch.gradients, strict=True)):
        if number:
            for name, value in watch.parameters[number - 1].items():
                trained[name].data.copy_(value)
        selection = step["selection"]
        losses, gradients = gradients_of(model, rows(step["ids"]))
        torch.testing.assert_close(selection.losses.to(losses), losses, rtol=tolerance, atol=tolerance)
        chosen += 0 < len(selection.kept) < len(losses)
        if selection.skipped:
            assert all(gradient is None for gradient in seen.values())
            continue
        weights = dict(zip(selection.kept.tolist(), selection.weights.tolist(), strict=True))
        for name in gradients[0]:
            expected = sum(weight * gradients[index][name] for index, weight in weights.items())
            size = max(float(gradient[name].norm()) for gradient in gradients)
            got = seen[name]
            assert got is not None
            assert isinstance(expected, torch.Tensor)
            assert (got - expected).norm() <= tolerance * size, name
        gram = torch.tensor(
            [[inner_product(one, other) for one in gradients] for other in gradients], dtype=torch.float64
        )
        torch.testing.assert_close(selection.gram.double(), gram, rtol=0, atol=tolerance * float(gram.abs().max()))
        _, goals = gradients_of(model, targets(step["step"]))
        goal = {name: torch.stack([one[name] for one in goals]).mean(0) for name in goals[0]}
        cross = torch.tensor([inner_product(gradient, goal) for gradient in gradients], dtype=torch.float64)
        torch.testing.assert_close(
            selection.cross_gram.double(), cross, rtol=0, atol=tolerance * float(cross.abs().max())
        )
    assert chosen > 1, "nothing was chosen"


ALL: dict[str, Any] = {"filter": KeepAll(), "weight": UniformWeights()}


def lora_model(**options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return with_lora(model(), target_modules=["q_proj", "v_proj", "down_proj"], **options)


def arguments(path: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(path), **named_here({**ARGUMENTS, **HARD, **changes}))


def trained(
    kind: Callable[..., Trainer], net: nn.Module, args: TrainingArguments, *, rows: Any = None, **options: Any
) -> tuple[Trainer, Watch]:
    watch = Watch()
    data = examples(15) if rows is None else rows
    trainer = kind(net, args, data_collator=padded, train_dataset=data, callbacks=[watch], **options)
    trainer.train()
    return trainer, watch


def logged(trainer: Trainer, *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def check_a_killed_run_goes_on(run: Callable[..., Any]) -> None:
    """A run that is killed and resumed ends as one that never was: weights, selections and logs to the bit.

    Args:
        run: ``run(folder, recording, **options) -> trainer``, whose options are those of :func:`trained`.
    """
    recordings = [Recording(), Recording()]
    whole = run("whole", recordings[0])
    with pytest.raises(KeyboardInterrupt):
        run("cut", recordings[1], callbacks=(Stop(5),))
    resumed = run("cut", recordings[1], start=lambda trainer: trainer.train(resume_from_checkpoint=True))
    state = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(state[name], value), name
    one, other = ([(step["step"], *_chosen(step)) for step in recording.steps] for recording in recordings)
    assert len(one) >= 6
    assert one == other
    torch.testing.assert_close(logged(resumed, "loss", "grad_norm"), logged(whole, "loss", "grad_norm"), rtol=0, atol=0)


def _chosen(step: dict[str, Any]) -> Iterator[list[Any]]:
    selection = step["selection"]
    return (values.tolist() for values in (selection.kept, selection.weights, selection.losses))


PROPOSED_ROWS = numbered(examples(40))
TARGET_ROWS = examples(5, seed=1)


def logged_trainer(
    path: Path,
    recording: Recording,
    *callbacks: TrainerCallback,
    kind: type[SelectiveTrainer] = SelectiveTrainer,
    rows: Any = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> SelectiveTrainer:
    """A trainer over rows that are told apart in its log.

    Args:
        path: of its checkpoints.
        recording: takes its selections.
        *callbacks: its callbacks.
        kind: its class.
        rows: its data; None: :data:`PROPOSED_ROWS`.
        settings: changes of its arguments.
        **options: of the selective trainer.
    """
    return kind(
        model(),
        arguments(path, **(settings or {})),
        data_collator=padded,
        train_dataset=PROPOSED_ROWS if rows is None else rows,
        callbacks=list(callbacks),
        target_dataset=TARGET_ROWS,
        target_batch_size=3,
        selection_log=recording,
        sample_id_column="number",
        source_column="origin",
        **options,
    )
