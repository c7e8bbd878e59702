"""What a `pack` run counts, the index of the packed folder, and the report returned to the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ismdata
from ismdata.conversation import Quarantined
from ismdata.data import FORMAT, QUARANTINE_NAME, ShardFile, describe_file, entries
from ismdata.masks import BLOCK_SIZE
from ismdata.pack.documents import BatchResult
from ismdata.pack.job import PackJob
from ismdata.pack.planning.plan import lower_bound


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did.

    Attributes:
        output: The packed folder.
        counts: Conversations `read`, `packed` and `quarantined` (by reason).
        totals: The totals of the index: documents, sequences, tokens and so on.
        notes: What the user should know about the tokenizer and its template.
        first_refusals: The first quarantined conversation of each reason.
        seconds: Wall-clock seconds of the call.
        parts: The report of each split, by the name of its folder; empty if the output is one folder.
    """

    output: Path
    counts: dict[str, Any]
    totals: dict[str, int]
    notes: tuple[str, ...]
    first_refusals: tuple[Quarantined, ...]
    seconds: float
    parts: dict[str, PackReport] = field(default_factory=dict)


@dataclass
class Tally:
    """Totals summed over batches. `weighted`: whether any message has a weight."""

    conversations: int = 0
    target_tokens: int = 0
    split: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: int = 0
    unwritten_reasoning: int = 0
    weighted: bool = False

    def add(self, result: BatchResult, *, conversations: int) -> None:
        """Add the counts of a batch of which `conversations` were packed."""
        self.conversations += conversations
        names = ("target_tokens", "split", "truncated", "truncated_tokens", "dropped", "unwritten_reasoning")
        for name in names:
            setattr(self, name, getattr(self, name) + getattr(result, name))

    def totals(self, lengths: NDArray[np.int32], seq_len: int, *, sequences: int) -> dict[str, int]:
        """The totals of the index. lengths: int32[D], tokens of each document; sequences: their number."""
        tokens = int(lengths.sum(dtype=np.int64))
        return {
            "conversations": self.conversations,
            "documents": len(lengths),
            "sequences": sequences,
            "tokens": tokens,
            "target_tokens": self.target_tokens,
            "padding_tokens": sequences * seq_len - tokens,
            "lower_bound_sequences": lower_bound(lengths, seq_len),
            "dropped": self.dropped,
            "split": self.split,
            "truncated": self.truncated,
            "truncated_tokens": self.truncated_tokens,
            "unwritten_reasoning": self.unwritten_reasoning,
        }


def conversation_counts(read: int, packed: int, quarantined: Mapping[str, int]) -> dict[str, Any]:
    """The counts of the index: conversations read = packed + quarantined."""
    lost = read - packed - sum(quarantined.values())
    if lost:
        raise AssertionError(f"{lost} of {read} conversations are neither packed nor quarantined")
    return {"read": read, "packed": packed, "quarantined": dict(sorted(quarantined.items()))}


def packed_index(
    job: PackJob,
    shards: Sequence[ShardFile],
    *,
    counts: Mapping[str, Any],
    totals: Mapping[str, int],
    weighted: bool,
    backend: str,
) -> dict[str, Any]:
    """The index of a packed folder.

    Args:
        job: The run; its folder holds the tokenizer and the quarantine.
        shards: The finished shards, in order.
        counts: From `conversation_counts`.
        totals: From `Tally.totals`.
        weighted: Whether the shards have loss weights.
        backend: Name of the tokenizer backend that encoded the texts.

    Returns:
        The content of `index.json`, without its own hash.
    """
    options, encoding, folder = job.options, job.encoding, job.folder
    tokenizer, template, profile = encoding.tokenizer, encoding.renderer.template, encoding.renderer.profile
    files = sorted(path for path in (folder / "tokenizer").rglob("*") if path.is_file())
    described = [describe_file(path, 0) for path in files]
    glm: dict[str, Any] = {}  # the plain layout is not named
    if encoding.glm is not None:
        glm = {"layout": "glm", "glm_tokens": {"mask": encoding.glm.mask_id, "start": encoding.glm.start_id}}
    return {
        "format": FORMAT,
        "version": ismdata.__version__,
        "seq_len": options.seq_len,
        "block_size": BLOCK_SIZE,
        "mask": options.mask,
        **glm,
        "weighted": weighted,
        "counts": counts,
        "totals": totals,
        "tokenizer": {
            "name": Path(tokenizer.name).name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "eos_id": tokenizer.eos_id,
            "backend": backend,
        },
        "chat_template": {
            "name": template.name,
            "sha256": template.sha256,
            "history": options.history,
            "prefix_stable": profile.prefix_stable,
            "end_of_turn": profile.end_of_turn,
            "next_turn_ends": list(profile.next_turn_ends),
            "date": template.date.isoformat() if template.prints_date else None,
            "arguments": dict(template.arguments),
        },
        "shards": entries(list(shards)),
        "files": [
            {**entry, "name": str(path.relative_to(folder))}
            for entry, path in zip(entries(described), files, strict=True)
        ],
        "inputs": [{"rows": source.rows, "shards": [file.sha256 for file in source.files]} for source in job.sources],
        "options": {
            "over_long": options.over_long,
            "prefix_every": options.prefix_every,
            "train_on": options.train_on,
            "seed": options.seed,
            "tokenizer_backend": options.tokenizer_backend,
        },
        "quarantine": asdict(describe_file(folder / QUARANTINE_NAME, sum(counts["quarantined"].values()))),
    }
