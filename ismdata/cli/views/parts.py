"""Draw the splits of a folder beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ismdata.display import heading, one_line

#: What is shown of each split, where its facts have it, under names that leave the table narrower than 80 columns.
_SHOWN = {
    "conversations": "conv.",
    "messages": "messages",
    "documents": "documents",
    "sequences": "sequences",
    "tokens": "tokens",
    "target_tokens": "targets",
}


def parts_table(parts: Mapping[str, Mapping[str, Any]]) -> list[RenderableType]:
    """A line for each split with its counts; nothing if there are no splits."""
    if not parts:
        return []
    names = [name for name in _SHOWN if all(name in facts for facts in parts.values())]
    table = Table.grid(padding=(0, 2))
    for number in range(len(names) + 2):
        table.add_column(justify="right" if number else "left")
    table.add_row("", *(Text(name, "dim") for name in [*(_SHOWN[name] for name in names), "refused"]))
    for split, facts in parts.items():
        counts = [facts[name] for name in names] + [sum(facts["quarantined"].values())]
        table.add_row(Text(one_line(split), "bold"), *(f"{count:,}" for count in counts))
    return [heading("splits"), Padding(table, (0, 0, 0, 2))]
