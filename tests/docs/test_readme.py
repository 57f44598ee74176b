"""The README's code blocks run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
"""Python, and what it prints where the README shows that."""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft, on what it reads
@pytest.mark.filterwarnings("ignore:Skipped a record")  # which the example has broken
def test_code_blocks_run_and_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """A line ``# prints: TEXT`` is checked against what the block prints, and so is a block of text behind it."""
    assert len(BLOCKS) >= 6
    assert sum(bool(shown) for _, shown in BLOCKS) == 2
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        for number, (block, shown) in enumerate(BLOCKS):
            exec(compile(block, f"README.md, code block {number}", "exec"), namespace)
            printed = capsys.readouterr().out
            if shown:
                assert printed == shown
            for expected in re.findall(r"# prints: (.*)", block):
                assert expected in printed


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
