"""The documents: their code runs as a reader would type it, and the files, headings and paths that they name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCUMENTS = {
    "README.md": (1, 0),
    "CONTRIBUTING.md": (3, 0),
    "benchmarks/README.md": (0, 0),
    "benchmarks/pays/README.md": (0, 0),
    "ftw_optim/README.md": (9, 2),
    "ftw_optim/integrations/README.md": (2, 0),
    "ftw_optim/score/README.md": (0, 0),
}
"""How many code blocks each has at least, and how many of these have what they print behind them."""

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("ftw_optim", "tests", "benchmarks")
WRITTEN_OUT = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*]")
"""A path from the root, in prose or in a command."""
IN_BACKTICKS = re.compile(r"`((?:[\w.-]+/)+|(?:[\w.*-]+/)*[\w.*-]+\.(?:py|md|txt|json|png|toml))`")
"""A path from the root, from the package or from the document; or the bare name of a file."""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose_of(document: str) -> str:
    return FENCED.sub("", text_of(document))


def links_of(document: str) -> list[str]:
    inline = re.findall(r"\]\(([^)\s]+)\)", prose_of(document))
    return [*inline, *re.findall(r"^\[[^]]+\]: (\S+)$", prose_of(document), re.MULTILINE)]


def anchors_of(document: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths_not_there(document: str) -> list[str]:
    """Paths of the package, the tests and the benchmarks that a document names and nobody has."""
    starts = (ROOT, ROOT / "ftw_optim", (ROOT / document).parent)
    missing = []
    for path in {*WRITTEN_OUT.findall(text_of(document)), *IN_BACKTICKS.findall(prose_of(document))}:
        anywhere = "/" not in path and any(any((ROOT / folder).rglob(path)) for folder in FOLDERS)
        if not anywhere and not any(any(start.glob(path.rstrip("/"))) for start in starts):
            missing.append(path)
    return sorted(missing)


def test_every_document_is_tested() -> None:
    found = {*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))}
    assert {str(path.relative_to(ROOT)) for path in found} == {*DOCUMENTS, "CHANGELOG.md", "tests/matrix_results.md"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft, on what it reads
@pytest.mark.filterwarnings("ignore:Skipped a record")  # which the example has broken
@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_run_and_print_what_they_say(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line ``# prints: TEXT`` is checked against what the block prints, and so is a block of text behind it."""
    text = text_of(document)
    blocks = BLOCK.findall(text)
    least, shown_blocks = DOCUMENTS[document]
    assert len(blocks) >= least
    assert len(blocks) == text.count("```python"), "a block is not found, or not closed"
    assert sum(bool(shown) for _, shown in blocks) == shown_blocks == text.count("```text")
    namespace: dict[str, Any] = {}
    with torch.random.fork_rng():
        for number, (block, shown) in enumerate(blocks):
            exec(compile(block, f"{document}, code block {number}", "exec"), namespace)
            printed = capsys.readouterr().out
            if shown:
                assert printed == shown
            for expected in re.findall(r"# prints: (.*)", block):
                assert expected in printed


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(document: str) -> None:
    links = [link for link in links_of(document) if not link.startswith(("http:", "https:"))]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), link
        if anchor:
            assert anchor in anchors_of(str(path.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_exists(document: str) -> None:
    assert paths_not_there(document) == []


def test_the_readme_is_short() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) <= 200
    run, _ = BLOCK.findall(text)[0]
    assert len(run.splitlines()) < 25


def test_the_readme_shows_one_test_command() -> None:
    """As ``.ci/run`` reads it: the one line of the block behind the comment."""
    (command,) = re.findall(r"^<!-- test command -->\n```bash\n(.*)\n```$", text_of("README.md"), re.MULTILINE)
    assert "pytest" in command
