"""The measurements of `ismdata bench data`, one per function. Each runs in its own process:

    python -m ismdata.bench.data.stages NAME '{"argument": "value"}'

prints one JSON object. So threads, caches and memory peaks of one measurement do not affect another. Times are taken
after the imports. Ours and the yardstick run in alternation, round after round.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from ismdata.choices import TokenizerBackend
    from ismdata.pack import PackReport

#: Texts and bytes that yardsticks get at a time, about as many as `pack` gives a tokenizer.
_TEXTS_AT_ONCE = 32_768
_BYTES_AT_ONCE = 8 << 20
#: Planning is measured on log-normal lengths of conversations, about 800 tokens on average.
_LENGTHS_MEDIAN, _LENGTHS_SIGMA = 500.0, 1.0
_SAMPLED_EVERY = 0.02


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How `pack` is called: the options that measurements vary."""

    tokenizer: str
    chat_template: str | None
    seq_len: int
    backend: TokenizerBackend


def in_turn(rounds: int, **jobs: Callable[[], object]) -> dict[str, dict[str, list[float]]]:
    """Time each job, round after round.

    Returns:
        `{"seconds": {name: […]}, "cpu": {name: […]}}`, one number per round. `cpu` is processor time of all threads
        of this process; it varies less than the clock when other processes use the machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            gc.collect()
            started, busy = time.perf_counter(), time.process_time()
            job()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - busy)
    return {"seconds": seconds, "cpu": cpu}


def convert(corpus: str, scratch: str, rounds: int) -> dict[str, Any]:
    """Compare `convert` with `pyarrow.json.read_json`, which only parses."""
    from pyarrow import json as pa_json

    from ismdata.convert import convert

    output = Path(scratch) / "converted"
    with open(corpus, "rb") as lines:  # noqa: PTH123
        longest = max(map(len, lines))
    # 1 MiB, the default, unless a line is longer: read_json refuses lines longer than its blocks.
    options = pa_json.ReadOptions(block_size=max(1 << 20, 1 << longest.bit_length()))
    return in_turn(
        rounds,
        ours=lambda: convert([corpus], output, overwrite=True),
        yardstick=lambda: pa_json.read_json(corpus, read_options=options),
    )


def pack(converted: str, scratch: str, rounds: int, packing: dict[str, Any]) -> dict[str, Any]:
    """Compare `pack` with its tokenizer alone.

    `yardstick` encodes the texts of all messages; `same` encodes the texts that `pack` gives the tokenizer, which
    include what the template writes around messages. `setup` is what `ours` does first: load the tokenizer and probe
    the template.
    """
    how = Packing(**packing)
    ours = _packing(Path(converted), scratch, how)
    # A new tokenizer each time, as in `pack`: tokenizers cache words, and a second run would find all of them cached.
    unused = [_encoder(how) for _ in range(2 * rounds)]
    messages, same = (
        [_given(piece, how.backend) for piece in _pieces(texts)]
        for texts in (_texts(Path(converted)), _texts_encoded(Path(converted), how))
    )

    setup = _setup(how)

    def alone(pieces: list[Any]) -> None:
        encode = unused.pop()
        for piece in pieces:
            encode(piece)

    return in_turn(
        rounds,
        setup=setup,
        ours=ours,
        yardstick=lambda: alone(messages),
        same=lambda: alone(same),
    )


def road(corpus: str, scratch: str, rounds: int, packing: dict[str, Any]) -> dict[str, Any]:
    """`convert`, then `pack`; `setup` as in `pack`."""
    from ismdata.convert import convert

    converted = Path(scratch) / "converted"
    how = Packing(**packing)
    pack = _packing(converted, scratch, how)

    def ours() -> None:
        convert([corpus], converted, overwrite=True)
        pack()

    return in_turn(rounds, setup=_setup(how), ours=ours)


def plan(documents: int, seq_len: int, rounds: int) -> dict[str, Any]:
    """Plan log-normal lengths. The peak includes the lengths, the plan, and temporary arrays."""
    from ismdata.pack import lower_bound, plan

    rng = np.random.Generator(np.random.PCG64(0))
    lengths = np.empty(documents, np.int32)
    for start in range(0, documents, 1 << 20):
        drawn = rng.lognormal(np.log(_LENGTHS_MEDIAN), _LENGTHS_SIGMA, min(1 << 20, documents - start))
        lengths[start : start + len(drawn)] = np.clip(drawn, 1, seq_len)
    rows: list[int] = []
    timed = in_turn(rounds, ours=lambda: rows.append(len(plan(lengths, seq_len=seq_len, seed=0).row_documents)))
    return timed | {"sequences": rows[-1], "lower_bound": lower_bound(lengths, seq_len), "peak_bytes": _peak()}


def memory(converted: str, scratch: str, packing: dict[str, Any]) -> dict[str, Any]:
    """The peak memory of `pack`: all resident memory including mapped files, and the part without them."""
    pack = _packing(Path(converted), scratch, Packing(**packing))
    with _anonymous_peak() as anonymous:
        report = pack()
    shutil.rmtree(report.output)
    return {"peak_bytes": _peak(), "anonymous_bytes": max(anonymous), "tokens": report.totals["tokens"]}


def loader(packed: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """A pass of a DataLoader over PackedDataset and Collator. The first pass, which maps the files, does not count."""
    import torch
    from torch.utils.data import DataLoader

    from ismdata.data import Collator, PackedDataset

    torch.set_num_threads(1)
    dataset = PackedDataset(packed)
    batches = DataLoader(dataset, batch_size=batch_size, collate_fn=Collator())

    def one_pass() -> int:
        return sum(batch["input_ids"].numel() for batch in batches)

    tokens = one_pass()
    passes = max(1, 20_000_000 // tokens)  # long enough to measure
    timed = in_turn(rounds, ours=lambda: [one_pass() for _ in range(passes)])
    return timed | {"tokens": tokens * passes}


def verify(packed: str, rounds: int) -> dict[str, Any]:
    """`verify` of a packed folder: files, hashes and every invariant of every row."""
    from ismdata.data import verify

    counts = verify(Path(packed)).counts
    return in_turn(rounds, ours=lambda: verify(Path(packed))) | {"tokens": counts["tokens"]}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (convert, pack, road, plan, memory, loader, verify)
}


def _packing(converted: Path, scratch: str, how: Packing) -> Callable[[], PackReport]:
    """The call of `pack` to measure, with `pack` already imported."""
    from ismdata.pack import pack

    return lambda: pack(
        [converted],
        Path(scratch) / "packed",
        tokenizer=how.tokenizer,
        chat_template=how.chat_template,
        seq_len=how.seq_len,
        tokenizer_backend=how.backend,
        overwrite=True,
    )


def _texts(converted: Path) -> Iterator[pa.LargeStringArray]:
    """The texts of all messages of a converted folder."""
    from ismdata.data import ConvertedFolder

    for batch in ConvertedFolder(converted).batches():
        yield batch.column("messages").flatten().field("content").drop_null().cast(pa.large_string())


def _texts_encoded(converted: Path, how: Packing) -> list[pa.LargeStringArray]:
    """The texts that `pack` gives to its tokenizer."""
    from ismdata.data import ConvertedFolder
    from ismdata.pack import PackOptions, tokenizer_texts
    from ismdata.rendering import load_encoding

    encoding = load_encoding(how.tokenizer, chat_template=how.chat_template)
    options = PackOptions(tokenizer=how.tokenizer, chat_template=how.chat_template, seq_len=how.seq_len)
    return list(tokenizer_texts([ConvertedFolder(converted)], encoding, options))


def _pieces(texts: Iterable[pa.LargeStringArray]) -> Iterator[pa.LargeStringArray]:
    """Split texts into pieces of bounded size."""
    for contents in texts:
        while len(contents):
            sizes = np.cumsum(pa.compute.binary_length(contents[:_TEXTS_AT_ONCE]).to_numpy())
            taken = max(1, int(np.searchsorted(sizes, _BYTES_AT_ONCE, side="right")))
            yield contents[:taken]
            contents = contents[taken:]


def _setup(how: Packing) -> Callable[[], object]:
    """What `pack` does before it reads. Called once here, so that no job pays for imports or caches of another."""
    from ismdata.rendering import Gigatoken, load_encoding

    def setup() -> None:
        reference = load_encoding(how.tokenizer, chat_template=how.chat_template).tokenizer.reference
        if how.backend == "gigatoken":
            Gigatoken(reference)

    setup()
    if how.backend == "gigatoken":
        import awkward  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  gigatoken imports it at its first text
    return setup


def _encoder(how: Packing) -> Callable[[Any], object]:
    """A tokenizer alone, from texts to ids: `encode_batch_fast` of tokenizers, or `encode_batch` of gigatoken."""
    from ismdata.rendering import load_pretrained

    reference = load_pretrained(how.tokenizer).backend_tokenizer
    if how.backend == "hf":
        # Read the ids: tokenizers converts them only when they are read.
        return lambda texts: [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]
    from gigatoken import Tokenizer

    encode: Callable[[Any], object] = Tokenizer.from_json(reference.to_str()).encode_batch
    return encode


def _given(texts: pa.LargeStringArray, backend: TokenizerBackend) -> Any:
    """Texts in the form that the tokenizer reads fastest, prepared before the clock starts."""
    if backend == "hf":
        return texts.to_pylist()
    import awkward  # type: ignore[import-untyped, unused-ignore]

    return awkward.from_arrow(texts, highlevel=True)


def _peak() -> int:
    """The peak memory of this process, in bytes. Not ru_maxrss: that may include what the parent held at the fork."""
    status = Path("/proc/self/status")
    if status.is_file():
        return _status("VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def _anonymous_peak() -> Iterator[list[int]]:
    """Sample memory that belongs to no file while the body runs. Yields the list of samples, in bytes."""
    samples = [0]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLED_EVERY):
            samples.append(_status("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    if Path("/proc/self/status").is_file():
        sampler.start()
    try:
        yield samples
    finally:
        done.set()
        if sampler.is_alive():
            sampler.join()


def main() -> None:
    name, arguments = sys.argv[1:]
    print(json.dumps(MEASUREMENTS[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
