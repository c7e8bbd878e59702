"""The command line: options in, one call, a view out."""

from ismdata.cli.main import app, main

__all__ = ["app", "main"]
