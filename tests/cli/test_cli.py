"""The command line from outside: exit codes, messages on stderr, JSON on stdout, nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ismdata.cli.main import app
from ismdata.data.index import write_index

GOOD = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Result, code: int, *parts: str) -> None:
    """The call ended with `code` and one error on stderr that names all `parts`; no traceback, no output."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("cli")
    (base / "chats.jsonl").write_text(f"{GOOD}\n{GOOD}\nbroken\n", encoding="utf-8")
    result = run("convert", base / "chats.jsonl", "-o", base / "converted")
    assert result.exit_code == 0, result.stderr
    return base / "converted"


@pytest.fixture(scope="module")
def packed(converted: Path, smollm2: Path) -> Path:
    folder = converted.parent / "packed"
    result = run("pack", converted, "-o", folder, "--tokenizer", smollm2, "--seq-len", 256)
    assert result.exit_code == 0, result.stderr
    return folder


def test_json_is_one_object_on_stdout(converted: Path, packed: Path, smollm2: Path, tmp_path: Path) -> None:
    source = converted.parent / "chats.jsonl"
    calls = {
        "convert": ("convert", source, "-o", tmp_path / "c", "--json"),
        "pack": ("pack", converted, "-o", tmp_path / "p", "--tokenizer", smollm2, "--seq-len", 256, "--json"),
        "verify": ("verify", packed, "--json"),
        "inspect": ("inspect", packed, "--json"),
        "inspect converted": ("inspect", converted, "--json"),
        "inspect row": ("inspect", packed, "--row", 0, "--json"),
    }
    for name, call in calls.items():
        result = run(*call)
        assert result.exit_code == 0, (name, result.stderr)
        assert isinstance(json.loads(result.stdout), dict), name


def test_inspect_shows_a_row(packed: Path) -> None:
    result = run("inspect", packed, "--row", 0)
    assert result.exit_code == 0
    assert "Hello<|im_end|>" in result.stdout
    refused(run("inspect", packed, "--row", 7), 2, "7", "row")


def test_verify_exits_with_1_and_says_what_is_wrong(packed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(packed, tmp_path / "packed")
    assert run("verify", tmp_path / "packed").exit_code == 0
    shard = tmp_path / "packed" / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = run("verify", tmp_path / "packed")
    assert result.exit_code == 1
    assert "shard-00000.arrow" in result.stdout + result.stderr
    assert "SHA-256" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", b"", ["empty.jsonl"]),
        ("blank.jsonl", b"\n\n", ["blank.jsonl"]),
        ("nothing.json", b"[]", ["nothing.json"]),
        ("latin.jsonl", GOOD.replace("Hi", "Grüß").encode("latin-1"), ["latin.jsonl", "UTF-8"]),
        ("utf16.jsonl", GOOD.encode("utf-16"), ["utf16.jsonl", "UTF-8"]),
        ("cut.json", b"[" + GOOD.encode() + b', {"messages": [{"ro', ["cut.json", "record 2"]),
        ("broken.jsonl", b'{"messages": [}\n', ["broken.jsonl:1"]),
        (
            "roles.jsonl",
            GOOD.replace("assistant", "narrator").encode(),
            ["roles.jsonl:1", "'narrator'", "--role narrator=assistant"],
        ),
        ("other.jsonl", b'{"a": 1}\n', ["other.jsonl"]),
    ],
)
def test_convert_refuses(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(run("convert", tmp_path / name, "-o", tmp_path / "out"), 1, *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.slow
def test_calls_that_cannot_be(converted: Path, packed: Path, smollm2: Path, tmp_path: Path) -> None:
    source = converted.parent / "chats.jsonl"
    out = tmp_path / "out"
    refused(run("convert", tmp_path / "none.jsonl", "-o", out), 1, "none.jsonl")
    refused(run("convert", source, "-o", out, "--role", "wizard"), 2, "expected NAME=ROLE")
    refused(run("convert", source, "-o", out, "--role", "wizard=mage"), 2, "mage")
    refused(run("convert", source, "-o", out, "--format", "nonsense"), 2, "nonsense")
    refused(run("convert", source, "-o", converted), 2, "in use", "--overwrite")
    refused(run("convert", source, "-o", source), 2, "is a file")
    tokenizer = ("--tokenizer", smollm2)
    refused(run("pack", converted, "-o", out, *tokenizer, "--seq-len", 1000), 2, "multiple of 128")
    refused(run("pack", converted, "-o", out, *tokenizer, "--mask", "full"), 2)
    refused(run("pack", converted, "-o", out, *tokenizer, "--template-date", "tomorrow"), 2, "YYYY-MM-DD")
    refused(run("pack", converted, "-o", out, *tokenizer, "--template-arg", "thinking"), 2, "NAME=VALUE")
    refused(run("pack", packed, "-o", out, *tokenizer), 1, "ismdata.packed/1", "ismdata.conversations/1")
    refused(run("pack", source, "-o", out, *tokenizer), 1, "found a file", "ismdata convert")
    refused(run("pack", tmp_path / "none", "-o", out, *tokenizer), 1, "found nothing")
    refused(
        run("pack", converted, "-o", out, "--tokenizer", tmp_path / "none"),
        1,
        "no such file or folder, and no name that the hub can have; expected a folder with tokenizer.json",
    )
    refused(run("pack", converted, "-o", packed, *tokenizer), 2, "in use")
    refused(run("verify", tmp_path / "none"), 1, "none")
    refused(run("inspect", tmp_path / "none"), 1, "none")
    refused(run("train", converted, "--model", "tiny", "-o", out), 1, "ismdata.packed/1")
    refused(run("train", packed, "--model", "huge", "-o", out), 1, "huge")
    refused(run("chat", tmp_path / "none"), 1, "none")
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_its_own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "chats.jsonl").write_text(GOOD, encoding="utf-8")
    (work / "precious.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(work)
    for output in (".", "..", tmp_path, work):
        refused(run("convert", "chats.jsonl", "-o", output, "--overwrite"), 2, "--overwrite does not replace")
    refused(run("convert", work / "chats.jsonl", "-o", "../work", "--overwrite"), 2, "--overwrite does not replace")
    assert sorted(path.name for path in work.iterdir()) == ["chats.jsonl", "precious.txt"]
    assert run("convert", "chats.jsonl", "-o", "out").exit_code == 0
    assert run("convert", "chats.jsonl", "-o", "out", "--overwrite").exit_code == 0
    refused(run("convert", "out/quarantine.jsonl", "-o", "out", "--overwrite"), 2, "holds the input")
    (work / "link").symlink_to("out")
    refused(run("convert", "chats.jsonl", "-o", "link", "--overwrite"), 2, "link")
    assert sorted(path.name for path in work.iterdir()) == ["chats.jsonl", "link", "out", "precious.txt"]


def test_an_index_that_lacks_keys_is_named(packed: Path, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for kind in ("conversations", "packed"):
        write_index(tmp_path / "broken", {"format": f"ismdata.{kind}/1"})
        refused(run("inspect", tmp_path / "broken"), 1, "index.json: shards is missing; expected a list")
    refused(run("train", tmp_path / "broken", "--model", "tiny", "-o", tmp_path / "out"), 1, "shards is missing")


def test_compressed_sources(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(GOOD)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("in/b.jsonl", GOOD)
    result = run("convert", tmp_path / "a.jsonl.gz", tmp_path / "b.zip", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["written"] == 2


@pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small file system takes root on Linux"
)
def test_a_full_disk(converted: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("no file system can be mounted here")  # root in a container may lack the right to
    try:
        (tmp_path / "big.jsonl").write_text((GOOD.replace("Hello", "x" * 4000) + "\n") * 100, encoding="utf-8")
        refused(run("convert", tmp_path / "big.jsonl", "-o", small / "out"), 1, "out", "No space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_help_teaches_and_is_light() -> None:
    for command in ("convert", "pack", "verify", "inspect", "train", "chat", "demo"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) > 5
    code = "import sys; from ismdata.cli import app; from typer.testing import CliRunner"
    code += "; CliRunner().invoke(app, ['--help'])"
    code += "; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
