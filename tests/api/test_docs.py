"""What the documentation promises exists: commands and options, links, examples, the picture."""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ismdata.cli.main import app
from ismdata.conversation import REASONS
from tests.support.paths import ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
DOCUMENTS += [ROOT / "ismdata" / "sample" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LINKS = runpy.run_path(str(ROOT / "scripts" / "check_links.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """Every command line that begins with `ismdata` in a code block, continued lines joined, comments dropped."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("ismdata ")]


def group() -> Any:
    return typer.main.get_command(app)


def parameters(command: Any) -> Iterator[Any]:
    """Those of a command, and of all commands below it."""
    yield from command.params
    for below in getattr(command, "commands", {}).values():
        yield from parameters(below)


def test_the_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert shown == set(group().commands)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_and_options_exist(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        command = group().commands.get(words[1])
        assert command is not None, f"{path.name}: ismdata has no command {words[1]}"
        known = {option for parameter in parameters(command) for option in parameter.opts + parameter.secondary_opts}
        known.add("--help")
        used = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert used <= known, f"{path.name}: {shlex.join(words)} uses {', '.join(sorted(used - known))}"


def test_mentioned_options_exist() -> None:
    """Options named in running text belong to some command, to a script, or to a tool (listed here)."""
    known = {option for parameter in parameters(group()) for option in parameter.opts + parameter.secondary_opts} | {
        "--help",
        "--strict",
        "--index-url",
        "--no-deps",
        "--nproc-per-node",
    }
    for script in sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]):
        known |= set(re.findall(r"\"(--[a-z][a-z-]+)\"", script.read_text(encoding="utf-8")))
    for path in DOCUMENTS:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8")))
        assert used <= known, f"{name_of(path)} names {', '.join(sorted(used - known))}"


def test_links_lead_somewhere() -> None:
    assert LINKS["main"]([]) == 0


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The oracle of the test above."""
    (tmp_path / "there.md").write_text("# A *b* `c_d`: e!\n\n## Twice\n\n## Twice\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[1](there.md) [2](there.md#a-b-c_d-e) [3](#here) [4](there.md#twice-1) ![5](gone.svg)\n"
        "`[6](gone.md)` <https://example.org/> [7](https://example.org/gone) [8][one]\n\n"
        "| table |\n|---|\n| [9](there.md#gone) |\n\n```\n[10](gone.md)\n```\n\n[one]: #gone\n",
        encoding="utf-8",
    )
    found = [problem.partition("links to ")[2].partition(";")[0] for problem in LINKS["broken"](page)]
    assert found == ["gone.svg", "#gone", "there.md#gone"]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert named <= targets, name_of(path)


def test_quarantine_reasons_are_documented() -> None:
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| (.+?) \|$", (ROOT / "docs/formats.md").read_text("utf-8"), re.MULTILINE)
    documented = {reason: meaning for reason, meaning in rows if reason in REASONS}
    assert documented == REASONS


def test_examples_in_the_mathematics_run() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "masks.md"), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_picture_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_masks.py"))["draw"]()
    assert (ROOT / "docs" / "masks.svg").read_text(encoding="utf-8") == drawn


def test_the_reader_of_commands_reads() -> None:
    """The oracle's oracle: continued lines and comments."""
    text = "```sh\nmake demo\nismdata pack a \\\n  -o b  # why\n```\n`ismdata nothing`\n"
    assert commands(text) == [["ismdata", "pack", "a", "-o", "b"]]
