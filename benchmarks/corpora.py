"""Convert, pack and verify real corpora and print one row a corpus, as a Markdown table.

    python benchmarks/corpora.py DATA --tokenizer TOKENIZER [--chat-template FILE] [--seq-len 2048]

DATA is a folder with the corpora named below; what is not there is left out. Times are in-process, after imports,
tokenizer loading included in `pack`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ismdata.convert.pipeline import convert
from ismdata.data.verification import verify
from ismdata.errors import DataError
from ismdata.pack.pipeline import pack
from ismdata.rendering.encoding import load_encoding

CORPORA: dict[str, list[str]] = {
    "dailydialog train": ["dailydialog/train.zip"],
    "dailydialog validation": ["dailydialog/validation.zip"],
    "dailydialog test": ["dailydialog/test.zip"],
    "kdconv": ["kdconv/film", "kdconv/music", "kdconv/travel"],
    "sharegpt": ["sharegpt/sharegpt_first5000.json.gz"],
    "sharegpt, cut off": ["sharegpt/sharegpt_head_truncated.json"],
    "lima": ["lima/lima.json"],
    "openai toy": ["openai-messages/toy_chat_fine_tuning.jsonl"],
    "openai weather": ["openai-messages/weather_chat_fine_tuning.jsonl"],
    "alpaca en": ["llamafactory/alpaca_en_demo.json"],
    "alpaca zh": ["llamafactory/alpaca_zh_demo.json"],
    "identity": ["llamafactory/identity.json"],
    "oaast zh (history)": ["llamafactory/history/oaast_sft_zh.json"],
    "self cognition": ["llamafactory/history/self_cognition.json"],
    "glaive en": ["llamafactory/glaive_toolcall_en_demo.json"],
    "glaive zh": ["llamafactory/glaive_toolcall_zh_demo.json"],
    "lccc base test": ["lccc/LCCC-base_test.json"],
    "lccc toy": ["lccc/toy_data.json"],
}
HEADINGS = (
    "corpus | read | written | quarantined | packed | quarantined by pack | documents | tokens | target tokens | "
    "sequences / lower bound | convert s | pack s"
)


def files_of(data: Path, names: list[str]) -> list[str]:
    found: list[Path] = []
    for name in names:
        path = data / name
        found += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [str(path) for path in found if path.exists()]


def reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "0"


def row(name: str, files: list[str], folder: Path, arguments: argparse.Namespace) -> str:
    try:
        converted = convert(files, folder / name.replace(" ", "-"))
    except DataError as error:
        assert not (folder / name.replace(" ", "-")).exists(), "a refused corpus leaves no output"
        return f"{name} | refused: {str(error).replace(files[0], Path(files[0]).name)}"
    begin = f"{name} | {converted.read:,} | {converted.written:,} | {reasons(dict(converted.quarantined))}"
    try:
        packed = pack(
            [converted.output],
            folder / "packed",
            tokenizer=arguments.tokenizer,
            chat_template=arguments.chat_template,
            seq_len=arguments.seq_len,
            overwrite=True,
        )
    except DataError as error:
        return f"{begin} | 0 | {str(error).partition(' The first:')[0]}"
    for part in (converted.output, packed.output):
        problems = verify(part).problems
        if problems:
            raise SystemExit(f"{name}: {part.name} does not verify: {problems[0]}")
    totals, counts = packed.totals, packed.counts
    assert converted.read == converted.written + sum(converted.quarantined.values())
    assert counts["read"] == converted.written == counts["packed"] + sum(counts["quarantined"].values())
    bins = f"{totals['sequences']:,} / {totals['lower_bound_sequences']:,}"
    return (
        f"{begin} | {counts['packed']:,} | {reasons(counts['quarantined'])} | {totals['documents']:,} | "
        f"{totals['tokens']:,} | {totals['target_tokens']:,} | {bins} | {converted.seconds:.2f} | {packed.seconds:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--chat-template")
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    load_encoding(
        arguments.tokenizer, chat_template=arguments.chat_template
    )  # imports, and a fault in the call, come first
    print(f"| {HEADINGS} |\n|{'---|' * (HEADINGS.count('|') + 1)}")
    with tempfile.TemporaryDirectory() as folder:
        for name, names in CORPORA.items():
            files = files_of(arguments.data, names)
            if files:
                print(f"| {row(name, files, Path(folder), arguments)} |", flush=True)


if __name__ == "__main__":
    main()
