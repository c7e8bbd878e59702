"""Raw corpora from conversations: a writer per format in `formats.registry.FORMATS`, per layout and per compression.

The writers follow the formats and know nothing of the code that reads them: what goes in must come out. Used by
`tests/hostile/test_fuzz.py`, and by `benchmarks/fuzz.py` for seeds.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet

S, U, A = "system", "user", "assistant"
#: Role and text of each message.
Talk = Sequence[tuple[str, str]]
#: What a conversation becomes in a file: its records, lines of text or JSON values.
Records = list[Any]

#: A conversation that every format can hold and that is taken for nothing else. Opens each file, for detection.
ANCHOR: Talk = ((U, "Is it open?"), (A, "Until six."), (U, "And on Sunday?"), (A, "No."))


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a conversation is written. `holds` says which ones can be, `strips` whether blanks around texts are lost."""

    name: str
    write: Callable[[Talk, str], Records]
    holds: Callable[[Talk], bool]
    layouts: tuple[str, ...]
    strips: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def comes_out(self, talk: Talk) -> list[tuple[str, str]] | None:
        """The messages that `convert` must write, None where it must refuse them."""
        texts = [(role, text.strip() if self.strips else text) for role, text in talk]
        if any(role == A and not text.strip() for role, text in texts) or not is_unicode(talk):
            return None
        return texts


def is_unicode(talk: Talk) -> bool:
    """Whether no text holds half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for _, text in talk for char in text)


# ---- what formats can hold ----


def _anything(talk: Talk) -> bool:
    return True


def _without_system(talk: Talk) -> bool:
    return all(role != S for role, _ in talk)


def _with_speakers(talk: Talk) -> bool:
    """A speaker called the system is the assistant where there is none."""
    roles = {role for role, _ in talk}
    return S not in roles or A in roles


def _alternates(talk: Talk) -> bool:
    """The user opens, and nobody speaks twice in a row."""
    return [role for role, _ in talk] == [U, A] * (len(talk) // 2) + [U] * (len(talk) % 2)


def _split(talk: Talk) -> tuple[str, Talk]:
    """The system prompt, empty where there is none, and the other messages."""
    return (talk[0][1], talk[1:]) if talk and talk[0][0] == S else ("", talk)


def _pairs(talk: Talk) -> bool:
    """Questions and their answers, after a system prompt or none; an empty prompt is one that is not there."""
    system, rest = _split(talk)
    return bool(rest) and _alternates(rest) and len(rest) % 2 == 0 and (rest is talk or bool(system))


def _as_lines(talk: Talk) -> bool:
    """No text holds what ends lines, cells or utterances."""
    return _alternates(talk) and not any(re.search(r"[\n\t]|__eou__", text) for _, text in talk)


def _as_numbered_lines(talk: Talk) -> bool:
    system, rest = _split(talk)
    # A line that ends in blanks only loses them with its tab.
    spoken = all(text.strip() for _, text in rest) and not any("persona: " in text for _, text in rest)
    return (
        spoken and _pairs([*rest]) and _as_lines(rest) and (rest is talk or bool(re.fullmatch(r"\w[\w ]*\w", system)))
    )


def _as_cells(talk: Talk) -> bool:
    return _as_lines(talk) and len(talk) > 1 and all(text.strip() for _, text in talk)


def _as_channels(talk: Talk) -> bool:
    system, rest = _split(talk)
    marked = any(re.search(r"<eo|<\|", text) for _, text in talk)
    return _pairs(talk) and not marked and (rest is talk or bool(system.strip())) and "API" not in system


def _as_string(talk: Talk) -> bool:
    return len(talk) > 1 and _alternates(talk) and not any("|EOM|" in text for _, text in talk)


# ---- writers ----


def _listed(talk: Talk, role: str, content: str, names: dict[str, str] | None = None) -> list[dict[str, str]]:
    return [{role: (names or {}).get(who, who), content: text} for who, text in talk]


def _exchanges(talk: Talk) -> list[tuple[str, str]]:
    return [(talk[at][1], talk[at + 1][1]) for at in range(0, len(talk), 2)]


def _tree_rows(talk: Talk, name: str) -> Records:
    rows: Records = []
    for at, (role, text) in enumerate(talk):
        parent = f"{name}.{at - 1}" if at else None
        who = "prompter" if role == U else role
        rows.append(
            {"message_tree_id": name, "message_id": f"{name}.{at}", "parent_id": parent, "role": who, "text": text}
        )
    return rows


def _nested_tree(talk: Talk, name: str) -> Records:
    inner: list[dict[str, Any]] = []
    for row in reversed(_tree_rows(talk, name)):
        inner = [{**row, "replies": inner}]
    return [{"message_tree_id": name, "prompt": inner[0]}]


def _alpaca(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    *history, (question, answer) = _exchanges(rest)
    record = {"id": name, "instruction": question, "input": "", "output": answer}
    return [record | ({"system": system} if system else {}) | ({"history": [*map(list, history)]} if history else {})]


def _prompt_completion(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    *history, (question, answer) = _exchanges(rest)
    record = {"id": name, "question": question, "answer": answer}
    return [record | ({"system": system} if system else {}) | ({"history": [*map(list, history)]} if history else {})]


def _moss(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    chat = {
        f"turn_{number}": {
            "Human": f"<|Human|>: {question}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "MOSS": f"<|MOSS|>: {answer}<eom>\n",
        }
        for number, (question, answer) in enumerate(_exchanges(rest), 1)
    }
    return [{"conversation_id": 1, "meta_instruction": system, "chat": chat}]


def _pairs_of(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    pairs = [{"human": question, "assistant": answer} for question, answer in _exchanges(rest)]
    return [{"id": name, "conversation": pairs} | ({"system": system} if system else {})]


def _personachat(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    persona = [f"your persona: {system}"] if system else []
    lines = persona + [f"{question}\t{answer}" for question, answer in _exchanges(rest)]
    return [f"{number} {line}" for number, line in enumerate(lines, 1)]


def _dialogue_rows(talk: Talk, name: str) -> Records:
    return [
        {"dialogue_id": name, "turn": at, "speaker": role, "utterance": text} for at, (role, text) in enumerate(talk)
    ]


def _chat_export(talk: Talk, name: str) -> Records:
    nodes: dict[str, Any] = {"root": {"id": "root", "message": None, "parent": None}}
    last = "root"
    for at, (role, text) in enumerate(talk):
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
        nodes[f"n{at}"] = {"id": f"n{at}", "message": message, "parent": last}
        last = f"n{at}"
    return [{"id": name, "mapping": nodes, "current_node": last}]


def _questions(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    questions, answers = zip(*_exchanges(rest), strict=True)
    return [{"id": name, "questions": [*questions], "answers": [*answers]} | ({"story": system} if system else {})]


def _convai(talk: Talk, name: str) -> Records:
    system, rest = _split(talk)
    texts = [text for _, text in rest]
    turns = [{"history": texts[:at], "candidates": ["x", texts[at]]} for at in range(1, len(texts), 2)]
    return [{"id": name, "utterances": turns} | ({"personality": [system]} if system else {})]


_JSON = ("lines", "lines_crlf", "array", "array_indented", "splits", "entries", "values")
_LISTS = ("lines", "lines_crlf", "array", "array_indented", "splits", "yaml")
_TEXT = ("text", "text_crlf")
_MORE = (*_JSON, "parquet", "yaml")

FORMATS: dict[str, Format] = {
    one.name: one
    for one in [
        Format(name="oasst", write=_tree_rows, holds=_without_system, layouts=(*_JSON, "parquet")),
        Format(name="oasst_trees", write=_nested_tree, holds=_without_system, layouts=_JSON),
        Format(
            name="preference",
            write=lambda talk, name: [
                {"id": name, "prompt": _listed(talk[:-1], "role", "content"), "chosen": talk[-1][1], "rejected": "x"}
            ],
            holds=lambda talk: len(talk) > 1 and talk[-1][0] == A,
            layouts=_MORE,
            options={"preference": "chosen"},
        ),
        Format(
            name="kto",
            write=lambda talk, name: [{"id": name, "messages": _listed(talk, "role", "content"), "label": True}],
            holds=_anything,
            layouts=(*_JSON, "parquet"),
        ),
        Format(
            name="utterances",
            write=lambda talk, name: [{"id": name, "utterances": _listed(talk, "speaker", "text")}],
            holds=_with_speakers,
            layouts=_MORE,
            strips=True,
        ),
        Format(
            name="messages",
            write=lambda talk, name: [{"id": name, "messages": _listed(talk, "role", "content")}],
            holds=_anything,
            layouts=_MORE,
        ),
        Format(
            name="sharegpt",
            write=lambda talk, name: [
                {"id": name, "conversations": _listed(talk, "from", "value", {U: "human", A: "gpt"})}
            ],
            holds=_anything,
            layouts=_MORE,
        ),
        Format(
            name="gemini",
            write=lambda talk, name: [
                {
                    "id": name,
                    "contents": [
                        {"role": "model" if role == A else role, "parts": [{"text": text}]} for role, text in talk
                    ],
                }
            ],
            holds=_anything,
            layouts=_MORE,
        ),
        Format(
            name="claude_export",
            write=lambda talk, name: [{"uuid": name, "chat_messages": _listed(talk, "sender", "text", {U: "human"})}],
            holds=_anything,
            layouts=_MORE,
        ),
        Format(
            name="chatgpt_export",
            write=_chat_export,
            holds=lambda talk: (S, "") not in talk,  # each of these chats has such a message, and it is none
            layouts=_JSON,
        ),
        Format(name="question_lists", write=_questions, holds=_pairs, layouts=_MORE),
        Format(name="convai", write=_convai, holds=_pairs, layouts=_MORE),
        Format(name="alpaca", write=_alpaca, holds=_pairs, layouts=_MORE),
        Format(name="moss", write=_moss, holds=_as_channels, layouts=_JSON, strips=True),
        Format(name="pairs", write=_pairs_of, holds=_pairs, layouts=_MORE),
        Format(
            name="dailydialog",
            write=lambda talk, name: ["".join(f"{text} __eou__ " for _, text in talk)],
            holds=_as_lines,
            layouts=_TEXT,
            strips=True,
        ),
        Format(
            name="kdconv",
            write=lambda talk, name: [{"id": name, "messages": [{"message": text} for _, text in talk]}],
            holds=_alternates,
            layouts=_MORE,
        ),
        Format(name="lists", write=lambda talk, name: [[text for _, text in talk]], holds=_alternates, layouts=_LISTS),
        Format(
            name="dialogue_rows",
            write=_dialogue_rows,
            holds=_with_speakers,
            layouts=(*_JSON, "parquet", "csv", "tsv", "semicolons"),
        ),
        Format(
            name="separated",
            write=lambda talk, name: [
                {"id": name, "dialogue": "|EOM|".join(f"{'Ann' if role == U else 'Bo'}: {text}" for role, text in talk)}
            ],
            holds=_as_string,
            layouts=(*_MORE, "csv", "tsv"),
            strips=True,
        ),
        Format(name="prompt_completion", write=_prompt_completion, holds=_pairs, layouts=_MORE),
        Format(name="personachat", write=_personachat, holds=_as_numbered_lines, layouts=_TEXT, strips=True),
        Format(
            name="tsv_pairs",
            write=lambda talk, name: ["\t".join(text for _, text in talk)],
            holds=_as_cells,
            layouts=_TEXT,
            strips=True,
        ),
    ]
}


# ---- layouts: the records of each conversation to the bytes of a file ----


_BEYOND_ASCII = re.compile("[^ -~]")


def _dumped(value: Any, escaped: bool, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=escaped, **how)


def _lines(talks: Sequence[Records], escaped: bool, end: str = "\n") -> str:
    return "".join(_dumped(record, escaped) + end for records in talks for record in records)


def _flat(talks: Sequence[Records]) -> Records:
    return [record for records in talks for record in records]


def _splits(talks: Sequence[Records], escaped: bool) -> str:
    half = (len(talks) + 1) // 2
    return _dumped({"train": _flat(talks[:half]), "test": _flat(talks[half:])}, escaped)


def _entries(talks: Sequence[Records], escaped: bool) -> str:
    return _dumped({f"d{number}": record for number, record in enumerate(_flat(talks), 1)}, escaped)


def _values(talks: Sequence[Records], escaped: bool) -> str:
    return "\n".join(_dumped(record, escaped, indent=1) for record in _flat(talks))


def _escape(found: re.Match[str]) -> str:
    return f"\\U{ord(found.group()):08x}"


def _yaml(talks: Sequence[Records], escaped: bool) -> str:
    """A block list of values in flow style: JSON, but for the escapes beyond the first 65,536 characters."""
    texts = [_dumped(record, False) for record in _flat(talks)]
    return "".join(f"- {_BEYOND_ASCII.sub(_escape, text)}\n" for text in texts)


def _table(talks: Sequence[Records], delimiter: str) -> str:
    rows = _flat(talks)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [*rows[0]], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _parquet(talks: Sequence[Records]) -> bytes:
    out, rows = io.BytesIO(), _flat(talks)
    names = dict.fromkeys(name for row in rows for name in row)
    pyarrow.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), out)
    return out.getvalue()


#: The ending of a file's name, and its text; `escaped` writes JSON in ASCII.
_LAYOUTS: dict[str, tuple[str, Callable[[Sequence[Records], bool], str]]] = {
    "lines": (".jsonl", _lines),
    "lines_crlf": (".jsonl", lambda talks, escaped: _lines(talks, escaped, "\r\n")),
    "array": (".json", lambda talks, escaped: _dumped(_flat(talks), escaped)),
    "array_indented": (".json", lambda talks, escaped: _dumped(_flat(talks), escaped, indent=2)),
    "splits": (".json", _splits),
    "entries": (".json", _entries),
    "values": (".json", _values),
    "yaml": (".yaml", _yaml),
    "csv": (".csv", lambda talks, escaped: _table(talks, ",")),
    "tsv": (".tsv", lambda talks, escaped: _table(talks, "\t")),
    "semicolons": (".csv", lambda talks, escaped: _table(talks, ";")),
    "text": (".txt", lambda talks, escaped: "".join(f"{line}\n" for line in _flat(talks))),
    "text_crlf": (".txt", lambda talks, escaped: "".join(f"{line}\r\n" for line in _flat(talks))),
}
#: Layouts in which half of a surrogate pair can be written at all: as an escape.
ESCAPING = frozenset({"lines", "lines_crlf", "array", "array_indented", "splits", "entries", "values"})


def written(form: Format, talks: Sequence[Talk], layout: str, *, escaped: bool = True) -> tuple[str, bytes]:
    """The ending of a file's name, and its bytes. Half surrogate pairs are written as escapes, where that can be."""
    records = [form.write(talk, f"t{number}") for number, talk in enumerate(talks)]
    if layout == "parquet":
        return ".parquet", _parquet(records)
    ending, text = _LAYOUTS[layout]
    return ending, text(records, escaped or not all(map(is_unicode, talks))).encode("utf-8")


# ---- compressions and archives ----


def _zipped(data: bytes, name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(f"data/{name}"), data)
        archive.writestr(zipfile.ZipInfo("README"), b"About the data.")
    return out.getvalue()


def _tarred(data: bytes, name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member, content in (("README", b"About the data."), (f"data/{name}", data)):
            header = tarfile.TarInfo(member)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return out.getvalue()


def _gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


#: What is put behind a file's name, and its bytes packed.
PACKED: dict[str, tuple[str, Callable[[bytes, str], bytes]]] = {
    "plain": ("", lambda data, name: data),
    "gz": (".gz", lambda data, name: _gzipped(data)),
    "bz2": (".bz2", lambda data, name: bz2.compress(data)),
    "xz": (".xz", lambda data, name: lzma.compress(data)),
    "zst": (".zst", lambda data, name: pa.compress(data, codec="zstd", asbytes=True)),
    "zip": (".zip", _zipped),
    "tar": (".tar", _tarred),
    "tar.gz": (".tar.gz", lambda data, name: _gzipped(_tarred(data, name))),
    "gz in zip": (".zip", lambda data, name: _zipped(_gzipped(data), f"{name}.gz")),
}


def packed(data: bytes, name: str, how: str) -> tuple[str, bytes]:
    """The file's name and bytes, packed as a key of PACKED says."""
    ending, pack = PACKED[how]
    return name + ending, pack(data, name)
