"""Convert every folder of real corpora, verify what comes out, and print one row a call, as a Markdown table.

    python benchmarks/convert_corpora.py DATA

DATA is a folder of folders. Each is converted as it is, by its name alone; after it come the calls that say more about
some of them (`FURTHER`). What is not there is left out. A call that is refused shows its error.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from ismdata.choices import Preference, Side
from ismdata.convert.options import Selection
from ismdata.convert.pipeline import convert
from ismdata.data.verification import verify
from ismdata.errors import DataError

#: Sources below DATA and options, as the command line has them.
FURTHER: list[tuple[list[str], dict[str, str]]] = [
    (["sharegpt/sharegpt_first5000.json.gz"], {}),
    (["firefly/dummy_dpo.jsonl"], {"preference": "chosen"}),
    (["llamafactory/dpo_zh_demo.json", "llamafactory/v1_dpo_demo.jsonl"], {"preference": "chosen"}),
    (["llamafactory/kto_en_demo.json"], {"preference": "rejected"}),
    (["lccc/toy_train.txt", "lccc/toy_valid.txt"], {}),
    ([f"xdailydialog/{name}_human.txt" for name in ("en_dev", "en_test", "zh_dev", "zh_test")], {}),
    (["topical-chat"], {"assistant": "both"}),
    (["dailydialog/train.zip"], {"against": "dailydialog/test.zip"}),
    (["meld/train_sent_emo.csv"], {"role": "Joey=assistant"}),
    (["fastchat/mt_bench/question.jsonl"], {}),
]
HEADINGS = "ismdata convert … -o OUT | read | written | quarantined | repeats | taken for"


def row(call: str, sources: list[str], options: dict[str, str]) -> str:
    side: Side | None = options.get("assistant")  # type: ignore[assignment]
    preference: Preference | None = options.get("preference")  # type: ignore[assignment]
    name, _, role = options.get("role", "").partition("=")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        try:
            report = convert(
                sources,
                output,
                roles={name: role} if name else {},
                assistant=side,
                preference=preference,
                selection=Selection(against=(options["against"],) if "against" in options else ()),
            )
        except DataError as error:
            assert not output.exists(), "a refused corpus leaves no output"
            return f"`{call}` | refused: {error}"
        problems = verify(output).problems
        if problems:
            raise SystemExit(f"{call}: does not verify: {problems[0]}")
    assert report.read == report.written + sum(report.quarantined.values())
    refused = ", ".join(f"{count:,} `{reason}`" for reason, count in report.quarantined.items()) or "0"
    formats = sorted({f"{source.format}, {source.layout}" for source in report.sources if source.records})
    return f"`{call}` | {report.read:,} | {report.written:,} | {refused} | {report.duplicates:,} | {'; '.join(formats)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data.resolve()
    folders = [([path.name], {}) for path in sorted(data.iterdir()) if path.is_dir()]
    print(f"| {HEADINGS} |\n|{'---|' * (HEADINGS.count('|') + 1)}")
    os.chdir(data)  # so that the calls are those a person types there
    for sources, options in [*folders, *FURTHER]:
        if all(Path(source).exists() for source in sources):
            call = " ".join([*sources, *(f"--{name} {value}" for name, value in options.items())])
            print(f"| {row(call, sources, options)} |", flush=True)


if __name__ == "__main__":
    main()
