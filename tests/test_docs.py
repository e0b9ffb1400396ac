"""README and docs: their links lead somewhere, their commands have the flags that they show."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from softcl.train.__main__ import parse_flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^    (?:python|torchrun [^\n]*?) -m (softcl\.\w+)(.*)$", re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Every call of a command on the pages: its module and its arguments."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for module, rest in COMMAND.findall(text):
            found.append((module, shlex.split(rest, comments=True)))
    return found


def slugs(page: Path) -> set[str]:
    """The names of a page's headings, as links have them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not heading or heading in slugs(target), f"{page.name}: {link}"


def test_there_are_commands_on_the_pages():
    shown = {module for module, _ in commands()}
    wanted = {"train", "evaluate", "finetune", "detect", "embed", "export", "report", "doctor"}
    assert {f"softcl.{name}" for name in wanted} <= shown


@pytest.mark.parametrize(("module", "argv"), commands(), ids=str)
def test_a_command_has_the_flags_that_it_is_shown_with(module: str, argv: list[str], capsys):
    if "--help" in argv:
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(f"{module}.__main__").main(argv)
        assert stopped.value.code == 0
    elif module == "softcl.train":
        if "--config" not in argv:  # which names a file
            assert len(parse_flags(argv)) >= len(argv) // 2
    else:
        assert importlib.import_module(module).build_parser().read(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_pages_is_python(page: Path):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


def test_readme_can_be_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1300
