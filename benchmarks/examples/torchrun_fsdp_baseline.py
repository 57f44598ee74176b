"""Fine-tune all of a causal language model on JSON lines of {"prompt", "response"}, sharded by FSDP2.

Run: torchrun --nproc-per-node 2 benchmarks/examples/torchrun_fsdp_baseline.py --model Qwen/Qwen3-0.6B
     --data pool.jsonl.gz
"""

import argparse
import gzip
import itertools
import json

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="path or name of a causal language model with its tokenizer")
parser.add_argument("--data", required=True, help="JSON lines to train on, may be gzipped")
parser.add_argument("--output", default="runs/torchrun_fsdp")
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
model = AutoModelForCausalLM.from_pretrained(options.model).to(device).train()
mesh = init_device_mesh(device.partition(":")[0], (world,))
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
parameters = list(model.parameters())
optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
bar = tqdm(itertools.islice(batches(options.data, 8), options.steps), total=options.steps, disable=rank > 0)
for batch in bar:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    bar.set_postfix(loss=f"{loss.item():.3f}")
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    model.save_pretrained(options.output, state_dict=state)
dist.destroy_process_group()
