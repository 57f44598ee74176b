"""Fine-tune a causal language model with Lightning, on the candidates that a target asks for.

    python benchmarks/examples/lightning_module.py --model Qwen/Qwen3-0.6B \\
        --pool pool.jsonl.gz --target target.jsonl.gz --output runs/example

Both files hold JSON lines with "prompt" and "response". Candidates are drawn from the pool, --accumulate micro-batches
of --batch-size at a step, of which --keep are kept; the target gradient is that of --target-batch target records. What
each selection came to is in metrics.csv. To go on at the epoch after an interruption, add --resume PATH.ckpt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

from ftw_optim import GreedyFilter, token_losses
from ftw_optim.integrations.lightning import SelectiveModuleMixin


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub name of a causal language model")
    parser.add_argument("--pool", required=True, help="JSON lines of candidates")
    parser.add_argument("--target", required=True, help="JSON lines of target examples")
    parser.add_argument(
        "--output", required=True, type=Path, help="directory for metrics, checkpoints and the adapters"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="candidates of one micro-batch")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of one step")
    parser.add_argument("--keep", type=int, default=4, help="candidates kept at each step")
    parser.add_argument("--target-batch", type=int, default=8, help="target examples of one target gradient")
    parser.add_argument("--max-length", type=int, default=512, help="tokens")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapters")
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


class FineTuning(SelectiveModuleMixin, LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(args.model, use_cache=False)
        adapters = LoraConfig(r=args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, adapters).train()

    def candidate_losses(self, batch: Any) -> Tensor:
        return token_losses(self.model, batch)

    def configure_selection(self) -> dict[str, Any]:
        return {"filter": GreedyFilter(keep=self.args.keep), "seed": self.args.seed}

    def target_dataloader(self) -> DataLoader:
        return self._loader(self.args.target, self.args.target_batch)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.args.pool, self.args.batch_size)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.args.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loader(self, path: str, size: int) -> DataLoader:
        records = encoded(path, self.tokenizer, self.args.max_length)
        return DataLoader(records, size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(self.tokenizer))


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    seed_everything(args.seed, verbose=False)
    module = FineTuning(args)
    trainer = Trainer(
        max_epochs=args.epochs,
        devices=1,
        logger=CSVLogger(args.output, name="", version=""),
        callbacks=[ModelCheckpoint(args.output, save_last=True)],
        log_every_n_steps=1,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, ckpt_path=args.resume)
    module.model.save_pretrained(args.output)
    module.tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
