"""Tiny random models, packed rows and packed folders, for the tests that use torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ismdata import masks
from ismdata.data import shards
from ismdata.data.dataset import Sample
from ismdata.data.index import write_index

torch.set_num_threads(1)  # for such small models more threads are slower

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # wide, so that the effect of a token is far above rounding
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, layer_types=["full_attention"] * 2),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_model(architecture: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture]()).to(dtype).eval()


def checkpoint_activations(model: PreTrainedModel, *, use_reentrant: bool = False) -> None:
    """Turn on gradient checkpointing, by the name that the installed release of transformers has for it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


#: A document: spans of (kind, length) or (kind, length, train).
Document = list[tuple]
PROMPT, QUERY, ANSWER = masks.PROMPT, masks.QUERY, masks.ANSWER


def spans_of(documents: list[Document]) -> tuple[list[int], np.ndarray]:
    """seq_lens and spans, int64[S, 4], of documents laid end to end."""
    spans, seq_lens, at = [], [], 0
    for document in documents:
        begin = at
        for kind, length, *train in document:
            spans.append((at, at + length, kind, train[0] if train else kind == ANSWER))
            at += length
        seq_lens.append(at - begin)
    return seq_lens, np.array(spans, np.int64).reshape(-1, 4)


def sample(
    documents: list[Document],
    *,
    seq_len: int = 128,
    mask: str = "ism",
    seed: int = 0,
    tokens: list[int] | None = None,
    block_size: int = masks.BLOCK_SIZE,
    loss_weight: np.ndarray | None = None,
) -> Sample:
    """A packed row with random tokens (or `tokens`, padded with 0)."""
    seq_lens, spans = spans_of(documents)
    used = sum(seq_lens)
    input_ids = np.zeros(seq_len, np.int32)
    input_ids[:used] = np.random.default_rng(seed).integers(2, VOCABULARY, used) if tokens is None else tokens
    intervals = masks.intervals(seq_lens, spans, seq_len=seq_len, mask=mask)
    return Sample(
        mask=mask,
        sequence=shards.PackedSequence(
            input_ids=input_ids,
            position_ids=masks.position_ids(seq_lens, seq_len=seq_len),
            loss_mask=masks.targets(seq_lens, spans, seq_len=seq_len, mask=mask),
            seq_lens=np.array(seq_lens, np.int32),
            spans=spans.astype(np.int32),
            block_table=masks.block_table(*intervals, block_size=block_size),
            conversation_ids=[str(number) for number in range(len(documents))],
            loss_weight=loss_weight,
        ),
    )


def write_packed(
    folder: Path,
    samples: list[Sample],
    *,
    rows_per_shard: int = 3,
    rows_per_batch: int = 1 << 20,
    vocab_size: int = VOCABULARY,
) -> Path:
    """A packed folder of these samples, several shards, without a tokenizer."""
    folder.mkdir(parents=True)
    weighted = samples[0].sequence.loss_weight is not None
    seq_len = len(samples[0].sequence.input_ids)
    schema = shards.packed_schema(seq_len, weighted=weighted)
    entries = []
    for number, first in enumerate(range(0, len(samples), rows_per_shard)):
        rows = [_as_row(each.sequence, weighted) for each in samples[first : first + rows_per_shard]]
        path = folder / f"shard-{number:05}.arrow"
        with pa.ipc.new_stream(str(path), schema) as stream:
            stream.write_table(pa.Table.from_pylist(rows, schema=schema), max_chunksize=rows_per_batch)
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries.append({"name": path.name, "rows": len(rows), "bytes": len(content), "sha256": digest})
    index = {
        "format": shards.FORMAT,
        "version": "0",
        "seq_len": seq_len,
        "block_size": masks.BLOCK_SIZE,
        "mask": samples[0].mask,
        "weighted": weighted,
        "shards": entries,
        "tokenizer": {"vocab_size": vocab_size, "pad_id": 0, "eos_id": 2},
    }
    write_index(folder, index)
    return folder


def _as_row(sequence: shards.PackedSequence, weighted: bool) -> dict:
    row = {
        name: getattr(sequence, name).reshape(-1).tolist()
        for name in ("input_ids", "position_ids", "loss_mask", "seq_lens", "block_table")
    }
    row["spans"] = [
        {"start": start, "end": end, "kind": kind, "train": bool(train)}
        for start, end, kind, train in sequence.spans.tolist()
    ]
    row["conversation_ids"] = sequence.conversation_ids
    if weighted:
        row["loss_weight"] = sequence.loss_weight.tolist()
    return row
