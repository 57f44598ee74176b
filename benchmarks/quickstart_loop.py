"""How is a loop of your own made selective? Run: python benchmarks/quickstart_loop.py

SmolLM2-135M learns to write dates in ISO format; one answer in four of its stream is right. 90 seconds of one core.
"""

import argparse
from collections import Counter

import torch
from dates import MIXED, encoded, questions, said
from peft import LoraConfig, get_peft_model
from pretrained import pretrained

from ftw_optim import GreedyFilter, SelectiveOptimizer, token_losses
from ftw_optim.integrations.streaming import pad

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="path or name of a causal language model; default: SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
torch.manual_seed(0)
model, tokenizer = pretrained(options.model)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def losses(answers, seed):  # one for each record, not their mean
    return token_losses(model, pad(encoded(questions(answers, seed=seed), tokenizer)))


optimizer = SelectiveOptimizer(adamw, model, lambda: losses(["right"] * 8, seed=1), filter=GreedyFilter(keep=4))
before, weights = losses(["right"] * 16, seed=2).mean().item(), Counter()
for step in range(options.steps):
    optimizer.step(lambda seed=3 + step: losses(MIXED, seed))
    for row, weight in zip(optimizer.selection.kept, optimizer.selection.weights, strict=True):
        weights[MIXED[row]] += weight.item()
    print(f"step {step}: kept", ", ".join(MIXED[row] for row in optimizer.selection.kept))
print(f"weight: {said(weights)}")
print(f"loss of right answers: {before:.2f}, afterwards {losses(['right'] * 16, seed=2).mean().item():.2f}")
