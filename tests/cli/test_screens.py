"""What `ismdata chat` reads and shows, in real pseudo-terminals and pipes."""

from __future__ import annotations

import json
import os
import select
import stat
import subprocess
import sys
import time

import pytest

from ismdata.cli.screens import add_to_history, history_path, read_history
from tests.support.paths import ROOT

pty = pytest.importorskip("pty")
fcntl, struct, termios = (pytest.importorskip(name) for name in ("fcntl", "struct", "termios"))

#: A chat without a model: each line is answered with its own text as JSON, and `words` with many words.
ECHO = """
import json, sys
from ismdata.cli.screens import open_screen
screen = open_screen(history="--no-history" not in sys.argv)
screen.say("Greeting.")
while True:
    try:
        line = screen.read()
    except EOFError:
        break
    except KeyboardInterrupt:
        screen.say("interrupted")
        continue
    if line == "error":
        screen.say("a problem", is_error=True)
        continue
    text = "word " * 40 + "我们今天去公园玩吧" * 8 + "\\x1b[31m" if line == "words" else json.dumps(line)
    for start in range(0, len(text), 3):
        screen.answer(text[start : start + 3])
    screen.end_answer()
"""


#: What is sent when a prompt begins: pastes are to be marked.
PROMPT = "\x1b[?2004h"


class Terminal:
    """A program in a pseudo-terminal of 60 columns, with some of its streams in files."""

    def __init__(self, folder, *arguments, stdout=None, **variables):
        pytest.importorskip("prompt_toolkit")
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONPATH": ":".join(sys.path),
        }
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ECHO, *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            cwd=ROOT,
            env=environment | variables,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C reaches the program
        )
        self.slave = slave
        self.shown, self.seen = "", 0
        self.wait("Greeting.", PROMPT)

    def wait(self, *texts, seconds=20):
        """Read until the terminal has shown these, in order, after what was waited for before. Returns all of it."""
        until = time.monotonic() + seconds
        start = self.seen
        while not self._find(texts):
            assert time.monotonic() < until, f"{texts!r} are not in {self.shown[start:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                new = os.read(self.master, 65536).decode("utf-8", "replace")
                if "\x1b[6n" in new:  # the program asks where the cursor is
                    os.write(self.master, b"\x1b[1;1R")
                self.shown += new
        return self.shown[start : self.seen]

    def _find(self, texts):
        end = self.seen
        for text in texts:
            at = self.shown.find(text, end)
            if at < 0:
                return False
            end = at + len(text)
        self.seen = end
        return True

    def type(self, keys):
        os.write(self.master, keys.encode())

    def close(self):
        """Send Ctrl-D, wait for the end, and give the exit code."""
        self.type("\x04")
        code = self.process.wait(timeout=30)
        assert termios.tcgetattr(self.slave) == self.before  # as it was: with echo, line by line
        os.close(self.slave)
        os.close(self.master)
        return code


def test_typing(tmp_path):
    """Editing, a paste of several lines, a line that is begun with Alt-Enter, wide characters, Ctrl-C, Ctrl-D."""
    terminal = Terminal(tmp_path)
    terminal.type("helo\x1b[Dl\r")  # the cursor one to the left, and a letter there
    terminal.wait('"hello"\r\n', PROMPT)
    terminal.type("\x1b[200~def f():\n\treturn 1\n\x1b[201~")
    terminal.wait("return 1")
    terminal.type("\r")
    terminal.wait('"def f():\\n\\treturn 1\\n"', PROMPT)
    terminal.type("one\x1b\rtwo\r")
    terminal.wait('"one\\ntwo"', PROMPT)
    terminal.type("中文x\x7f\x7f\r")
    terminal.wait(json.dumps("中"), PROMPT)
    terminal.type("thrown away\x03")
    terminal.wait("interrupted", PROMPT)
    terminal.type("\x1b[A\r")  # up: the last line
    terminal.wait(json.dumps("中"), PROMPT)
    assert terminal.close() == 0


def test_answers_wrap_at_words_and_control_characters_are_shown(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.type("words\r")
    shown = terminal.wait(PROMPT)
    assert "\r\n".join([" ".join(["word"] * 12)] * 3 + [" ".join(["word"] * 4) + " 我们今天去公园玩吧"]) in shown
    assert "\x1b[31m" not in shown
    assert "␛[31m" in shown.replace("\r\n", "")
    assert terminal.close() == 0


def test_only_answers_go_to_stdout(tmp_path):
    """Prompt and notes are on the terminal, though stdout is a file."""
    with (tmp_path / "out").open("wb") as out:
        terminal = Terminal(tmp_path, stdout=out)
        terminal.type("hello\r")
        terminal.wait(PROMPT)
        terminal.type("error\r")
        assert "\x1b[31m" in terminal.wait("a problem", PROMPT)
        terminal.type("words\r")
        terminal.wait(PROMPT)
        assert terminal.close() == 0
    lines = (tmp_path / "out").read_bytes().decode().split("\n")
    assert lines == ['"hello"', "word " * 40 + "我们今天去公园玩吧" * 8 + "\x1b[31m", ""]  # as generated


def test_the_history_is_kept_privately_or_not_at_all(tmp_path):
    path = tmp_path / "state" / "ismdata" / "chat_history"
    terminal = Terminal(tmp_path, "--no-history")
    terminal.type("secret\r")
    terminal.wait('"secret"', PROMPT)
    assert terminal.close() == 0
    assert not path.parent.exists()
    terminal = Terminal(tmp_path)
    terminal.type("kept\r")
    terminal.wait('"kept"', PROMPT)
    assert terminal.close() == 0
    assert read_history(path) == ["kept"]
    terminal = Terminal(tmp_path, NO_COLOR="1")
    terminal.type("\x1b[A\r")
    terminal.wait('"kept"', PROMPT)
    terminal.type("error\r")
    assert "\x1b[31m" not in terminal.wait("a problem", PROMPT)
    assert terminal.close() == 0


def test_a_pipe():
    """Each line is a question; stdout has the answers as they are, stderr the rest, without colours."""
    done = subprocess.run(
        [sys.executable, "-c", ECHO],
        input="hello\nerror\n你\nlast",
        capture_output=True,
        text=True,
        cwd=ROOT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == '"hello"\n' + json.dumps("你") + '\n"last"\n'
    assert done.stderr == "Greeting.\na problem\n"


def test_entries_of_the_history(tmp_path):
    path = tmp_path / "new" / "folder" / "chat_history"
    entries = ["one", "two\nlines", "中\u2028文", '"', "\\"]
    for entry in entries:
        add_to_history(path, entry)
    assert read_history(path) == entries
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    add_to_history(path, "again")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]\n", b'{"a": 1}\nnot JSON\n"good"\n', b"[" * 100_000])
def test_a_damaged_history_is_no_error(tmp_path, content):
    path = tmp_path / "chat_history"
    path.write_bytes(content)
    assert read_history(path) == (["good"] if b"good" in content else [])


def test_where_no_history_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    add_to_history(tmp_path / "file" / "chat_history", "entry")  # its folder is a file
    assert read_history(tmp_path / "file" / "chat_history") == []
    assert read_history(tmp_path) == []  # a folder


def test_only_the_latest_entries_are_read(tmp_path):
    path = tmp_path / "chat_history"
    path.write_text("".join(f'"{number}"\n' for number in range(3000)))
    assert read_history(path) == [str(number) for number in range(2000, 3000)]


def test_the_place_of_the_history(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "ismdata" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "ismdata" / "chat_history"
