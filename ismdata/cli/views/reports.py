"""Draw what each command reports when it is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from ismdata.data import VerifyReport

if TYPE_CHECKING:
    from ismdata.convert import ConvertReport, Explanation
    from ismdata.pack import PackReport
    from ismdata.rendering import SavedTokenizer
    from ismdata.train import TrainReport
from ismdata.cli.next_command import command_line
from ismdata.cli.views.parts import parts_table
from ismdata.cli.views.quarantine import quarantine
from ismdata.display import View, heading, numbers, one_line, title

#: Sources and files that are listed; of further ones only the number is shown.
_LISTED_SOURCES, _LISTED_FILES = 12, 8
#: Names of sources that are listed beside a split.
_LISTED_NAMES = 3


def verify_report(report: VerifyReport) -> View:
    """What `verify` found: counts if the folder is sound, otherwise every problem."""
    facts = {
        "folder": str(report.folder),
        "format": report.format,
        "ok": report.ok,
        "counts": report.counts,
        "problems": report.problems,
    }
    if report.ok:
        counts = " · ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in report.counts.items())
        return View(
            facts=facts, drawing=Text.assemble(("✓ sound", "bold green"), f"  {one_line(str(report.folder))}: {counts}")
        )
    number = len(report.problems)
    head = Text.assemble(
        ("✗ ", "bold red"), (f"{number} problem{'s' * (number > 1)}", "bold red"), f" in {one_line(str(report.folder))}"
    )
    # Do not wrap: a path is only useful in one piece.
    problems = [Text(f"  {one_line(problem)}", no_wrap=True, overflow="ignore") for problem in report.problems]
    return View(facts=facts, drawing=Group(head, *problems), whole_lines=True)


def tokenizer_report(output: Path, tokenizer: SavedTokenizer, *, wanted: int, converted: Sequence[Path]) -> View:
    """What `tokenizer train` made, and the next command."""
    size = len(tokenizer)
    fewer = f"  {wanted:,} were asked for: the corpus has no more pairs to merge" * (size < wanted)
    sources = " ".join(map(str, converted))
    facts = {"output": str(output), "vocab_size": size, "wanted": wanted, "chat_template": "chatml"}
    drawing = Group(
        Text.assemble((one_line(str(output)), "bold"), f"  {size:,} tokens, chat template ChatML{fewer}"),
        Text(f"\nnext: ismdata pack {one_line(sources)} -o packed --tokenizer {one_line(str(output))}"),
    )
    return View(facts=facts, drawing=drawing)


def convert_report(report: ConvertReport) -> View:
    """What `convert` read and wrote."""
    first = {reason: {"source": one.source, "detail": one.detail} for reason, one in report.first.items()}
    facts = {
        "output": str(report.output),
        "read": report.read,
        "written": report.written,
        "quarantined": report.quarantined,
        "duplicates": report.duplicates,
        "parts": report.parts,
        "splits": {split: list(names) for split, names in report.splits.items()},
        "first_refusals": first,
        "sources": [
            {
                "name": source.name,
                "layout": source.layout,
                "format": source.format,
                "records": source.records,
                "left_aside": list(source.left_aside),
            }
            for source in report.sources
        ],
        "notes": list(report.notes),
        "ignored_fields": report.ignored_fields,
        "shards": report.shards,
        "seconds": report.seconds,
    }
    sources = [
        (f"{one.name}  ({one.format}, {one.layout})", one.records, "") for one in report.sources[:_LISTED_SOURCES]
    ]
    if rest := report.sources[_LISTED_SOURCES:]:
        sources.append((f"… and {len(rest):,} more sources", sum(one.records for one in rest), ""))
    parts = [
        title(str(report.output), f"{report.read:,} read, {report.written:,} written in {report.seconds:.1f} s"),
        numbers(*sources),
        *quarantine(facts),
    ]
    if report.parts:
        how = "drawn by --split" if report.drawn else "as found, kept apart; --splits merge writes one folder"
        parts.append(heading("splits", how))
        parts.append(
            numbers(
                *(
                    (name, rows, "" if report.drawn else shortened(report.splits.get(name, ())))
                    for name, rows in report.parts.items()
                )
            )
        )
    if report.duplicates:
        dropped = "" if {"duplicate", "near_duplicate"} & report.quarantined.keys() else "; --dedup exact drops them"
        parts.append(heading("duplicates", f"{report.duplicates:,} conversations repeat an earlier one{dropped}"))
    if left := [name for source in report.sources for name in source.left_aside]:
        parts.append(
            heading(
                "files not read",
                ", ".join(left[:_LISTED_FILES])
                + (f" and {len(left) - _LISTED_FILES:,} more" if len(left) > _LISTED_FILES else ""),
            )
        )
    if report.ignored_fields:
        names = ", ".join(f"{name} ({count:,})" for name, count in report.ignored_fields.items())
        parts.append(heading("fields not used", names))
    parts += [heading("note", text) for text in report.notes]
    return View(facts=facts, drawing=Group(*parts))


def shortened(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others."""
    more = f" and {len(names) - _LISTED_NAMES:,} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more


def explanation(found: Explanation) -> View:
    """How a source would be read: its format, its first conversation, and a mapping to start from."""
    return View(facts=found.as_json(), drawing=Text(found.text()))


def pack_report(report: PackReport) -> View:
    """What `pack` wrote; `ismdata inspect` shows more."""
    first = {one.reason: {"source": one.source, "detail": one.detail} for one in reversed(report.first_refusals)}
    facts = {
        "output": str(report.output),
        **report.counts,
        **report.totals,
        "first_refusals": first,
        "parts": {name: {**part.counts, **part.totals} for name, part in report.parts.items()},
        "notes": list(report.notes),
        "seconds": report.seconds,
    }
    bound = report.totals["lower_bound_sequences"]
    names = ("conversations", "documents", "sequences", "tokens", "target_tokens", "padding_tokens")
    notes = {"sequences": f"lower bound {bound:,}"}
    drawing = Group(
        title(str(report.output), f"packed in {report.seconds:.1f} s"),
        numbers(*((name.replace("_", " "), report.totals[name], notes.get(name, "")) for name in names)),
        *parts_table(facts["parts"]),
        *quarantine(facts),
        *_train_splits(report),
    )
    return View(facts=facts, drawing=drawing)


def _train_splits(report: PackReport) -> list[Text]:
    """The command that trains on one split and evaluates on another, if there are such."""
    if not {"train", "validation"} <= report.parts.keys():
        return []
    words = (
        "train",
        report.output / "train",
        "--eval",
        report.output / "validation",
        "--model",
        "MODEL",
        "-o",
        "model",
    )
    return [heading("next", command_line(*words))]


def train_report(report: TrainReport) -> View:
    """What a training run did."""
    facts = {
        "output": str(report.output),
        "mask": report.mask,
        "backend": report.backend,
        "parameters": report.parameters,
        "steps": report.steps,
        "first_loss": report.first_loss,
        "last_loss": report.last_loss,
        "tokens": report.tokens,
        "target_tokens": report.target_tokens,
        "seconds": report.seconds,
        "device": report.device,
        "dtype": report.dtype,
        "evaluations": list(report.evaluations),
        "starting_losses": report.starting_losses,
    }
    rows: list[tuple[str, int, str | Text]] = [
        ("parameters", report.parameters, ""),
        ("steps", report.steps, Text(f"loss {report.first_loss:.3f} → {report.last_loss:.3f}")),
        ("tokens", report.tokens, f"{report.tokens / max(report.seconds, 1e-9):,.0f} per second"),
        ("targets", report.target_tokens, ""),
    ]
    next_commands = [("chat with it", command_line("chat", report.output))]
    parts: list[RenderableType] = []
    if report.evaluations:
        losses = " → ".join(f"{loss:.3f}" for loss in report.evaluations)
        perplexities = " → ".join(f"{math.exp(min(loss, 99)):,.1f}" for loss in report.evaluations)
        parts.append(Text(f"\n  evaluation loss {losses}, perplexity {perplexities}"))
    if report.evaluation_set is not None:
        next_commands.append(("measure it by turn", command_line("eval", report.output, Path(report.evaluation_set))))
    for what, line in next_commands:
        parts.append(heading(what))
        parts.append(
            Text(f"  {line}", style="cyan", no_wrap=True, overflow="ignore")
        )  # whole, so that it can be copied
    drawing = Group(
        title(
            str(report.output),
            f"mask {report.mask} by {report.backend} · {report.device}, {report.dtype} · {report.seconds:.0f} s",
        ),
        numbers(*rows),
        *parts,
    )
    return View(facts=facts, drawing=drawing, whole_lines=True)
