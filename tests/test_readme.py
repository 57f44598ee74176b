"""The README's code blocks run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_code_blocks_run_and_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """A line ``# prints: TEXT`` is checked against what the block prints."""
    assert len(BLOCKS) >= 3
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"README.md, code block {number}", "exec"), namespace)
            printed = capsys.readouterr().out
            for expected in re.findall(r"# prints: (.*)", block):
                assert expected in printed


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
