"""Chats with characters, one talk per file: SillyTavern and text-generation-webui."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of
from ismdata.convert.formats.fields import missing_field
from ismdata.convert.formats.speakers import SpeakerFormat
from ismdata.convert.sources.grouping import group_by_start
from ismdata.errors import Refused, shown

#: The question before the greeting of a character.
_GREETING = "<|BEGIN-VISIBLE-CHAT|>"


@dataclass(frozen=True, kw_only=True)
class SillyTavern(SpeakerFormat):
    """A record is the list of the lines of a chat: a header, then messages. Several characters need `--role`."""

    expects: str = "lines of name, is_user, mes, as SillyTavern saves chats"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return isinstance(record, dict) and (
            _is_header(record) or (isinstance(record.get("mes"), str) and isinstance(record.get("is_user"), bool))
        )

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        return group_by_start(blocks, _is_header)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        rows = [fields_of(row) for row in (record if isinstance(record, list) else [record])]
        header = rows[0] if rows and _is_header(rows[0]) else {}
        ignored: list[str] = []
        said: list[tuple[str, bool, str]] = []
        for number, row in enumerate(rows[1:] if header else rows, 1):
            name, is_user, text = (row.get(field) for field in ("name", "is_user", "mes"))
            if row.get("is_system") is True:
                ignored.append("hidden messages")
                continue
            if not isinstance(text, str):
                raise Refused("invalid_content", f"mes of message {number} is {kind_of(text)}; expected a string")
            if not isinstance(is_user, bool) or not isinstance(name, str):
                raise Refused("missing_role", f"message {number} has name {shown(name)} and is_user {shown(is_user)}")
            swipes = row.get("swipes")
            ignored += ["swipes"] * (len(swipes) - 1 if isinstance(swipes, list) else 0)
            said.append((name, is_user, text))
        characters = list(dict.fromkeys(name for name, is_user, _ in said if not is_user))
        known = {name for name in characters if name.lower() in self.roles}
        if len(characters) > 1 and not any(self.roles.get(name.lower()) == "assistant" for name in known):
            raise Refused(
                "many_speakers",
                f"{len(characters)} characters: {', '.join(map(shown, characters[:8]))}; expected one. Name the "
                "assistant with --role NAME=assistant; the others are then users",
            )
        other = "user" if len(characters) > 1 else "assistant"
        return [
            Draft(
                messages=[
                    {"role": "user" if is_user else name if name in known else other, "content": text}
                    for name, is_user, text in said
                ],
                extra={name: value for name, value in header.items() if name != "chat_metadata"},
                ignored=ignored,
            )
        ]


def _is_header(row: Any) -> bool:
    return isinstance(row, dict) and {"user_name", "character_name"} <= row.keys() and "mes" not in row


@dataclass(frozen=True, kw_only=True)
class TextGenerationWebui(CorpusFormat):
    """A record is a chat: `internal` has pairs as the model saw them, `visible` the same as the page shows them."""

    expects: str = "internal: [[question, answer], …], visible, as text-generation-webui saves chats"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return isinstance(record, dict) and isinstance(record.get("internal"), list) and "visible" in record

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        listed = fields.pop("internal", None)
        if not isinstance(listed, list):
            raise missing_field(fields, "'internal'")
        fields.pop("visible", None)
        messages = []
        for number, pair in enumerate(listed, 1):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise Refused(
                    "invalid_field", f"internal {number} is {shown(pair)}; expected a question and its answer"
                )
            question, answer = pair
            # Without a question, the character greets or goes on.
            messages += [{"role": "user", "content": question}] if question not in ("", _GREETING) else []
            messages += [{"role": "assistant", "content": answer}] if answer or number < len(listed) else []
        return [Draft(messages=messages, extra=fields)]


SILLYTAVERN = SillyTavern()
TEXT_GENERATION_WEBUI = TextGenerationWebui()
