"""Who makes token ids of text: Hugging Face `tokenizers`, which is the reference, or `gigatoken`, which is faster.

Both take an Arrow array of texts and give flat ids. gigatoken reads the array's own buffers and gives its ids in one
buffer; no Python object is made for a text or a token. It is believed only as far as it is compared: on a sample of the
corpus before the work, and on one text in a thousand meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from operator import attrgetter
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ismdata.arrays import IntArray, ragged_arange
from ismdata.choices import TokenizerBackend
from ismdata.errors import DataError, UsageError
from ismdata.memory import give_back

if TYPE_CHECKING:
    import tokenizers


#: The share of texts that is compared with the reference on the way.
_SHARE = 0.001

#: Texts and bytes of each stratum of a sample; a longer text is taken where it comes first in its stratum.
_STRATUM_TEXTS = 8
_STRATUM_BYTES = 1 << 11
_LONGEST_TEXT = 1 << 15

#: Bytes of text that tokenizers gets at a time.
_SLICE_BYTES = 1 << 20

#: Bytes of text after which gigatoken forgets the words it has seen. Loading it takes as long as some 30 MB of text.
_REMEMBERED_BYTES = 192 << 20

#: What looks like a piece that a tokenizer may treat by itself.
_SPECIAL_LOOKING = r"<\S+>|\[[A-Z/_]+\]|<[|｜]|[|｜]>|▁|\x{00A0}|\s{4,}"


class TokenizerEngine(Protocol):
    """Makes ids of plain text. `identity` names it with its version, as a journal records it."""

    name: Literal["hf", "gigatoken"]
    identity: str

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All ids end to end, int32, and how many each text has, int64[len(texts)].

        texts: no nulls. opening: they open a document, so that a blank may be put before them.
        """

    def compare(self) -> None:
        """Compare with the reference what is to be compared: before the first text, and again behind texts. Raises
        BackendDiffers, BackendRefused.
        """


class BackendError(Exception):
    """gigatoken cannot be used; the reference can."""


class BackendRefused(BackendError):
    """gigatoken cannot work with this tokenizer, or it failed on a text."""


class BackendDiffers(BackendError):
    """gigatoken's ids differ from the reference's."""


class Reference:
    """Hugging Face `tokenizers`, without control tokens: one for text that opens a document, one for text inside.

    `opening_json` and `inside_json` are what they were read from.
    """

    name: Literal["hf", "gigatoken"] = "hf"
    identity = "hf"

    def __init__(
        self, opening: tokenizers.Tokenizer, inside: tokenizers.Tokenizer, opening_json: bytes, inside_json: bytes
    ) -> None:
        self.opening, self.inside = opening, inside
        self.opening_json, self.inside_json = opening_json, inside_json

    def compare(self) -> None:
        """Nothing: it is the reference."""

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        backend = self.opening if opening else self.inside
        slices = _slices(texts, _SLICE_BYTES)
        if len(slices) == 1:
            return _encoded(backend, texts)
        # Two at a time: the ids of one are taken out of Python's objects, which holds Python's lock, while all cores
        # work on the other. Slices, because tokenizers does not begin other texts before it is through with these.
        with ThreadPoolExecutor(2) as threads:
            parts = list(threads.map(partial(_encoded, backend), slices))
        ids, lengths = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)


def _encoded(backend: tokenizers.Tokenizer, texts: pa.LargeStringArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    encoded = backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ids = chain.from_iterable(map(attrgetter("ids"), encoded))
    return np.fromiter(ids, np.int32, int(lengths.sum())), lengths


def _slices(texts: pa.LargeStringArray, size: int) -> list[pa.LargeStringArray]:
    """The texts in order in slices of at most `size` bytes, or of one longer text; at least one slice."""
    ends = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False))
    slices: list[pa.LargeStringArray] = []
    at = 0
    while at < len(texts) or not slices:
        before = ends[at - 1] if at else 0
        end = max(int(np.searchsorted(ends, before + size, side="right")), at + 1)
        slices.append(texts[at:end])
        at = end
    return slices


class Gigatoken:
    """The same tokenizers, read by gigatoken. Raises ImportError where it is not installed, BackendRefused."""

    name: Literal["hf", "gigatoken"] = "gigatoken"

    def __init__(self, reference: Reference) -> None:
        self.identity = f"gigatoken {version('gigatoken')}"
        same = reference.opening is reference.inside
        self._inside = _Forgetting(reference.inside_json)
        self._opening = self._inside if same else _Forgetting(reference.opening_json)

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Raises BackendRefused where gigatoken fails."""
        with _refusals():
            encoded = (self._opening if opening else self._inside).encode_batch(_as_awkward(texts)).layout
        offsets = np.asarray(encoded.offsets.data)
        ids = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]]
        # Ids are far below 2**31: the same bytes are int32.
        return ids.view(np.int32), np.diff(offsets).astype(np.int64, copy=False)


class _Forgetting:
    """A tokenizer of gigatoken that is loaded anew once in a while.

    It remembers every word that it has seen, without a limit: 0.3 bytes and more for each byte of text. Threads may
    share it, as a test shows.
    """

    def __init__(self, serialized: bytes) -> None:
        self._serialized = serialized
        self._calls = Condition()
        self._running = 0
        self._load()

    def _load(self) -> None:
        from gigatoken import Tokenizer

        with _refusals():
            self._tokenizer = Tokenizer.from_json(self._serialized)
        self._seen = 0

    def encode_batch(self, texts: Any) -> Any:
        with self._calls:
            # Nobody may hold on to the old one: another one takes as much memory.
            self._calls.wait_for(lambda: self._seen <= _REMEMBERED_BYTES or not self._running)
            if self._seen > _REMEMBERED_BYTES:
                del self._tokenizer
                give_back()
                self._load()
            self._seen += texts.nbytes
            self._running += 1
        try:
            return self._tokenizer.encode_batch(texts)
        finally:
            with self._calls:
                self._running -= 1
                self._calls.notify_all()


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Texts of the corpus and their ids: end to end, int32, and how many each has, int64."""

    texts: pa.LargeStringArray
    opening: bool
    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


class Compared:
    """gigatoken, compared with the reference: on a sample before the first text, and on a random share of the texts
    (the same share at every run).
    """

    def __init__(self, fast: Gigatoken, reference: Reference, samples: Sequence[Sampled] = ()) -> None:
        self.name = fast.name
        self.identity = fast.identity
        self._fast, self._reference = fast, reference
        self._samples = deque(samples)  # by the reference
        self._found: deque[Sampled] = deque()  # by gigatoken
        self._comparing = Lock()

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Raises BackendRefused."""
        ids, lengths = self._fast.encode(texts, opening=opening)
        # Of the texts alone, for calls may come in any order.
        seed = (len(texts), len(ids))
        chosen = np.flatnonzero(np.random.default_rng(seed).random(len(texts)) < _SHARE)
        if len(chosen):
            places = ragged_arange((np.cumsum(lengths) - lengths)[chosen], lengths[chosen])
            taken = texts.take(pa.array(chosen))
            self._found.append(Sampled(texts=taken, opening=opening, ids=ids[places], lengths=lengths[chosen]))
        return ids, lengths

    def compare(self) -> None:
        """Raises BackendRefused, BackendDiffers. When it returns, all texts encoded before the call are compared."""
        with self._comparing:
            while self._samples:
                sample = self._samples.popleft()
                found = self._fast.encode(sample.texts, opening=sample.opening)
                _compare(sample.texts, found, (sample.ids, sample.lengths))
            while self._found:
                sample = self._found.popleft()
                expected = self._reference.encode(sample.texts, opening=sample.opening)
                _compare(sample.texts, (sample.ids, sample.lengths), expected)


def sampled(texts: pa.LargeStringArray, reference: Reference) -> list[Sampled]:
    """Texts encoded by the reference in each of its ways."""
    ways = (False, True) if reference.opening is not reference.inside else (False,)
    encoded = [(way, *reference.encode(texts, opening=way)) for way in ways]
    return [Sampled(texts=texts, opening=way, ids=ids, lengths=lengths) for way, ids, lengths in encoded]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A backend, and what a user should be told about the choice. `may_leave`: whether the reference may take over."""

    backend: TokenizerEngine
    notes: tuple[str, ...] = ()
    may_leave: bool = False


def choose_backend(
    wanted: TokenizerBackend,
    reference: Reference,
    sample: Callable[[], pa.LargeStringArray],
    *,
    recorded: str | None = None,
) -> Chosen:
    """The backend to use; gigatoken is yet to be compared on the texts that `sample` gives, by `compare`.

    recorded: the identity of the backend that an interrupted run went with; `auto` stays with the reference then.
    Raises UsageError where gigatoken is asked for and cannot be used.
    """
    if wanted == "hf" or (wanted == "auto" and recorded == reference.identity):
        return Chosen(backend=reference)
    try:
        # The reference works on the sample while gigatoken reads the vocabulary, which holds Python's lock.
        with ThreadPoolExecutor(1) as thread:
            expected = thread.submit(sampled, sample(), reference)
            fast = Gigatoken(reference)
            backend = Compared(fast, reference, expected.result())
    except ImportError as error:
        if wanted == "auto":
            return Chosen(backend=reference)
        raise UsageError(
            "--tokenizer-backend gigatoken: gigatoken is not installed. Try: pip install 'ismdata[fast]'"
        ) from error
    except BackendRefused as error:
        if wanted == "auto":
            note = f"gigatoken cannot be used with this tokenizer ({error}): tokenizers is used, which is slower."
            return Chosen(backend=reference, notes=(note,))
        raise UsageError(
            f"--tokenizer-backend gigatoken: gigatoken cannot be used with this tokenizer ({error}). "
            "Choose --tokenizer-backend auto or hf"
        ) from error
    return Chosen(backend=backend, may_leave=wanted == "auto")


def disagreement(error: Exception) -> DataError:
    """What is raised where gigatoken was asked for and does not give the reference's ids, or fails."""
    return DataError(f"gigatoken does not agree with tokenizers: {error}. Choose --tokenizer-backend auto or hf")


def stratified(texts: pa.LargeStringArray) -> IntArray:
    """Places of the longest and shortest texts, of some beyond ASCII, some with what looks like a special piece, and
    some from all over. Sorted; the same for the same texts.
    """
    lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
    by_length = np.argsort(lengths, kind="stable")
    strata = [
        by_length[::-1],
        by_length[lengths[by_length] > 0],
        _spread(np.flatnonzero(~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False))),
        _spread(np.flatnonzero(pc.match_substring_regex(texts, _SPECIAL_LOOKING).to_numpy(zero_copy_only=False))),
        _spread(np.arange(len(texts))),
    ]
    chosen: IntArray = np.unique(np.concatenate([_within_budget(stratum, lengths) for stratum in strata]))
    return chosen


def _spread(places: IntArray) -> IntArray:
    """Some of the places, evenly."""
    return places[np.linspace(0, len(places) - 1, min(len(places), _STRATUM_TEXTS)).astype(np.int64)]


def _within_budget(places: IntArray, lengths: NDArray[Any]) -> IntArray:
    """The first places, as many as may be encoded for a sample, but at least the first that is not overly long."""
    places = places[lengths[places] <= _LONGEST_TEXT][:_STRATUM_TEXTS]
    within = np.cumsum(lengths[places]) <= _STRATUM_BYTES
    within[:1] = True
    return places[within]


Ids = tuple[NDArray[np.int32], NDArray[np.int64]]


def _compare(texts: pa.LargeStringArray, found: Ids, expected: Ids) -> None:
    """Raise BackendDiffers unless the ids found are those expected, each end to end with how many a text has."""
    if np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1]):
        return
    for text, ids, own in zip(texts.to_pylist(), _split(*found), _split(*expected), strict=True):
        if not np.array_equal(ids, own):
            at = next((k for k, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
            shown = text if len(text) <= 60 else text[:60] + "…"
            raise BackendDiffers(
                f"for {shown!r} gigatoken gives {ids[at : at + 4].tolist()} at token {at}, "
                f"tokenizers gives {own[at : at + 4].tolist()}"
            )


def _split(ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    """The ids of each text."""
    ends = np.cumsum(lengths).tolist()
    return [ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn failures of gigatoken into BackendRefused."""
    try:
        yield
    except BaseException as error:
        # What panics in Rust is no Exception, and its class has no name to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BackendRefused((str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def _as_awkward(texts: pa.LargeStringArray) -> Any:
    """The array's own buffers as awkward's array of strings."""
    import awkward as ak

    _, offsets, characters = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(characters, np.uint8) if characters is not None else np.empty(0, np.uint8)
    content = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
    return ak.Array(ak.contents.ListOffsetArray(ak.index.Index64(bounds), content, parameters={"__array__": "string"}))
