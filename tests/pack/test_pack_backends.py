"""Packing gives the same shards whichever backend makes the ids, and leaves one that differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ismdata.pack.tokenize
from ismdata.convert.pipeline import convert
from ismdata.data.index import INDEX_NAME
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.pack.pipeline import pack
from ismdata.pack.report import PackReport
from ismdata.rendering.encoding import load_encoding
from ismdata.rendering.tokenizer import Tokenizer, load_pretrained
from ismdata.rendering.tokenizer_backends import (
    BackendRefused,
    ComparedGigatoken,
    EncodedSample,
    Gigatoken,
    Reference,
    choose_backend,
    encode_samples,
)
from tests.conftest import encoding
from tests.pack.test_pack import bytes_tokenizer as bytes_tokenizer  # a fixture
from tests.rendering.test_tokenizer_backends import large as large
from tests.support.reporters import Recorder

# ---- packing ----


def write_corpus(path: Path, count: int) -> None:
    words = ["Hello", "你好", "naïve café", "<|im_end|>", "</s>", "12345", "def f(x):\n    return x", "🙂🙂", " "]
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            said = [" ".join(rng.choice(words, rng.integers(1, 9)).tolist()) + f" {k}" for _ in range(4)]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            file.write(json.dumps({"id": str(k), "messages": messages}, ensure_ascii=False) + "\n")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_corpus(folder / "talks.jsonl", 120)
    convert([str(folder / "talks.jsonl")], folder / "talks")
    return folder / "talks"


@pytest.fixture
def packed(
    converted: Path, bytes_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[PackReport, list[str]]]:
    """Pack the corpus, in several batches; the report and the notes."""
    loaded = load_encoding(str(bytes_tokenizer))
    monkeypatch.setattr(ismdata.pack.pipeline, "load_pretrained", lambda name: loaded.tokenizer.pretrained)
    monkeypatch.setattr(ismdata.pack.pipeline, "probe_encoding", lambda *arguments, **options: loaded)
    monkeypatch.setattr(ismdata.data.conversations, "_BATCH_CONVERSATIONS", 40)

    def run(name: str = "packed", **options: Any) -> tuple[PackReport, list[str]]:
        recorder = Recorder()
        report = pack([converted], tmp_path / name, tokenizer="bytes", seq_len=512, reporter=recorder, **options)
        assert verify(report.output).problems == []
        return report, [note for note in recorder.notes if "gigatoken" in note]

    return run


def content(folder: Path) -> dict[str, Any]:
    """All files of a folder, and its index without the backend's name and the index's own hash."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    index = json.loads(found.pop(INDEX_NAME))
    del index["tokenizer"]["backend"], index["options"]["tokenizer_backend"], index["sha256"]
    return found | {INDEX_NAME: index}


def used(folder: Path) -> tuple[str, str]:
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    return index["options"]["tokenizer_backend"], index["tokenizer"]["backend"]


@pytest.mark.slow
def test_the_same_bytes_for_any_backend_and_any_number_of_workers(
    packed: Callable[..., Any], converted: Path, bytes_tokenizer: Path, tmp_path: Path
) -> None:
    report, notes = packed("auto")
    assert notes == []
    assert used(report.output) == ("auto", "gigatoken")
    for backend, workers in (("hf", 1), ("gigatoken", 2)):
        folder = tmp_path / backend
        words = ["pack", converted, "-o", folder, "--tokenizer", bytes_tokenizer, "--seq-len", 512]
        words += ["--tokenizer-backend", backend, "--workers", workers]
        code = "import sys\nfrom ismdata.cli import app\napp(sys.argv[1:], standalone_mode=False)\n"
        code += "assert 'torch' not in sys.modules\n"
        subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, capture_output=True)
        assert used(folder) == (backend, backend)
        assert {name: data for name, data in content(folder).items() if name.endswith(".arrow")} == {
            name: data for name, data in content(report.output).items() if name.endswith(".arrow")
        }


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """gigatoken gives a wrong id for texts that contain one of the words in this list."""
    words: list[str] = []
    encode = Gigatoken.encode

    def spoiled(self: Gigatoken, texts: pa.LargeStringArray, *, opening: bool) -> Any:
        ids, lengths = encode(self, texts, opening=opening)
        ids = ids.copy()
        for text, end in zip(texts.to_pylist(), np.cumsum(lengths).tolist(), strict=True):
            if any(word in text for word in words):
                ids[end - 1] ^= 1
        return ids, lengths

    monkeypatch.setattr(Gigatoken, "encode", spoiled)
    return words


def assert_left_for_the_reference(packed: Callable[..., Any], report: Any, notes: list[str], expected: Any) -> None:
    """gigatoken was dropped with one note, the shards are the reference's, and requesting gigatoken is an error."""
    assert len(notes) == 1
    assert "gigatoken is not used" in notes[0]
    assert used(report.output) == ("auto", "hf")
    assert content(report.output) == content(expected.output)
    with pytest.raises(DataError, match=r"does not match .*Choose --tokenizer-backend auto or hf"):
        packed("asked-for", tokenizer_backend="gigatoken")


def test_a_difference_on_the_sample_means_the_reference(packed: Callable[..., Any], wrong: list[str]) -> None:
    expected, _ = packed("expected", tokenizer_backend="hf")
    wrong.append("café")
    report, notes = packed()
    assert_left_for_the_reference(packed, report, notes, expected)
    assert not (report.output.parent / "asked-for").exists()


def test_a_difference_found_later_means_all_over_again(
    packed: Callable[..., Any], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only text that differs is in the third of three batches, and no sample has it."""
    expected, _ = packed("expected", tokenizer_backend="hf")
    wrong.append(" 111")
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends.encode_samples", lambda texts, reference: [])
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends._SHARE", 1.0)
    report, notes = packed()
    assert_left_for_the_reference(packed, report, notes, expected)


def test_a_difference_that_only_law_5_sees(
    packed: Callable[..., Any], wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template is not blamed for it: skeletons stay in use."""
    expected, _ = packed("expected", tokenizer_backend="hf")
    wrong.append(" 0")
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends.encode_samples", lambda texts, reference: [])
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends._SHARE", 0.0)
    report, notes = packed()
    assert_left_for_the_reference(packed, report, notes, expected)


@pytest.mark.slow
def test_threads_may_share_gigatoken(deepseek: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while one of them reloads it, and whether or not it uses threads of its own."""
    reference = Tokenizer(load_pretrained(str(deepseek)), name="deepseek", template="").reference
    batches = [
        large([f"word{n} {k} of many, naïve 你好 " * 8 for k in range(12_000 // (1 + 40 * (n % 2)))]) for n in range(6)
    ]
    alone = Gigatoken(reference)
    expected = [alone.encode(batch, opening=False) for batch in batches]
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends._RELOAD_BYTES", 4 << 20)
    shared = Gigatoken(reference)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda batch: shared.encode(batch, opening=False), batches * 2))
    for (ids, lengths), (own_ids, own_lengths) in zip(found, expected * 2, strict=True):
        assert np.array_equal(ids, own_ids)
        assert np.array_equal(lengths, own_lengths)


def test_what_was_encoded_is_compared_once_the_comparison_is_over(
    bytes_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another thread is comparing: a batch is spooled when its own call returns."""
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends._SHARE", 1.0)
    reference = load_encoding(str(bytes_tokenizer)).tokenizer.reference
    backend = ComparedGigatoken(Gigatoken(reference), reference)
    backend.encode(large(["text"]), opening=False)
    began, may_end = Event(), Event()
    encode = Reference.encode

    def slow(self: Reference, texts: pa.LargeStringArray, *, opening: bool) -> Any:
        began.set()
        assert may_end.wait(10)
        return encode(self, texts, opening=opening)

    monkeypatch.setattr(Reference, "encode", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(backend.compare)
        assert began.wait(10)
        second = threads.submit(backend.compare)
        with pytest.raises(NotYet):
            second.result(timeout=0.2)
        may_end.set()
        assert first.result() is second.result() is None


def test_no_text_to_compare(bytes_tokenizer: Path) -> None:
    reference = load_encoding(str(bytes_tokenizer)).tokenizer.reference
    ComparedGigatoken(Gigatoken(reference), reference, encode_samples(large([]), reference)).compare()


def test_each_way_has_a_gigatoken_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    monkeypatch.setattr(
        "ismdata.rendering.tokenizer_backends._ReloadedTokenizer",
        lambda serialized: read.append(serialized) or serialized,
    )
    opening, inside = object(), object()
    apart: Any = Gigatoken(Reference(opening, inside, b"opening", b"inside"))  # type: ignore[arg-type]
    assert (apart._opening, apart._inside, sorted(read)) == (b"opening", b"inside", [b"inside", b"opening"])
    read.clear()
    same: Any = Gigatoken(Reference(opening, opening, b"both", b"both"))  # type: ignore[arg-type]
    assert (same._opening, same._inside, read) == (b"both", b"both", [b"both"])


def test_the_sample_that_is_compared_is_of_the_corpus(
    packed: Callable[..., Any], converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def noted(texts: pa.LargeStringArray, reference: Reference) -> list[EncodedSample]:
        compared.extend(texts.to_pylist())
        return encode_samples(texts, reference)

    monkeypatch.setattr("ismdata.rendering.tokenizer_backends.encode_samples", noted)
    packed()
    assert compared
    assert (
        compared
        == ismdata.pack.tokenize.sampled_texts([ismdata.data.conversations.ConvertedFolder(converted)]).to_pylist()
    )


def test_what_gigatoken_refuses(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = encoding(smollm2).tokenizer.reference
    chosen = choose_backend("auto", reference, lambda: large(["text"]))
    assert chosen.backend is reference
    assert ["cannot be used with this tokenizer" in note for note in chosen.notes] == [True]
    with pytest.raises(UsageError, match="Choose --tokenizer-backend auto or hf"):
        choose_backend("gigatoken", reference, lambda: large([]))


def test_gigatoken_is_not_installed(packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    report, notes = packed()
    assert notes == []
    assert used(report.output) == ("auto", "hf")
    with pytest.raises(UsageError, match=r"pip install 'ismdata\[fast\]'"):
        packed("asked-for", tokenizer_backend="gigatoken")
    with pytest.raises(UsageError, match="expected one of auto, hf, gigatoken"):
        packed("asked-for", tokenizer_backend="fast")


class PanicException(BaseException):
    """How Rust's panics appear in Python."""


@pytest.mark.parametrize("error", [RuntimeError, PanicException], ids=["error", "panic"])
def test_a_failure_in_the_middle(
    error: type[BaseException], packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = packed("expected", tokenizer_backend="hf")
    import gigatoken

    calls: list[int] = []
    encode = gigatoken.Tokenizer.encode_batch

    def fails(self: Any, texts: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:  # the first one is the sample
            raise error("index out of bounds\nat bpe.rs")
        return encode(self, texts)

    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", fails)
    report, notes = packed()
    assert len(notes) == 1
    assert "not used (index out of bounds)" in notes[0]
    assert content(report.output) == content(expected.output)


def test_an_interrupt_is_no_failure(bytes_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gigatoken

    backend = Gigatoken(load_encoding(str(bytes_tokenizer)).tokenizer.reference)

    def interrupted(self: Any, texts: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.encode(large(["a"]), opening=False)
    monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", lambda self, texts: 1 / 0)
    with pytest.raises(BackendRefused, match="division by zero"):
        backend.encode(large(["a"]), opening=False)


# ---- resuming after a crash ----


class Death(BaseException):
    """The end of a process."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Record after every batch, and end at the batch of that number, counted over all runs."""

    def at(number: int) -> None:
        make, made = ismdata.pack.tokenize.make_documents, []

        def dying(*arguments: Any) -> Any:
            made.append(1)
            if len(made) == number:
                raise Death
            return make(*arguments)

        monkeypatch.setattr(ismdata.pack.tokenize, "make_documents", dying)
        monkeypatch.setattr("ismdata.data.journal.Journal.due", lambda self: True)

    return at


def test_a_run_goes_on_with_the_backend_that_it_had(
    packed: Callable[..., Any], wrong: list[str], killed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gigatoken is dropped in the second batch, the run ends in the reference's second: gigatoken is not used again."""
    expected, _ = packed("expected", tokenizer_backend="hf")
    wrong.append(" 55")
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends.encode_samples", lambda texts, reference: [])
    monkeypatch.setattr("ismdata.rendering.tokenizer_backends._SHARE", 1.0)
    killed(4)
    with pytest.raises(Death):
        packed()
    monkeypatch.setattr(Gigatoken, "__init__", lambda self, reference: pytest.fail("asked again"))
    report, _ = packed()
    assert content(report.output) == content(expected.output)


def test_a_run_whose_backend_is_gone_begins_again(
    packed: Callable[..., Any], killed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = packed("expected", tokenizer_backend="hf")
    killed(3)
    with pytest.raises(Death):
        packed()
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    report, notes = packed()
    assert [note for note in notes if "Tokenizing starts again" in note]
    assert used(report.output) == ("auto", "hf")
    assert content(report.output) == content(expected.output)
