"""Train a causal language model with LoRA on JSON lines of {"prompt", "chosen", "rejected"}, by the DPO trainer of TRL.

Run: python benchmarks/examples/dpo_lora_baseline.py --model Qwen/Qwen3-0.6B --data pairs.jsonl.gz
"""

import argparse
import gzip
import json

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="path or name of a causal language model with its tokenizer")
parser.add_argument("--data", required=True, help="JSON lines of pairs to train on, may be gzipped")
parser.add_argument("--output", default="runs/dpo_lora")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--limit", type=int, default=10_000, help="records read of a file")
parser.add_argument("--beta", type=float, default=0.1, help="how close to stay to the model without adapters")
parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
options = parser.parse_args()


def read(path):
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        records = [json.loads(line) for line, _ in zip(file, range(options.limit), strict=False)]
    return Dataset.from_list(
        [
            {"prompt": record["prompt"] + "\n", "chosen": record["chosen"], "rejected": record["rejected"]}
            for record in records
        ]
    )


trainer = DPOTrainer(
    options.model,
    args=DPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_length=1024,
        beta=options.beta,
        learning_rate=5e-5,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.01,
        logging_steps=5,
        save_steps=50,
        report_to="none",
        use_cpu=options.cpu,
    ),
    train_dataset=read(options.data),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
