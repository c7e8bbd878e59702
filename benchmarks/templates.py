"""Pack conversations of many shapes under many chat templates, and print which of them each template carries.

    python benchmarks/templates.py OUT CONVERSATIONS.jsonl TEMPLATES... --tokenizer DIR [--check SCRIPT]

TEMPLATES are folders of Jinja files; a template is called by its folder's name and its own. Every template is tried
with every --tokenizer, under `append` and `expand`; `DIR+markers` gives the tokenizer the template's markers as special
tokens, as the template's own model has them. SCRIPT is called with a packed folder and its tokenizer, and prints one
line per fault and a last one. Results go to OUT, one JSON line each, and are not made again; then the table is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import runpy
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

_MARKER = re.compile(r"<[|｜/]?\w[\w▁]*[|｜]?>|\[/?[A-Z]{3,}\]")
_MARKUP = re.compile(r"</?(think|tool_call|tool_response|tools|function|parameter|arg_key|arg_value)\b")


class Job(NamedTuple):
    """One template with one tokenizer and one way with history."""

    template: str
    path: Path
    tokenizer: str
    history: str
    converted: Path
    check: str | None


def run(job: Job) -> dict[str, Any]:
    """Pack the conversations; what was refused and why, and what the check found."""
    from ismdata.pack.pipeline import pack

    result: dict[str, Any] = {"template": job.template, "tok": job.tokenizer, "history": job.history}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _saved(job, Path(folder) / "tokenizer")
        packed = Path(folder) / "packed"
        try:
            pack(
                [job.converted],
                packed,
                tokenizer=str(tokenizer),
                chat_template=str(job.path),
                history=job.history,  # type: ignore[arg-type]
                seq_len=2048,
                tokenizer_backend="hf",
            )
        except Exception as error:
            return result | {"error": f"{type(error).__name__}: {error}"[:600]}
        lines = [json.loads(line) for line in (packed / "quarantine.jsonl").read_text("utf-8").split("\n") if line]
        result["quarantined"] = [(line["record"]["id"], line["reason"], line["detail"][:200]) for line in lines]
        result["faults"] = _faults(job.check, packed) if job.check else []
    return result


def _saved(job: Job, folder: Path) -> Path:
    from ismdata.rendering.tokenizer import load_pretrained

    name, markers = job.tokenizer.removesuffix("+markers"), job.tokenizer.endswith("+markers")
    pretrained = load_pretrained(name)
    if markers:
        found = {text for text in _MARKER.findall(job.path.read_text(encoding="utf-8")) if not _MARKUP.match(text)}
        pretrained.add_special_tokens({"additional_special_tokens": sorted(found)})
    pretrained.save_pretrained(str(folder))
    return folder


def _faults(script: str, packed: Path) -> list[str]:
    """The lines that a check prints, but for its last, a summary."""
    arguments, sys.argv = sys.argv, [script, str(packed), str(packed / "tokenizer")]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = arguments
    return [line for line in printed.getvalue().splitlines()[:-1] if line]


def table(results: Iterable[dict[str, Any]], shapes: int) -> str:
    """A Markdown table: of each template the shapes that are packed, and why others are not."""
    by_template: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_template[result["template"]][result["history"]].append(result)
    rows = ["| template | append | expand | refused |", "|---|---|---|---|"]
    for template, ways in sorted(by_template.items()):
        cells, why = [], defaultdict(list)
        for history in ("append", "expand"):
            found = ways[history]
            if any("error" in one for one in found):
                cells.append("–")
                why[next(one["error"] for one in found if "error" in one)[:120]].append("all")
                continue
            refused = {(name, reason) for one in found for name, reason, _ in one["quarantined"]}
            cells.append(f"{shapes - len({name for name, _ in refused})}")
            for name, reason in sorted(refused):
                why[reason].append((name, history))
        rows.append(f"| {template} | {' | '.join(cells)} | {_reasons(why)} |")
    return "\n".join(rows)


def _reasons(why: dict[str, list[Any]]) -> str:
    said = []
    for reason, names in why.items():
        if "all" in names:
            return reason.replace("|", "\\|")
        ways: dict[str, set[str]] = defaultdict(set)
        for name, history in names:
            ways[name].add(history)
        shown = [
            name if len(histories) == 2 else f"{name} ({next(iter(histories))})" for name, histories in ways.items()
        ]
        said.append(f"`{reason}`: {', '.join(shown)}")
    return "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("templates", type=Path, nargs="+")
    parser.add_argument("--tokenizer", action="append", required=True)
    parser.add_argument("--check")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    from ismdata.convert.pipeline import convert

    done = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()] if options.out.exists() else []
    known = {(one["template"], one["tok"], one["history"]) for one in done}
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted"
        convert([str(options.conversations)], converted)
        jobs = [
            Job(f"{root.name}/{path.stem}", path, tokenizer, history, converted, options.check)
            for root in options.templates
            for path in sorted(root.glob("*.jinja"))
            for tokenizer in options.tokenizer
            for history in ("append", "expand")
        ]
        jobs = [job for job in jobs if (job.template, job.tokenizer, job.history) not in known]
        with (
            multiprocessing.get_context("spawn").Pool(options.processes) as pool,
            options.out.open("a", encoding="utf-8") as out,
        ):
            for result in pool.imap_unordered(run, jobs, chunksize=4):
                done.append(result)
                print(json.dumps(result, ensure_ascii=False), file=out, flush=True)
    print(table(done, sum(1 for line in options.conversations.open(encoding="utf-8") if line.strip())))
    faults = [(one["template"], one["tok"], one["history"], fault) for one in done for fault in one.get("faults", ())]
    print(f"\n{len(done)} packed, {len(faults)} faults")
    for fault in faults:
        print(*fault)


if __name__ == "__main__":
    main()
