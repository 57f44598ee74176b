"""How is the Trainer of Transformers made selective? Run: python benchmarks/quickstart_trainer.py

SmolLM2-135M learns to write dates in ISO format; one answer in four of its stream is right. Two minutes of one core.
"""

import argparse

from datasets import Dataset
from dates import MIXED, encoded, questions, shares
from peft import LoraConfig, get_peft_model
from pretrained import pretrained
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from ftw_optim import GreedyFilter
from ftw_optim.integrations.transformers import SelectiveTrainer
from ftw_optim.selection_log import SelectionLog

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="path or name of a causal language model; default: SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
model, tokenizer = pretrained(options.model)
trainer = SelectiveTrainer(
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")),
    TrainingArguments("runs/trainer", num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-3),
    train_dataset=Dataset.from_list(encoded(questions(MIXED * options.steps, seed=3), tokenizer)),
    eval_dataset=Dataset.from_list(encoded(questions(["right"] * 16, seed=2), tokenizer)),
    target_dataset=Dataset.from_list(encoded(questions(["right"] * 8, seed=1), tokenizer)),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    selective={"filter": GreedyFilter(keep=4)},
    selection_log=SelectionLog("runs/trainer", overwrite=True),
    source_column="source",
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"weight: {shares(trainer.selection_log)}; more: python -m ftw_optim.report runs/trainer")
print(f"loss of right answers: {before:.2f}, afterwards {trainer.evaluate()['eval_loss']:.2f}")
