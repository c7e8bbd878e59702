"""What is printed: any text arrives as it is, on any stream, and drives no terminal."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import ismdata
from ismdata import display
from ismdata.display import TerminalReporter, draw, heading, note, numbers, print_json, printable, stdout_console, title

PACKAGE = Path(ismdata.__file__).parent


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


#: Names that a file, a role, a split or a model may have.
HOSTILE = [
    "a[b].jsonl",
    "x[/b].jsonl",
    "[fast]",
    "[red]red[/red]",
    "[link=file:///etc/passwd]a[/link]",
    "\\[b]",
    ":smile:",
    "{task.description}",
    "%s %(x)s {0} {}",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "a\rb\x08c",
    "\u202emoc.live",
    "a\u2066b\u2069",
    "line\u2028break",
    "\udcff\udcfe.jsonl",
    "名前🙂é",
    "x" * 3000,
]


def everything(name: str) -> Group:
    """One drawing with the name in each place where a view puts one."""
    table = Table(title=name, caption=name)
    table.add_column(name, overflow="fold")
    table.add_row(name)
    parts = [name, Text(name), title(name, name), heading(name, name), numbers((name, 3, name)), table]
    return Group(*parts, Padding(name, 1), *display.histogram_bars(name, [{"from": 1, "to": 1, "count": 2}]))


def printed(call, stream: io.TextIOBase) -> str:
    with contextlib.redirect_stdout(stream):
        call()
    stream.flush()
    buffer = getattr(stream, "buffer", None)
    return stream.getvalue() if buffer is None else buffer.getvalue().decode(stream.encoding)


def bare(text: str) -> str:
    """Without white space, and without the controls that rich leaves out of a text before anything sees it."""
    return "".join(printable(text.translate(dict.fromkeys(b"\x07\x08\x0b\x0c\r"))).split())


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_text_is_printed_as_it_is(name: str, encoding: str) -> None:
    found = printed(lambda: draw(everything(name)), io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert not {"\x1b", "\x07", "\x08", "\r", "\x9b", "\u202e", "\u2066", "\u2028"} & set(found)
    expected = bare(name).encode(encoding, "ismdata").decode(encoding)
    assert bare(found).count(expected) >= 8 or len(name) > 160


@given(st.text(st.characters(), max_size=40))
def test_any_text_can_be_printed(name: str) -> None:
    found = printed(lambda: draw(everything(name)), io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert bare(name) in bare(found)
    assert all(character.isprintable() or character in "\n\t" or ord(character) >= 0xA0 for character in found)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_note_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    note(f"{name}\nerror: forged")
    found = capsys.readouterr().err
    assert found == f"{printable(name)}␊error: forged\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_is_json_whatever_it_holds(encoding: str) -> None:
    facts = {name: [name] for name in HOSTILE}
    found = printed(lambda: print_json(facts), io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert json.loads(found) == facts


def test_our_signs_have_ascii_ones() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert printed(lambda: draw(Text("✓ sound · ██▌ 1–2 …")), stream).strip() == "ok sound - ### 1-2 ..."


def test_the_progress_bar_takes_any_name() -> None:
    """On a pseudo-terminal, where the bar is drawn; a name is cut to the width, so its start is compared."""
    code = (
        "import sys, json; from ismdata.display import TerminalReporter\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    with TerminalReporter() as reporter: reporter.progress(name, 1, 2); reporter.note(name)"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    subprocess.run([sys.executable, "-c", code, json.dumps(HOSTILE)], stderr=theirs, check=True, env=environment)
    os.close(theirs)
    found = b""
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 1 << 16):
            found += piece
    os.close(ours)
    assert b"\x1b[2J" not in found
    for name in HOSTILE:
        assert "".join(printable(name).split())[:60] in "".join(found.decode().split())


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, closed, None)
    draw("a")
    print_json({})
    note("a")
    with TerminalReporter() as reporter:
        reporter.note("a")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_said() -> None:
    code = "from ismdata.display import draw; from ismdata.errors import DataError\ntry: draw('a')\n"
    code += "except DataError as error: raise SystemExit(str(error))"
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert found.returncode == 1
    assert found.stderr.startswith("standard output: No space left on device; expected")
    assert "Exception ignored" not in found.stderr


# ---- width and colours ----


def test_a_pipe_is_wide_and_has_no_colours():
    console = stdout_console()
    assert console.width == 160
    assert console.color_system is None


def test_columns_decides_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert stdout_console().width == 72
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert stdout_console().width == 72


def test_a_pager_behind_a_pipe_has_colours_and_its_own_width(monkeypatch):
    """`FORCE_COLOR=1 ismdata inspect … | less -R`: stdin and stderr are still the terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((91, 30)))
    console = stdout_console()
    assert console.color_system is not None
    assert console.width == 91


# ---- nothing else prints ----

#: Parts of rich that read markup in a string whatever the console is told.
READS_MARKUP = {f"rich.{part}" for part in ("live", "logging", "markdown", "markup", "panel", "pretty", "progress")}
READS_MARKUP |= {f"rich.{part}" for part in ("prompt", "status", "traceback")} | {"rich"}

#: Where `print` is something else: the default of an injected writer, and the protocol between two processes.
PRINTS = {"generate/terminal.py", "bench/data/stages.py"}

#: Escapes markup, for the help texts that Typer reads markup in.
ESCAPES = {"cli/help.py"}


def test_only_one_module_prints() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name == "display.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{name}:{getattr(node, 'lineno', 0)}: use ismdata.display"
            if isinstance(node, ast.ImportFrom):
                assert node.module not in READS_MARKUP or name in ESCAPES, place
            elif isinstance(node, ast.Import):
                assert not READS_MARKUP & {each.name for each in node.names}, place
            elif isinstance(node, ast.Call):
                function = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
                assert function not in ("Console", "from_markup", "render_markup", "echo", "secho", "pprint"), place
                assert function != "print" or name in PRINTS, place


def test_the_module_that_prints_reads_no_markup() -> None:
    text = (PACKAGE / "display.py").read_text(encoding="utf-8")
    assert text.count("Console(") == text.count("markup=False, emoji=False") == 1
    assert text.count("TextColumn(") == text.count('TextColumn("{task.description}", markup=False)') == 1
