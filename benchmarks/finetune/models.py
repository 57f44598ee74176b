"""The model to fine-tune: any causal LM of Transformers, or a small GPT warmed up on the mixture."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from ftw_optim import token_losses

from .records import Example, Records, collate, encoder, endless_batches, first_examples, in_random_order

END = "<|end|>"
VOCABULARY = 1024
WARM_UP_RECORDS = 4096
WARM_UP_BATCH = 16
WARM_UP_LR = 3e-3
WARM_UP_LENGTH = 64


def load_model(name: str, *, lora: int = 0, device: str = "cpu") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Causal language model and tokenizer of a local directory or a hub name, in float32, without dropout.

    Args:
        name: what ``from_pretrained`` takes.
        lora: rank of LoRA adapters on all linear layers, then the only trained parameters; 0 trains all.
        device: where the model goes.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_cache=False)
    if lora:
        adapters = LoraConfig(
            r=lora,
            lora_alpha=2 * lora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            # GPT-2 keeps its weights transposed.
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )
        torch.manual_seed(0)  # half of the adapters start from random numbers
        with warnings.catch_warnings():
            # PEFT 0.21 asks Transformers for an attribute under its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = get_peft_model(model, adapters)
    # Evaluation mode turns dropout off in every architecture, whatever its configuration calls it.
    return model.to(device).eval(), tokenizer


def small_gpt(mixture: Records, cache: Path, *, steps: int) -> Path:
    """Directory of a GPT of a million parameters and its tokenizer, made once from a mixture.

    Args:
        mixture: the records to draw from; the stream of the runs should have others.
        cache: holds one directory for each mixture, recipe and version of the libraries.
        steps: of warm-up.
    """
    records = list(islice(in_random_order(mixture, seed=0), WARM_UP_RECORDS))
    texts = [[record["prompt"] or "", record["response"] or ""] for record in records]
    recipe = Path(__file__).read_text(), torch.__version__, transformers.__version__, steps, texts
    directory = cache / f"small-gpt-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"
    if directory.is_dir():
        return directory
    tokenizer = train_tokenizer(texts)
    examples, _ = first_examples(records, encoder(tokenizer, WARM_UP_LENGTH), len(records))
    model = _warmed_up(examples, steps)
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed at the end: an interrupted run leaves nothing that looks finished.
    with TemporaryDirectory(dir=cache) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.copytree(unfinished, directory)
    return directory


def train_tokenizer(texts: list[list[str]]) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        chain.from_iterable(texts), vocab_size=VOCABULARY, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, pad_token=END)


def _warmed_up(examples: list[Example], steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        # Deep and narrow, as language models are: the last block is a small share of the work.
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, WARM_UP_LR, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    batches = endless_batches(examples, WARM_UP_BATCH, seed=0)
    for batch in tqdm(islice(batches, steps), desc="warm-up", total=steps, unit="step"):
        optimizer.zero_grad()
        token_losses(model, collate(batch)).mean().backward()
        optimizer.step()
        schedule.step()
    return model
