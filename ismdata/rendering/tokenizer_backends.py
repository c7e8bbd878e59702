"""The implementations of tokenizers: Hugging Face `tokenizers`, the reference, and `gigatoken`, which is faster.

Both encode an Arrow array of texts to one flat array of ids. gigatoken reads the buffers of the array and returns its
ids in one buffer, without a Python object per text or token. It is used only where its ids match the reference's: they
are compared on a sample of the corpus at the beginning, and on one text in a thousand during the run.
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


#: The share of texts that is compared with the reference during a run.
_SHARE = 0.001

#: Texts and bytes per stratum of a sample. The first text of a stratum may have more bytes, up to the last number.
_STRATUM_TEXTS = 8
_STRATUM_BYTES = 1 << 11
_LONGEST_TEXT = 1 << 15

#: Bytes of text that tokenizers encodes per call.
_SLICE_BYTES = 1 << 20

#: Bytes of text after which gigatoken is reloaded, to clear its cache. Reloading takes as long as encoding 30 MB.
_RELOAD_BYTES = 192 << 20

#: Text for which a tokenizer may have a special rule.
_SPECIAL = r"<\S+>|\[[A-Z/_]+\]|<[|｜]|[|｜]>|▁|\x{00A0}|\s{4,}"


class TokenizerEngine(Protocol):
    """Encodes plain text.

    Attributes:
        name: `hf` or `gigatoken`.
        identity: The name with the version, for the journal.
    """

    name: Literal["hf", "gigatoken"]
    identity: str

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encode texts.

        Args:
            texts: Texts without nulls.
            opening: The texts begin documents: some tokenizers put a blank before them.

        Returns:
            The ids of all texts, int32, and the number of ids per text, int64[len(texts)].

        Raises:
            BackendRefused: If gigatoken fails.
        """

    def compare(self) -> None:
        """Compare ids with the reference's: call it before the first text and again after texts.

        Raises:
            BackendDiffers: If ids differ.
            BackendRefused: If gigatoken fails.
        """


class BackendError(Exception):
    """gigatoken cannot be used; the reference can."""


class BackendRefused(BackendError):
    """gigatoken cannot work with this tokenizer, or it failed on a text."""


class BackendDiffers(BackendError):
    """gigatoken's ids differ from the reference's."""


class Reference:
    """Hugging Face `tokenizers`, without control tokens.

    Attributes:
        opening: The tokenizer for text that begins a document.
        inside: The tokenizer for all other text.
        opening_json, inside_json: The serialized tokenizers.
    """

    name: Literal["hf", "gigatoken"] = "hf"
    identity = "hf"

    def __init__(
        self, opening: tokenizers.Tokenizer, inside: tokenizers.Tokenizer, opening_json: bytes, inside_json: bytes
    ) -> None:
        self.opening, self.inside = opening, inside
        self.opening_json, self.inside_json = opening_json, inside_json

    def compare(self) -> None:
        """Do nothing: this is the reference."""

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encode texts."""
        backend = self.opening if opening else self.inside
        slices = _slices(texts, _SLICE_BYTES)
        if len(slices) == 1:
            return _encode(backend, texts)
        # Two slices at a time: copying the ids of one out of Python objects holds the interpreter lock, while all cores
        # encode the other.
        with ThreadPoolExecutor(2) as threads:
            parts = list(threads.map(partial(_encode, backend), slices))
        ids, lengths = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)


def _encode(backend: tokenizers.Tokenizer, texts: pa.LargeStringArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    encoded = backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ids = chain.from_iterable(map(attrgetter("ids"), encoded))
    return np.fromiter(ids, np.int32, int(lengths.sum())), lengths


def _slices(texts: pa.LargeStringArray, size: int) -> list[pa.LargeStringArray]:
    """Cut an array into slices of at most `size` bytes, or of one longer text; at least one slice."""
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
    """The reference's tokenizers in gigatoken.

    Args:
        reference: The reference.

    Raises:
        ImportError: If gigatoken is not installed.
        BackendRefused: If gigatoken cannot load the tokenizer.
    """

    name: Literal["hf", "gigatoken"] = "gigatoken"

    def __init__(self, reference: Reference) -> None:
        self.identity = f"gigatoken {version('gigatoken')}"
        same = reference.opening is reference.inside
        self._inside = _ReloadedTokenizer(reference.inside_json)
        self._opening = self._inside if same else _ReloadedTokenizer(reference.opening_json)

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encode texts. Raises BackendRefused if gigatoken fails."""
        with _refusals():
            encoded = (self._opening if opening else self._inside).encode_batch(_as_awkward(texts)).layout
        offsets = np.asarray(encoded.offsets.data)
        ids = np.asarray(encoded.content.data)[offsets[0] : offsets[-1]]
        # Ids are far below 2**31, so the bytes can be read as int32.
        return ids.view(np.int32), np.diff(offsets).astype(np.int64, copy=False)


class _ReloadedTokenizer:
    """A tokenizer of gigatoken that is reloaded from time to time. Threads can share it.

    gigatoken caches every word that it encodes, without a limit: at least 0.3 bytes per byte of text.
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
        """Encode awkward's array of strings."""
        with self._calls:
            # Wait until no call uses the old tokenizer, so that its memory is free before a new one is loaded.
            self._calls.wait_for(lambda: self._seen <= _RELOAD_BYTES or not self._running)
            if self._seen > _RELOAD_BYTES:
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
class EncodedSample:
    """Texts of the corpus with the ids of all, int32, and the number of ids per text, int64."""

    texts: pa.LargeStringArray
    opening: bool
    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


class ComparedGigatoken:
    """gigatoken with a comparison of its ids: on a sample before the first text, and on a random share of the texts.

    Args:
        fast: gigatoken.
        reference: The reference.
        samples: Texts with the reference's ids.
    """

    def __init__(self, fast: Gigatoken, reference: Reference, samples: Sequence[EncodedSample] = ()) -> None:
        self.name = fast.name
        self.identity = fast.identity
        self._fast, self._reference = fast, reference
        self._samples = deque(samples)  # encoded by the reference
        self._unchecked: deque[EncodedSample] = deque()  # encoded by gigatoken
        self._comparing = Lock()

    def encode(self, texts: pa.LargeStringArray, *, opening: bool) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encode texts. Raises BackendRefused if gigatoken fails."""
        ids, lengths = self._fast.encode(texts, opening=opening)
        # The choice depends on the texts alone, since calls may come in any order.
        seed = (len(texts), len(ids))
        chosen = np.flatnonzero(np.random.default_rng(seed).random(len(texts)) < _SHARE)
        if len(chosen):
            places = ragged_arange((np.cumsum(lengths) - lengths)[chosen], lengths[chosen])
            taken = texts.take(pa.array(chosen))
            self._unchecked.append(
                EncodedSample(texts=taken, opening=opening, ids=ids[places], lengths=lengths[chosen])
            )
        return ids, lengths

    def compare(self) -> None:
        """Compare the texts that were encoded before the call. Raises BackendDiffers, BackendRefused."""
        with self._comparing:
            while self._samples:
                sample = self._samples.popleft()
                found = self._fast.encode(sample.texts, opening=sample.opening)
                _compare(sample.texts, found, (sample.ids, sample.lengths))
            while self._unchecked:
                sample = self._unchecked.popleft()
                expected = self._reference.encode(sample.texts, opening=sample.opening)
                _compare(sample.texts, (sample.ids, sample.lengths), expected)


def encode_samples(texts: pa.LargeStringArray, reference: Reference) -> list[EncodedSample]:
    """Encode texts by the reference: as text inside documents, and as text that begins one if that differs."""
    positions = (False, True) if reference.opening is not reference.inside else (False,)
    encoded = [(opening, *reference.encode(texts, opening=opening)) for opening in positions]
    return [EncodedSample(texts=texts, opening=opening, ids=ids, lengths=lengths) for opening, ids, lengths in encoded]


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """The backend to use.

    Attributes:
        backend: The backend.
        notes: Sentences that the user should see.
        may_fall_back: Whether the reference may replace it if it fails or its ids differ.
    """

    backend: TokenizerEngine
    notes: tuple[str, ...] = ()
    may_fall_back: bool = False


def choose_backend(
    wanted: TokenizerBackend,
    reference: Reference,
    sample: Callable[[], pa.LargeStringArray],
    *,
    recorded: str | None = None,
) -> BackendChoice:
    """Choose the backend. gigatoken still has to be compared on the sample: call its `compare`.

    Args:
        wanted: `auto`, `hf` or `gigatoken`.
        reference: The reference.
        sample: Returns texts for the comparison; called only if gigatoken may be used.
        recorded: The identity of the backend that an interrupted run used. `auto` keeps the reference.

    Returns:
        The backend, with notes for the user.

    Raises:
        UsageError: If gigatoken is wanted and cannot be used.
    """
    if wanted == "hf" or (wanted == "auto" and recorded == reference.identity):
        return BackendChoice(backend=reference)
    try:
        # The reference encodes the sample while gigatoken loads the vocabulary, which holds the interpreter lock.
        with ThreadPoolExecutor(1) as thread:
            expected = thread.submit(encode_samples, sample(), reference)
            fast = Gigatoken(reference)
            backend = ComparedGigatoken(fast, reference, expected.result())
    except ImportError as error:
        if wanted == "auto":
            return BackendChoice(backend=reference)
        raise UsageError(
            "--tokenizer-backend gigatoken: gigatoken is not installed. Try: pip install 'ismdata[fast]'"
        ) from error
    except BackendRefused as error:
        if wanted == "auto":
            note = f"gigatoken cannot be used with this tokenizer ({error}). tokenizers is used, which is slower."
            return BackendChoice(backend=reference, notes=(note,))
        raise UsageError(
            f"--tokenizer-backend gigatoken: gigatoken cannot be used with this tokenizer ({error}). "
            "Choose --tokenizer-backend auto or hf"
        ) from error
    return BackendChoice(backend=backend, may_fall_back=wanted == "auto")


def disagreement(error: Exception) -> DataError:
    """The error if gigatoken was requested and its ids differ from the reference's, or it fails.

    Args:
        error: A BackendError.

    Returns:
        The error to raise.
    """
    return DataError(f"gigatoken does not match tokenizers: {error}. Choose --tokenizer-backend auto or hf")


def choose_sample(texts: pa.LargeStringArray) -> IntArray:
    """Choose texts for a comparison of tokenizers: long and short ones, non-ASCII, unusual, and evenly spread ones.

    Args:
        texts: Texts without nulls.

    Returns:
        The indices of the texts, int64, sorted. They depend on the texts alone.
    """
    lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
    by_length = np.argsort(lengths, kind="stable")
    strata = [
        by_length[::-1],
        by_length[lengths[by_length] > 0],
        _spread(np.flatnonzero(~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False))),
        _spread(np.flatnonzero(pc.match_substring_regex(texts, _SPECIAL).to_numpy(zero_copy_only=False))),
        _spread(np.arange(len(texts))),
    ]
    chosen: IntArray = np.unique(np.concatenate([_within_budget(stratum, lengths) for stratum in strata]))
    return chosen


def _spread(places: IntArray) -> IntArray:
    """Some of the indices, evenly spread."""
    return places[np.linspace(0, len(places) - 1, min(len(places), _STRATUM_TEXTS)).astype(np.int64)]


def _within_budget(places: IntArray, lengths: NDArray[Any]) -> IntArray:
    """The first indices whose texts fit the budget of a stratum, without overly long texts; at least one."""
    places = places[lengths[places] <= _LONGEST_TEXT][:_STRATUM_TEXTS]
    within = np.cumsum(lengths[places]) <= _STRATUM_BYTES
    within[:1] = True
    return places[within]


Ids = tuple[NDArray[np.int32], NDArray[np.int64]]


def _compare(texts: pa.LargeStringArray, found: Ids, expected: Ids) -> None:
    """Raise BackendDiffers unless the ids found are those expected."""
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
    """The ids per text."""
    ends = np.cumsum(lengths).tolist()
    return [ids[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn failures of gigatoken into BackendRefused."""
    try:
        yield
    except BaseException as error:
        # A panic in Rust is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BackendRefused((str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def _as_awkward(texts: pa.LargeStringArray) -> Any:
    """The texts as awkward's array of strings, on the same buffers."""
    import awkward as ak

    _, offsets, characters = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(characters, np.uint8) if characters is not None else np.empty(0, np.uint8)
    content = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
    return ak.Array(ak.contents.ListOffsetArray(ak.index.Index64(bounds), content, parameters={"__array__": "string"}))
