"""Fine-tune a causal language model with LoRA on JSON lines of {"prompt", "response"}, on several processes.

Run: torchrun --nproc-per-node 2 benchmarks/examples/torchrun_loop.py --model Qwen/Qwen3-0.6B
     --data pool.jsonl.gz --target target.jsonl.gz
"""

import argparse
import gzip
import itertools
import json

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from ftw_optim import GreedyFilter, SelectiveOptimizer, token_losses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="path or name of a causal language model with its tokenizer")
parser.add_argument("--data", required=True, help="JSON lines to train on, may be gzipped")
parser.add_argument("--target", required=True, help="JSON lines of what to train for")
parser.add_argument("--output", default="runs/torchrun_loop")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--limit", type=int, default=10_000, help="records read of a file")
parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
options = parser.parse_args()
on_gpu = torch.cuda.is_available() and not options.cpu
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu"

tokenizer = AutoTokenizer.from_pretrained(options.model)


def tokenized(record):
    prompt = tokenizer(record["prompt"] + "\n")["input_ids"]
    answer = tokenizer(record["response"])["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": (prompt + answer)[:1024], "labels": ([-100] * len(prompt) + answer)[:1024]}


def batches(path, size):
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        mine = itertools.islice(file, rank, options.limit, world)
        rows = [tokenized(json.loads(line)) for line in mine]
    loader = DataLoader(rows, size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    return (batch.to(device) for _ in itertools.count() for batch in loader)


torch.manual_seed(0)
adapted = get_peft_model(
    AutoModelForCausalLM.from_pretrained(options.model).to(device),
    LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
).train()
model = DistributedDataParallel(adapted)
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
targets = batches(options.target, 2)
optimizer = SelectiveOptimizer(
    torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01),
    model,
    target=lambda: token_losses(model, next(targets)),
    filter=GreedyFilter(keep=0.25),
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
bar = tqdm(itertools.islice(batches(options.data, 8), options.steps), total=options.steps, disable=rank > 0)
for batch in bar:
    optimizer.zero_grad()
    loss = optimizer.backward(lambda batch=batch: token_losses(model, batch))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    bar.set_postfix(loss=f"{loss.item():.3f}")
if rank == 0:
    adapted.save_pretrained(options.output)
dist.destroy_process_group()
