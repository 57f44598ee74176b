"""Fine-tune a causal language model with accelerate, on the candidates that a target asks for.

    accelerate launch --num_processes 1 benchmarks/examples/accelerate_loop.py --model Qwen/Qwen3-0.6B \\
        --pool pool.jsonl.gz --target target.jsonl.gz --output runs/example

Both files hold JSON lines with "prompt" and "response". Candidates are drawn from the pool, --accumulate micro-batches
of --batch-size at a step, of which --keep are kept; the target gradient is that of --target-batch target records. To go
on after an interruption, add --resume runs/example/step-000100.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

from ftw_optim import GreedyFilter, SelectiveOptimizer, count_label_tokens, token_losses
from ftw_optim.integrations.accelerate import loss_scale


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub name of a causal language model")
    parser.add_argument("--pool", required=True, help="JSON lines of candidates")
    parser.add_argument("--target", required=True, help="JSON lines of target examples")
    parser.add_argument("--output", required=True, type=Path, help="directory for checkpoints and the adapters")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="candidates of one micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of one step")
    parser.add_argument("--keep", type=int, default=4, help="candidates kept at each step")
    parser.add_argument("--target-batch", type=int, default=8, help="target examples of one target gradient")
    parser.add_argument("--max-length", type=int, default=512, help="tokens")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def encoded(path: str, tokenizer: Any, max_length: int) -> Dataset:
    """Tokens and labels of every record with a response within the length; no label on the prompt."""

    def encode(record: dict[str, str]) -> dict[str, list[int]]:
        head = tokenizer(f"{record['prompt']}\n").input_ids
        body = [*tokenizer(record["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(head) + body
        return {"input_ids": [*head, *body][:max_length], "labels": labels[:max_length]}

    records = load_dataset("json", data_files=path, split="train").filter(lambda record: record["response"].strip())
    records = records.map(encode, remove_columns=records.column_names)
    return records.filter(lambda record: any(label != -100 for label in record["labels"]))


def micro_batches(accelerator: Accelerator, loader: DataLoader, taken: int) -> Iterator[Any]:
    """Micro-batches without end, each epoch in its own order; the first ``taken`` of them are skipped."""
    epoch, within = divmod(taken, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, within)
        epoch, within = epoch + 1, 0


def window_losses(model: nn.Module, window: list[Any]) -> Iterator[Tensor]:
    """Losses of one micro-batch after another, for one selection over the window in which every token counts alike."""
    share = {"label_tokens": count_label_tokens(*window), "candidates": sum(len(batch["labels"]) for batch in window)}
    for batch in window:
        yield token_losses(model, batch, reduction="token_sum", **share)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    set_seed(args.seed)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = DataCollatorForSeq2Seq(tokenizer)
    pool = encoded(args.pool, tokenizer, args.max_length)
    target = encoded(args.target, tokenizer, args.max_length)
    loader = DataLoader(
        pool, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate, generator=torch.Generator()
    )

    model = AutoModelForCausalLM.from_pretrained(args.model, use_cache=False)
    adapters = LoraConfig(r=args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters).train()
    step = int(args.resume.name.rpartition("-")[2]) if args.resume else 0

    def target_losses() -> Tensor:
        """Losses of target records that depend on the step alone, so that a resumed run sees the same ones."""
        rows = random.Random(f"{args.seed}/{step}").sample(range(len(target)), min(args.target_batch, len(target)))
        return token_losses(model, collate([target[row] for row in rows]).to(accelerator.device))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    selective = SelectiveOptimizer(
        torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01),
        model,
        target_losses,
        filter=GreedyFilter(keep=args.keep),
        seed=args.seed,
    )
    scheduler = get_cosine_schedule_with_warmup(selective, args.steps // 10, args.steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, selective, loader, scheduler)
    if args.resume:
        accelerator.load_state(str(args.resume))

    batches = micro_batches(accelerator, loader, step * args.accumulate)
    progress = tqdm(total=args.steps, initial=step, desc="fine-tuning", unit="step")
    while step < args.steps:
        window = list(islice(batches, args.accumulate))
        selective.backward(partial(window_losses, model, window), grad_scale=loss_scale(accelerator))
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        selection = selective.selection
        progress.set_postfix(loss=f"{selection.losses.mean():.3f}", cosine=f"{selection.cosine:.2f}")
        if step % args.save_every == 0 and step < args.steps:
            accelerator.save_state(str(args.output / f"step-{step:06d}"))
    progress.close()
    accelerator.unwrap_model(model).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
