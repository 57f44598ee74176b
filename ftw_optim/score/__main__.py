"""The command ``python -m ftw_optim.score MODEL POOL TARGET``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ftw_optim.score._model import load_model
from ftw_optim.score._ranking import RANKED_BY
from ftw_optim.score._scoring import Options, score_pool
from ftw_optim.score._table import shown


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m ftw_optim.score",
        description="Score every record of a pool towards a target, without training: the inner product of its "
        "gradient with the target's mean gradient, in the metric of AdamW's coming step.",
    )
    default = Options()
    found.add_argument("model", metavar="MODEL", help="directory or hub name of a causal language model or an adapter")
    found.add_argument("pool", metavar="POOL", type=Path, help="JSON lines (gzip too) with prompt, response and source")
    found.add_argument("target", metavar="TARGET", type=Path, help="examples of the target, in the same form")
    found.add_argument("--out", type=Path, default=Path("scores"), help="folder of all that is kept (%(default)s)")
    found.add_argument("--lora", type=int, metavar="RANK", help="compare new LoRA adapters on all linear layers")
    found.add_argument("--last-blocks", type=int, metavar="N", help="compare the last N blocks alone")
    found.add_argument(
        "--optimizer-state", type=Path, metavar="FILE", help="an AdamW's state, such as a checkpoint's optimizer.pt"
    )
    found.add_argument(
        "--warm-up", type=int, default=default.warm_up, help="batches of the pool that tell the metric (%(default)s)"
    )
    found.add_argument(
        "--lr", type=float, default=default.learning_rate, help="AdamW's, where its state is not given (%(default)s)"
    )
    found.add_argument("--dim", type=int, default=default.dim, help="numbers of a record's sketch (%(default)s)")
    found.add_argument("--exact", action="store_true", help="keep whole gradients in place of sketches")
    found.add_argument("--limit", type=int, help="records of the pool that are read (all)")
    found.add_argument("--target-rows", type=int, help="rows of the target that are read (all)")
    found.add_argument("--max-length", type=int, default=default.max_length, help="tokens of a record (%(default)s)")
    found.add_argument("--batch-size", type=int, default=default.batch_size, help="records of a pass (%(default)s)")
    found.add_argument(
        "--compared", type=int, default=default.compared, help="best records that redundancy looks at (%(default)s)"
    )
    found.add_argument("--rank-by", choices=RANKED_BY, default=default.rank_by, help="(%(default)s)")
    found.add_argument("--seed", type=int, default=default.seed, help="of sketches, new adapters, draws (%(default)s)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"], help="(%(default)s)")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    asked = parser().parse_args(arguments)
    try:
        options = Options(
            max_length=asked.max_length,
            limit=asked.limit,
            dim=None if asked.exact else asked.dim,
            learning_rate=asked.lr,
            warm_up=asked.warm_up,
            batch_size=asked.batch_size,
            seed=asked.seed,
            optimizer_state=asked.optimizer_state,
            target_rows=asked.target_rows,
            compared=asked.compared,
            rank_by=asked.rank_by,
        )
        model, tokenizer = load_model(
            asked.model,
            lora=asked.lora,
            blocks=asked.last_blocks,
            seed=asked.seed,
            device=asked.device,
            dtype=getattr(torch, asked.dtype),
        )
        out, found = score_pool(model, tokenizer, asked.pool, asked.target, asked.out, options=options)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        print(f"python -m ftw_optim.score: {error}", file=sys.stderr)
        return 2
    print(f"\n{shown(found)}\n\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
