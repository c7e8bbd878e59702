"""Raw corpora from conversations: a writer per format in `formats.registry.FORMATS`, per layout and per compression.

The writers follow the formats and know nothing of the code that reads them: what goes in must come out. Used by
`tests/hostile/test_fuzz.py`, and by `benchmarks/fuzz.py` for seeds.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.raw_layouts import ESCAPING as ESCAPING
from tests.support.raw_layouts import LAYOUTS, Records, parquet_of
from tests.support.raw_layouts import PACKED as PACKED
from tests.support.raw_layouts import packed as packed

S, U, A = "system", "user", "assistant"
#: Role and text of each message.
Talk = Sequence[tuple[str, str]]

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


def _full_pairs(talk: Talk) -> bool:
    """`_pairs` without empty questions, which are no messages."""
    return _pairs(talk) and not any(role == U and not text.strip() for role, text in talk)


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


def _telegram(talk: Talk, name: str) -> Records:
    said = [{"type": "message", "from": who, "from_id": who, "text": text} for who, text in talk]
    return [{"id": name, "type": "personal_chat", "messages": said}]


def _open_webui(talk: Talk, name: str) -> Records:
    nodes = {
        f"n{at}": {"id": f"n{at}", "parentId": f"n{at - 1}" if at else None, "role": role, "content": text}
        for at, (role, text) in enumerate(talk)
    }
    return [{"id": name, "chat": {"history": {"messages": nodes, "currentId": f"n{len(talk) - 1}"}}}]


def _claude_code(talk: Talk, name: str) -> Records:
    return [
        {
            "type": role,
            "sessionId": name,
            "uuid": f"{name}.{at}",
            "parentUuid": f"{name}.{at - 1}" if at else None,
            "message": {"role": role, "content": text},
        }
        for at, (role, text) in enumerate(talk)
    ]


def _codex(talk: Talk, name: str) -> Records:
    items = [{"type": "message", "role": role, "content": text} for role, text in talk]
    rows = [{"type": "response_item", "payload": item} for item in items]
    return [{"type": "session_meta", "payload": {"id": name}}, *rows]


def _tavern(talk: Talk, name: str) -> Records:
    header = {"user_name": "Kim", "character_name": "Ada"}
    return [header, *({"name": "Kim", "is_user": role == U, "mes": text} for role, text in talk)]


def _studio(talk: Talk, name: str) -> Records:
    versions = [
        {"type": "singleStep", "role": role, "content": [{"type": "text", "text": text}]} for role, text in talk
    ]
    return [{"id": name, "messages": [{"versions": [one], "currentlySelected": 0} for one in versions]}]


def _log(talk: Talk, name: str) -> Records:
    *asked, answer = _listed(talk, "role", "content")
    return [{"id": name, "request": {"messages": asked}, "response": {"choices": [{"message": answer}]}}]


def _spoken_by_both(talk: Talk) -> bool:
    """Somebody else speaks second, and no text is empty: such messages are left out."""
    return _as_string(talk) and all(text.strip() for _, text in talk)


def _people(name: str, write: Callable[[Talk, str], Records], *layouts: str) -> Format:
    """A format of chats of people, in which a text that is a notice or a mark is left out."""
    return Format(name=name, write=write, holds=_spoken_by_both, layouts=layouts or ("lines", "lines_crlf", "values"))


_JSON = ("lines", "lines_crlf", "array", "array_indented", "splits", "entries", "values")
_LISTS = ("lines", "lines_crlf", "array", "array_indented", "splits", "yaml")
_TEXT = ("text", "text_crlf")
_MORE = (*_JSON, "parquet", "yaml")

FORMATS: dict[str, Format] = {
    one.name: one
    for one in [
        _people("telegram", _telegram),
        _people(
            "slack",
            lambda talk, name: [
                [{"type": "message", "user": who, "text": html.escape(text, False), "ts": "1"} for who, text in talk]
            ],
        ),
        _people(
            "discord",
            lambda talk, name: [{"messages": [{"content": text, "author": {"name": who}} for who, text in talk]}],
        ),
        _people(
            "messenger",
            lambda talk, name: [
                {
                    "participants": [],
                    "messages": [
                        {"sender_name": who, "content": text, "timestamp_ms": at} for at, (who, text) in enumerate(talk)
                    ],
                }
            ],
        ),
        _people(
            "google_chat",
            lambda talk, name: [
                {"messages": [{"creator": {"name": who}, "text": text, "created_date": "x"} for who, text in talk]}
            ],
        ),
        Format(
            name="whatsapp",
            write=lambda talk, name: [f"31.12.20, 22:15 - {who}: {text}" for who, text in talk],
            holds=lambda talk: talk is ANCHOR,  # a file has one chat
            layouts=_TEXT,
        ),
        Format(
            name="sillytavern",
            write=_tavern,
            holds=lambda talk: _without_system(talk) and len(talk) > 0,
            layouts=("lines", "lines_crlf", "array", "values"),
        ),
        Format(
            name="text_generation_webui",
            write=lambda talk, name: [{"internal": [*map(list, _exchanges(talk))], "visible": []}],
            holds=lambda talk: _pairs(talk) and _without_system(talk) and all(text for _, text in talk),
            layouts=("lines", "lines_crlf", "array", "values"),
        ),
        Format(name="open_webui", write=_open_webui, holds=lambda talk: len(talk) > 0, layouts=_JSON),
        Format(name="lm_studio", write=_studio, holds=lambda talk: len(talk) > 0, layouts=_JSON),
        Format(
            name="claude_code",
            write=_claude_code,
            holds=_without_system,
            layouts=("lines", "lines_crlf", "array", "values"),
        ),
        Format(name="codex", write=_codex, holds=_anything, layouts=("lines", "lines_crlf", "array", "values")),
        Format(
            name="langchain",
            write=lambda talk, name: [
                {
                    "id": name,
                    "messages": [
                        {"type": {U: "human", A: "ai"}.get(role, role), "data": {"content": text}}
                        for role, text in talk
                    ],
                }
            ],
            holds=_anything,
            layouts=_JSON,
        ),
        Format(name="api_log", write=_log, holds=lambda talk: len(talk) > 1, layouts=_JSON),
        Format(
            name="described",
            write=lambda talk, name: [
                {"id": name, "dialogue": [{"turn": who, "data": {"utterance": text}} for who, text in talk]}
            ],
            holds=_with_speakers,
            layouts=_JSON,
        ),
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
        Format(name="alpaca", write=_alpaca, holds=_full_pairs, layouts=_MORE),
        Format(name="moss", write=_moss, holds=_as_channels, layouts=_JSON, strips=True),
        Format(name="pairs", write=_pairs_of, holds=_full_pairs, layouts=_MORE),
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
            name="threads",
            write=lambda talk, name: [
                {"id": row["message_id"], "parent_id": row["parent_id"], "role": row["role"], "text": row["text"]}
                for row in _tree_rows(talk, name)
            ],
            holds=_without_system,
            layouts=(*_JSON, "parquet"),
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
        Format(name="prompt_completion", write=_prompt_completion, holds=_full_pairs, layouts=_MORE),
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


def written(form: Format, talks: Sequence[Talk], layout: str, *, escaped: bool = True) -> tuple[str, bytes]:
    """The ending of a file's name, and its bytes. Half surrogate pairs are written as escapes, where that can be."""
    records = [form.write(talk, f"t{number}") for number, talk in enumerate(talks)]
    if layout == "parquet":
        return ".parquet", parquet_of(records)
    ending, text = LAYOUTS[layout]
    return ending, text(records, escaped or not all(map(is_unicode, talks))).encode("utf-8")
