"""How is the SFT trainer of TRL made selective? Run: python benchmarks/quickstart_sft.py

SmolLM2-135M learns to write dates in ISO format; one answer in four of its stream is right. Two minutes of one core.
"""

import argparse

from datasets import Dataset
from dates import MIXED, questions, shares
from peft import LoraConfig
from pretrained import pretrained
from trl import SFTConfig

from ftw_optim import GreedyFilter
from ftw_optim.integrations.trl import SelectiveSFTTrainer
from ftw_optim.selection_log import SelectionLog

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="path or name of a causal language model; default: SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=12)
options = parser.parse_args()
model, tokenizer = pretrained(options.model)
trainer = SelectiveSFTTrainer(
    model,
    SFTConfig("runs/sft", num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-3, bf16=False),
    train_dataset=Dataset.from_list(questions(MIXED * options.steps, seed=3)),
    eval_dataset=Dataset.from_list(questions(["right"] * 16, seed=2)),
    target_dataset=Dataset.from_list(questions(["right"] * 8, seed=1)),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    selective={"filter": GreedyFilter(keep=4)},
    selection_log=SelectionLog("runs/sft", overwrite=True),
    source_column="source",
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"weight: {shares(trainer.selection_log)}; more: python -m ftw_optim.report runs/sft")
print(f"loss of right answers: {before:.2f}, afterwards {trainer.evaluate()['eval_loss']:.2f}")
