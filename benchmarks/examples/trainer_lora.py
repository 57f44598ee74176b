"""Fine-tune a causal language model with LoRA on JSON lines of {"prompt", "response"}, by the trainer of Transformers.

Run: python benchmarks/examples/trainer_lora.py --model Qwen/Qwen3-0.6B --data pool.jsonl.gz --target target.jsonl.gz
"""

import argparse
import gzip
import json

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from ftw_optim import GreedyFilter
from ftw_optim.integrations.transformers import SelectiveTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="path or name of a causal language model with its tokenizer")
parser.add_argument("--data", required=True, help="JSON lines to train on, may be gzipped")
parser.add_argument("--target", required=True, help="JSON lines of what to train for")
parser.add_argument("--output", default="runs/trainer_lora")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--limit", type=int, default=10_000, help="records read of a file")
parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)


def tokenized(record):
    prompt = tokenizer(record["prompt"] + "\n")["input_ids"]
    answer = tokenizer(record["response"])["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": (prompt + answer)[:1024], "labels": ([-100] * len(prompt) + answer)[:1024]}


def read(path):
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        records = [json.loads(line) for line, _ in zip(file, range(options.limit), strict=False)]
    return Dataset.from_list([{key: record[key] for key in ("prompt", "response", "source")} for record in records])


model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(options.model),
    LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer = SelectiveTrainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        weight_decay=0.01,
        logging_steps=5,
        save_steps=50,
        report_to="none",
        use_cpu=options.cpu,
    ),
    train_dataset=read(options.data).map(tokenized),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    target_dataset=read(options.target).map(tokenized),
    selective={"filter": GreedyFilter(keep=0.25)},
)
trainer.train()
trainer.save_model()
