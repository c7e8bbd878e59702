"""The command line."""

from ismdata.cli.main import app, main

__all__ = ["app", "main"]
