"""How wide views are drawn, and where they have colours."""

from __future__ import annotations

import os

import pytest

from ismdata.display import stdout_console


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


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
