"""Coverage-guided fuzzing of what reads corpora, with atheris: nothing but a stated error may come of any bytes.

    pip install atheris  # Python 3.11, Linux
    python benchmarks/fuzz.py --reader all --seconds 600

Targets are the formats by name, and `framing`, `layout`, `archives`, `mapping`, `guessing`; `all` runs each in turn,
`framing,layout` these two. Seeds are valid files of every format and layout, made by
`tests/support/raw_corpora.py`; mutations are those of `tests/support/mutations.py` (trees of JSON values, bytes) and
libFuzzer's own. What is checked of each input:

- a format: the bytes as a file of that format, from its compression to canonical rows. The fast road and the general
  one give the same rows and refusals; each record is written or refused; every row obeys the schema; every line of the
  quarantine is JSON with a known reason; grouped rows are each in one group.
- framing: records do not depend on how many bytes come at a time; of JSON they are what `json` finds.
- layout, archives: as a format, detected by content, plain and packed.
- mapping, guessing: any TOML is a mapping or a usage error; what `--explain` guesses is a mapping that can be read.

An input that takes over 10 s or 2 GiB is a finding too. Findings are saved in `--findings`; to see one again:
`python benchmarks/fuzz.py --reader NAME --replay FILE`. Prints one line a target, exits with 1 on a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

try:
    import atheris
except ImportError:
    sys.exit("benchmarks/fuzz.py needs atheris: pip install atheris (Python 3.11, Linux)")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.mutations import mutated_bytes, mutated_value  # noqa: E402
from tests.support.raw_corpora import ANCHOR, FORMATS, PACKED, A, Talk, U, packed, written  # noqa: E402

INSTRUMENTED = [
    "ismdata.convert.formats",
    "ismdata.convert.sources",
    "ismdata.convert.mapping_file",
    "ismdata.convert.explain",
    "ismdata.convert.digests",
]
with atheris.instrument_imports(include=INSTRUMENTED) if "--here" in sys.argv else contextlib.nullcontext():
    import numpy as np

    from ismdata.conversation import REASONS, ROLE_NAMES
    from ismdata.convert.canonical import Rules
    from ismdata.convert.corpus_format import Choices, with_choices
    from ismdata.convert.explain import explain
    from ismdata.convert.formats.registry import FORMATS
    from ismdata.convert.json_values import parse_json
    from ismdata.convert.mapping_file import parse_mapping
    from ismdata.convert.parts import FormatChoice
    from ismdata.convert.sources.blocks import ValueBlock
    from ismdata.convert.sources.delimited import DELIMITERS, frame_rows
    from ismdata.convert.sources.framing import (
        ByteQueue,
        frame_document,
        frame_entries,
        frame_lines,
        frame_splits,
        frame_values,
        line_block,
    )
    from ismdata.convert.sources.yaml_files import frame_yaml
    from ismdata.errors import DataError, Refused, UsageError
    from tests.support.fuzz_checks import PLACE, Memory, check_block, check_file, check_grouping

#: Limits of one input.
SECONDS, MEGABYTES, LENGTH = 10, 2048, 12288
#: Ways in which records are read; an input's checksum chooses.
CHOICES = (
    Choices(roles=ROLE_NAMES, preference="chosen"),
    Choices(roles=ROLE_NAMES, assistant="both", tree="best", preference="rejected"),
    Choices(roles=ROLE_NAMES, assistant="first"),
)
NAMES = ("x", "x.jsonl", "x.json", "x.csv", "x.tsv", "x.yaml", "x.txt")

OTHER: Talk = ((U, ' "Hi",\u2028 {you} \\'), (A, "yes: <|im_end|>"), (U, "\U0001f4a1"), (A, "你好"))


# ---- targets ----


def read_format(data: bytes, *, name: str) -> None:
    chance = zlib.crc32(data)
    choices, rules = CHOICES[chance % 3], Rules(roles=ROLE_NAMES, join=chance % 5 == 0)
    check_file(data, NAMES[chance % len(NAMES)], FormatChoice(name=name, choices=choices), rules)
    corpus_format = with_choices(FORMATS[name], choices)
    if corpus_format.plain_text:
        values: Any = data.decode("utf-8", errors="replace").split("\n")
    else:
        values = _parsed(data)
        if not isinstance(values, list):
            values = [values]
        lines = "\n".join(map(json.dumps, values)).encode()
        check_block(line_block(lines, 1)[0], PLACE, corpus_format, rules)
    for value in values:
        corpus_format.matches(value)
        try:
            corpus_format.parse_record(value)
        except Refused as refusal:
            assert refusal.reason in REASONS
    check_grouping(corpus_format, values)


def read_layout(data: bytes) -> None:
    chance = zlib.crc32(data)
    name = NAMES[chance % len(NAMES)]
    check_file(data, name, FormatChoice(choices=CHOICES[chance % 3]), Rules(roles=ROLE_NAMES))


FRAMINGS: tuple[Callable[[ByteQueue], Iterator[Any]], ...] = (
    partial(frame_lines, plain_text=False),
    frame_document,
    frame_splits,
    frame_entries,
    frame_values,
    partial(frame_yaml, is_record=lambda value: isinstance(value, list)),
    *(partial(frame_rows, delimiter=delimiter) for delimiter in DELIMITERS),
    partial(frame_lines, plain_text=True),
)


class Dribble(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self.size)


def framed(data: bytes, frame: Callable[[ByteQueue], Iterator[Any]], size: int) -> list[Any] | None:
    """(split, number, record or reason) of each record; None where the whole is refused."""
    found = []
    try:
        for one in frame(ByteQueue(Dribble(data, size), "x")):
            for row, number in enumerate(one.block.numbers.tolist()):
                try:
                    found.append((one.split, number, one.block.record(row)))
                except Refused as refusal:  # noqa: PERF203
                    found.append((one.split, number, refusal.reason))
    except DataError as error:
        assert str(error)
        return None
    return found


def read_framing(data: bytes) -> None:
    """The first byte names the framing, the second the number of bytes that come at a time."""
    if len(data) < 2:
        return
    frame, size, data = FRAMINGS[data[0] % len(FRAMINGS)], data[1] % 32 + 1, data[2:]
    whole = framed(data, frame, 1 << 20)
    assert repr(whole) == repr(framed(data, frame, size)), f"records depend on the {size} bytes that come at a time"
    if frame is frame_document and isinstance(expected := _parsed(data), list):
        assert repr([record for _, _, record in whole or []]) == repr(expected), "not what json finds"


def read_mapping(data: bytes) -> None:
    """A mapping file, a NUL byte, and records that it is asked to read."""
    text, _, records = data.partition(b"\0")
    try:
        mapped = parse_mapping(text.decode("utf-8", errors="replace"), "x.toml")
    except UsageError as error:
        assert str(error)
        return
    values = _parsed(records)
    values = values if isinstance(values, list) else [values]
    corpus_format = with_choices(mapped, Choices(roles={**ROLE_NAMES, **mapped.roles}))
    check_grouping(corpus_format, values)
    block = ValueBlock(values=values, numbers=np.arange(1, len(values) + 1))
    for one, place in corpus_format.regroup(iter([(block, PLACE)])):
        check_block(one, place, corpus_format, Rules(roles=corpus_format.roles, join=corpus_format.join))


def read_guessing(data: bytes) -> None:
    chance = zlib.crc32(data)
    name = NAMES[chance % len(NAMES)]
    try:
        found = explain(Memory(data=data, name=name), FormatChoice(choices=CHOICES[chance % 3]))  # type: ignore[arg-type]
    except DataError as error:
        assert str(error)
        return
    assert found.text() and json.dumps(found.as_json())
    if found.mapping is not None:
        parse_mapping(found.mapping, "x.toml")


def _parsed(data: bytes) -> Any:
    """The JSON value that bytes hold, else nothing."""
    try:
        return parse_json(data.decode("utf-8"))
    except ValueError:
        return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "layout": read_layout,
    "framing": read_framing,
    "archives": read_layout,
    **{name: partial(read_format, name=name) for name in FORMATS},
    "mapping": read_mapping,
    "guessing": read_guessing,
}

MAPPINGS = (
    'messages = "."\nexchange = ["question", "answer"]\n\n[roles]\nquestion = "user"\nanswer = "assistant"\n',
    'messages = "utterances"\nrole = "speaker"\ncontent = "text"\nstrip = true\njoin = true\n\n[roles]\n"*" = "user"\n',
    'messages = "chat.turns"\nid = "nr"\nsystem = "a.b"\ntools = "c"\nassistant = "both"\n',
    'text = "dialogue"\nseparator = "|EOM|"\nspeaker_separator = ": "\n',
    'group = "dialogue_id"\norder = "turn"\nrole = "speaker"\ncontent = "utterance"\n',
)


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    talks = (ANCHOR, OTHER)
    plain = {
        (one.name, layout): written(one, [talk for talk in talks if one.holds(talk)], layout)
        for one in FORMATS.values()
        for layout in one.layouts
    }
    if target in FORMATS:
        return [data for (name, _), (_, data) in plain.items() if name == target]
    if target == "framing":
        return [bytes([kind, 3]) + data for kind in range(len(FRAMINGS)) for _, data in [*plain.values()][kind::9]]
    if target == "archives":
        small = [plain["messages", "lines"], plain["lists", "array"], plain["dialogue_rows", "parquet"]]
        return [packed(data, f"x{ending}", how)[1] for how in PACKED for ending, data in small]
    if target == "mapping":
        lists = [data for (_, layout), (_, data) in plain.items() if layout == "array"]
        return [text.encode() + b"\0" + data for text in MAPPINGS for data in lists]
    return [data for _, data in plain.values()]


def mutate(data: bytes, max_size: int, seed: int, others: list[bytes]) -> bytes:
    """libFuzzer's mutations, damage to bytes, and, where there is JSON, damage to its tree, whole or line by line."""
    rng = Random(seed)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(atheris.Mutate(data, max_size))
    if kind == 1:
        return mutated_bytes(data, rng, rng.choice(others))[:max_size]
    start = re.search(rb"[\[{]", data)
    head, body = (data[: start.start()], data[start.start() :]) if start else (data, b"")
    lines = body.split(b"\n")
    at = rng.randrange(len(lines))
    before, one, after = b"\n".join([*lines[:at], b""]), lines[at], b"\n".join([b"", *lines[at + 1 :]])
    value, other = _parsed(body), _parsed(one)
    if isinstance(value, list | dict):
        before, after = b"", b""
    elif isinstance(other, list | dict):
        value = other
    else:
        return mutated_bytes(data, rng, rng.choice(others))[:max_size]
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = mutated_value(value, rng)
    how: dict[str, Any] = rng.choice([{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}])
    try:
        text = json.dumps(value, **how).encode("utf-8", errors="surrogatepass")
    except (ValueError, RecursionError):
        return data
    return (head + before + text + after)[:max_size]


# ---- running ----


def fuzz_here(target: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    found = seeds(target)
    prefix = next(one.partition("=")[2] for one in arguments if one.startswith("-artifact_prefix="))

    def run(data: bytes) -> None:
        try:
            TARGETS[target](data)
        except Exception:
            # As libFuzzer calls it, which may be killed by its own alarm before it has saved it.
            Path(f"{prefix}crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    atheris.Setup(
        ["fuzz", *arguments], run, custom_mutator=lambda data, max_size, seed: mutate(data, max_size, seed, found)
    )
    atheris.Fuzz()


def fuzz(target: str, seconds: int, seed: int, findings: Path) -> bool:
    """Fuzz one target in processes of its own; whether nothing was found.

    An input that took too long is tried again: where the machine had paused, it takes no time now, and fuzzing goes on.
    """
    before = set(findings.glob(f"{target}-*"))
    executions = spent = 0
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(seeds(target)):
            (Path(corpus) / f"seed-{number}").write_bytes(data[:LENGTH])
        while True:
            started = time.monotonic()
            done = _fuzz_process(target, corpus, seconds - spent, seed + spent, findings)
            hung = re.search(r"timeout after (\d+) seconds", done.stdout)
            spent += round(time.monotonic() - started) - (int(hung[1]) if hung else 0)
            executed = re.search(r"number_of_executed_units: (\d+)", done.stdout)
            executions += int(executed[1]) if executed else 0
            found = sorted(set(findings.glob(f"{target}-*")) - before)
            if not hung or not all(_is_quick(target, path) for path in found):
                break
            for path in found:
                path.unlink()
            if spent >= seconds:
                done.returncode = 0
                break
        kept = len([*Path(corpus).iterdir()])
    if done.returncode == 0 and executed:
        print(f"{target}: {executions:,} executions, {spent} s, {kept:,} inputs kept, no finding", flush=True)
        return True
    log = findings / f"{target}.log"
    log.write_text(done.stdout, encoding="utf-8")
    names = ", ".join(map(str, found)) or f"exit code {done.returncode}"
    print(f"{target}: {executions:,} executions, {spent} s, FINDING {names}, see {log}", flush=True)
    return False


def _fuzz_process(
    target: str, corpus: str, seconds: int, seed: int, findings: Path
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--reader", target, "--here", "--", corpus]
    command += [f"-max_total_time={seconds}", f"-seed={seed}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}"]
    command += [f"-max_len={LENGTH}", "-print_final_stats=1", f"-artifact_prefix={findings}/{target}-"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def _is_quick(target: str, path: Path) -> bool:
    """Whether an input is done in time by itself, and soundly."""
    command = [sys.executable, __file__, "--reader", target, "--replay", str(path)]
    try:
        return subprocess.run(command, timeout=2 * SECONDS, capture_output=True).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reader", dest="target", default="all", help=f"all, or some of {', '.join(TARGETS)}, with commas"
    )
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="a folder for inputs that fail")
    parser.add_argument("--replay", type=Path, help="run the target on this input alone")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    targets = [*TARGETS] if arguments.target == "all" else arguments.target.split(",")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; expected all or some of {', '.join(TARGETS)}")
    if arguments.here:
        fuzz_here(targets[0], arguments.rest)
    if arguments.replay:
        TARGETS[targets[0]](arguments.replay.read_bytes())
        return 0
    findings = arguments.findings.resolve()
    findings.mkdir(parents=True, exist_ok=True)
    sound = [fuzz(target, arguments.seconds, arguments.seed, findings) for target in targets]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
