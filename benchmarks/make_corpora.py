"""Write real corpora as JSON Lines of messages, the files that `ismdata bench data --corpus` and its peers read.

    python benchmarks/make_corpora.py DATA OUT [--kdconv-bytes 80000000]

DATA is a folder with `sharegpt`, `kdconv` and `dailydialog` as their sources have them; what is not there is left out.
OUT gets `sharegpt.jsonl`, `dailydialog.jsonl` and `kdconv.jsonl`, the last repeated until it has that many bytes.
Repeats are varied: digits are drawn anew and messages change places with others of their speaker, so that no text cache
makes them cheaper than new ones; the lengths stay those of the corpus. The same DATA gives the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ismdata.convert.pipeline import convert

CORPORA = {
    "sharegpt": ["sharegpt/sharegpt_first5000.json.gz"],
    "kdconv": ["kdconv"],
    "dailydialog": ["dailydialog/train.zip"],
}
_DIGIT = re.compile("[0-9]")


def conversations(sources: list[Path]) -> Iterator[list[dict[str, Any]]]:
    """The messages of every conversation that can be read, role and content alone."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "converted"
        convert([str(source) for source in sources], output)
        for path in sorted(output.glob("*.arrow")):
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    for messages in batch.column("messages").to_pylist():
                        yield [{"role": each["role"], "content": each["content"]} for each in messages]


def varied(conversations: list[list[dict[str, Any]]], draw: random.Random) -> Iterator[list[dict[str, Any]]]:
    """The same conversations with other digits, each message in the place of another one of its role, without end."""
    said: dict[str, list[str]] = {}
    for message in itertools.chain.from_iterable(conversations):
        said.setdefault(message["role"], []).append(message["content"])
    while True:
        left = {role: draw.sample(contents, len(contents)) for role, contents in said.items()}
        for messages in conversations:
            yield [
                {"role": each["role"], "content": _DIGIT.sub(lambda _: draw.choice("0123456789"), text)}
                for each, text in ((each, left[each["role"]].pop()) for each in messages)
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kdconv-bytes", type=int, default=80_000_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, files in CORPORA.items():
        sources = [arguments.data / file for file in files]
        if not all(source.exists() for source in sources):
            continue
        read = list(conversations(sources))
        wanted = arguments.kdconv_bytes if name == "kdconv" else 0
        path, written = arguments.out / f"{name}.jsonl", 0
        with path.open("w", encoding="utf-8") as lines:
            for number, messages in enumerate(itertools.chain(read, varied(read, random.Random(0)) if wanted else ())):
                line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
                if number >= len(read) and written >= wanted:
                    break
                written += len(line.encode())
                lines.write(line)
        print(f"{path}: {written:,} bytes")


if __name__ == "__main__":
    main()
