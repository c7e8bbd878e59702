"""Draw what a quarantine holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ismdata import conversation

if TYPE_CHECKING:
    pass
from ismdata.display import heading, one_line


def quarantine(facts: dict[str, Any]) -> list[RenderableType]:
    """Refused records by reason, with the first of each: `quarantined` and `first_refusals` of `facts`."""
    refused = sum(facts["quarantined"].values())
    if not refused:
        return [heading("quarantine", f"none of {facts['read']:,} read")]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="yellow", no_wrap=True)
    table.add_column(justify="right")
    table.add_column()
    for reason, count in sorted(facts["quarantined"].items(), key=lambda item: -item[1]):
        table.add_row(reason, f"{count:,}", conversation.REASONS.get(reason, ""))
        if first := facts["first_refusals"].get(reason):
            table.add_row("", "", Text(one_line(f"{first['source']}: {first['detail']}"), "dim"))
    return [heading("quarantine", f"{refused:,} of {facts['read']:,} read"), Padding(table, (0, 0, 0, 2))]
