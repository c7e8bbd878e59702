"""Small valid folders written by hand: rows from the oracle, files and index as format.md words them."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from functools import cache

import pyarrow as pa

from ismdata import conversation
from ismdata.data import shards
from ismdata.data.index import write_index
from tests.support import oracle

SEQ_LEN = 256
VOCABULARY, PAD, EOS = 100, 0, 1

#: Two shards; rows with one, two and three documents, full and padded, both pieces of a split conversation, an answer
#: that is not trained. Per document: conversation id and spans as (length, kind, train).
PACKED = [
    [
        [
            ("a", [(10, 0, 0), (20, 1, 0), (30, 2, 1), (15, 1, 0), (25, 2, 1)]),
            ("b", [(40, 1, 0), (60, 2, 1)]),
        ],
        [("c#0", [(6, 0, 0), (150, 1, 0), (100, 2, 1)])],
    ],
    [
        [
            ("c#1", [(6, 0, 0), (50, 1, 0), (70, 2, 1)]),
            ("d", [(20, 1, 0), (20, 2, 0), (20, 1, 0), (30, 2, 1)]),
            ("e", [(1, 1, 0), (9, 2, 1)]),
        ],
    ],
]


def write_stream(path, schema, rows, **columns):
    """An Arrow stream of dictionaries; `columns` replaces whole columns."""
    table = {field.name: [row[field.name] for row in rows] for field in schema} | columns
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table(table, schema=schema))


def entry(folder, name, rows):
    data = (folder / name).read_bytes()
    return {"name": name, "rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def packed_row(documents, *, mask, weighted, seq_len=SEQ_LEN):
    return deepcopy(_packed_row(tuple((name, tuple(spans)) for name, spans in documents), mask, weighted, seq_len))


@cache  # the oracle is slow, and most folders have the same rows
def _packed_row(documents, mask, weighted, seq_len):
    row = oracle.Row([spans for _, spans in documents], seq_len)
    loss_mask = row.loss_mask(mask)
    return {
        "input_ids": [PAD if d is None else 2 + t % 90 for t, d in enumerate(row.document_of)],
        "position_ids": row.position_ids(),
        "loss_mask": loss_mask,
        "seq_lens": row.seq_lens,
        "spans": [
            {"start": start, "end": end, "kind": kind, "train": bool(train)} for start, end, kind, train in row.spans
        ],
        "block_table": [edge for block in oracle.block_table(row.visible(mask), 128) for edge in block],
        "conversation_ids": [name for name, _ in documents],
    } | ({"loss_weight": [0.5 * target for target in loss_mask]} if weighted else {})


class PackedFolder:
    """A packed folder that can be broken in one place and then signed again, so that only its content is at fault."""

    def __init__(self, folder, *, mask="ism", weighted=False, packed=PACKED, seq_len=SEQ_LEN):
        self.folder = folder
        self.schema = shards.packed_schema(seq_len, weighted=weighted)
        self.rows = [
            [packed_row(row, mask=mask, weighted=weighted, seq_len=seq_len) for row in shard] for shard in packed
        ]
        rows = [row for shard in self.rows for row in shard]
        ids = [name for row in rows for name in row["conversation_ids"]]
        names = [name for name in ids if "#" not in name or name.endswith("#0")]
        tokens = sum(length for row in rows for length in row["seq_lens"])
        self.index = {
            "format": shards.FORMAT,
            "version": "0.0.0",
            "seq_len": seq_len,
            "block_size": 128,
            "mask": mask,
            "weighted": weighted,
            "counts": {"read": len(names) + 2, "packed": len(names), "quarantined": {"no_target": 1, "over_long": 1}},
            "totals": {
                "conversations": len(names),
                "documents": sum(len(row["seq_lens"]) for row in rows),
                "sequences": len(rows),
                "tokens": tokens,
                "target_tokens": sum(sum(row["loss_mask"]) for row in rows),
                "padding_tokens": len(rows) * seq_len - tokens,
                "lower_bound_sequences": -(-tokens // seq_len),
                "dropped": 0,
                "split": 1,
                "truncated": 0,
            },
            "tokenizer": {"name": "t", "sha256": "0" * 64, "vocab_size": VOCABULARY, "pad_id": PAD, "eos_id": EOS},
            "chat_template": {"name": "chatml", "sha256": "0" * 64},
            "options": {},
        }
        self.quarantine = [
            {"source": f"a.jsonl:{line}", "reason": reason, "detail": "so", "record": {"id": line}}
            for line, reason in enumerate(("no_target", "over_long"), 1)
        ]
        folder.mkdir()
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        self.write()

    def write(self):
        """All files from the rows, the index signed to match."""
        names = [f"shard-{number:05}.arrow" for number in range(len(self.rows))]
        for name, rows in zip(names, self.rows, strict=True):
            write_stream(self.folder / name, self.schema, rows)
        lines = "".join(json.dumps(line) + "\n" for line in self.quarantine)
        (self.folder / "quarantine.jsonl").write_text(lines, encoding="utf-8")
        self.sign()

    def sign(self):
        """Sizes and hashes of the files as they are now into the index."""
        names = [f"shard-{number:05}.arrow" for number in range(len(self.rows))]
        self.index["shards"] = [
            entry(self.folder, name, len(rows)) for name, rows in zip(names, self.rows, strict=True)
        ]
        self.index["quarantine"] = entry(self.folder, "quarantine.jsonl", len(self.quarantine))
        self.index["files"] = [entry(self.folder, "tokenizer/tokenizer.json", 0)]
        write_index(self.folder, self.index)


def message(role, content, **fields):
    empty = dict.fromkeys(field.name for field in conversation.MESSAGE_TYPE)
    return empty | {"role": role, "content": content} | fields


class ConvertedFolder:
    """The same for a converted folder: two shards, tool calls without content, one refused record."""

    def __init__(self, folder):
        self.folder = folder
        call = message("assistant", None, tool_calls='[{"name": "f", "arguments": {}}]')
        talk = [message("user", "hi"), call, message("tool", "1"), message("assistant", "one")]
        self.rows = [
            [{"id": f"{n}", "source": f"a.jsonl:{n}", "messages": talk[: 2 + 2 * (n % 2)], "tools": None, "meta": None}]
            for n in range(2)
        ]
        self.quarantine = [{"source": "a.jsonl:9", "reason": "unknown_role", "detail": "so", "record": [1]}]
        self.index = {
            "format": conversation.FORMAT,
            "version": "0.0.0",
            "counts": {"read": 3, "written": 2, "quarantined": {"unknown_role": 1}},
        }
        folder.mkdir()
        self.write()

    def write(self):
        names = [f"conversations-{number:05}.arrow" for number in range(len(self.rows))]
        for name, rows in zip(names, self.rows, strict=True):
            write_stream(self.folder / name, conversation.CONVERSATION_SCHEMA, rows)
        lines = "".join(json.dumps(line) + "\n" for line in self.quarantine)
        (self.folder / "quarantine.jsonl").write_text(lines, encoding="utf-8")
        self.sign()

    def sign(self):
        names = [f"conversations-{number:05}.arrow" for number in range(len(self.rows))]
        self.index["shards"] = [
            entry(self.folder, name, len(rows)) for name, rows in zip(names, self.rows, strict=True)
        ]
        self.index["quarantine"] = entry(self.folder, "quarantine.jsonl", len(self.quarantine))
        write_index(self.folder, self.index)
