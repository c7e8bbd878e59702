"""Shapes that are known and not read: what they are, why they are no conversations, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class KnownShape:
    """A shape. `about` names it and says why it is not read, `todo` how its content can be."""

    matches: Callable[[Any], bool]
    about: str
    todo: str


def _fields(*names: str) -> Callable[[Any], bool]:
    """Whether a record has all of these fields."""
    return lambda record: isinstance(record, dict) and record.keys() >= {*names}


def _line(pattern: str) -> Callable[[Any], bool]:
    """Whether a record is a text that begins like this."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda record: isinstance(record, str) and compiled.match(record) is not None


def _nested(outer: str, inner: str) -> Callable[[Any], bool]:
    """Whether the first element of a record's list has a field."""

    def matches(record: Any) -> bool:
        listed = record.get(outer) if isinstance(record, dict) else None
        return isinstance(listed, list) and bool(listed) and isinstance(listed[0], dict) and inner in listed[0]

    return matches


#: A line of DialoGPT's training data: each utterance has a weight before it.
DIALOGPT_LINE = r"[01]\.[0-9]+ [^\t]*\t[01]\.[0-9]+ "

SHAPES = (
    KnownShape(
        matches=_line(r".* \+\+\+\$\+\+\+ "),
        about="a file of the Cornell Movie-Dialogs corpus, whose lines are put in order by another file",
        todo="Download the corpus from ConvoKit and convert its utterances.jsonl",
    ),
    KnownShape(
        matches=_line(DIALOGPT_LINE),
        about="DialoGPT's training text, with weights before the utterances and EOS between them",
        todo="Write each line as a JSON list of its utterances",
    ),
    KnownShape(
        matches=_line(r"[01]\t[^\t]+\t[^\t]+"),
        about="data for choosing responses (Ubuntu, Douban): a label, the context, and a right or wrong response",
        todo="Keep the right ones without their label, with `grep '^1' FILE | cut -f 2-`, and convert that",
    ),
    KnownShape(
        matches=_line(r"(version: |stories:|nlu:|rules:|- story:)"),
        about="Rasa's training data, whose stories name actions instead of answers",
        todo="Export the conversations themselves from the tracker store",
    ),
    KnownShape(
        matches=lambda record: isinstance(record, dict) and ("stories" in record or "nlu" in record),
        about="Rasa's training data, whose stories name actions instead of answers",
        todo="Export the conversations themselves from the tracker store",
    ),
    KnownShape(
        matches=lambda record: (
            isinstance(record, dict)
            and isinstance(record.get("dialogue"), str)
            and re.search(r"<user \d+>", record["dialogue"]) is not None
        ),
        about="RefGPT's dialogues, whose turns are tagged <user 1>, <assistant 1> in one string",
        todo='Write them as {"messages": [{"role": "user", "content": …}, …]}',
    ),
    KnownShape(
        matches=_fields("role", "question", "generated"),
        about="RoleBench's questions with several generated answers each, none of which is marked as right",
        todo="Choose one of `generated` as `answer`",
    ),
    KnownShape(
        matches=_fields("gamestarted", "actions"),
        about="a story of KoboldAI, a text that was continued, without speakers",
        todo="Use it as plain text, or write its turns as messages",
    ),
    KnownShape(
        matches=lambda record: (
            _fields("prompt", "response_0", "response_1")(record)
            or _fields("prompt", "response_a", "response_b")(record)
        ),
        about="two answers to each prompt, one of them better",
        todo="Rename the better one to `chosen` and the other one to `rejected`, then pass --preference chosen",
    ),
    KnownShape(
        matches=lambda record: _fields("custom_id", "body")(record) or _fields("custom_id", "response")(record),
        about="requests or responses of a batch API, which are halves of conversations",
        todo='Join the two files by `custom_id` to {"request": …, "response": …}',
    ),
    KnownShape(
        matches=lambda record: _nested("data", "paragraphs")(record) or _nested("paragraphs", "qas")(record),
        about="SQuAD's questions about paragraphs",
        todo='Write each question as {"question": …, "answer": …}, with the paragraph as `system` if it is needed',
    ),
    KnownShape(
        matches=lambda record: _nested("intents", "patterns")(record) or _fields("patterns", "responses")(record),
        about="intents with patterns and responses, which are no dialogues: any response may answer any pattern",
        todo='Write the pairs that you want as {"question": …, "answer": …}',
    ),
    KnownShape(
        matches=lambda record: _nested("conversations", "MessageList")(record) or _fields("MessageList")(record),
        about="an export of Skype or Teams, whose texts are HTML",
        todo="Write its messages as lines of `dialogue_id`, `speaker` and `text`",
    ),
    KnownShape(
        matches=lambda record: _fields("header", "title", "time")(record) and _fields("products")(record),
        about="an activity list of Google Takeout, which has prompts and, if at all, answers in HTML",
        todo="Export the chats themselves",
    ),
    KnownShape(
        matches=_fields("ID", "Timestamp", "Contents"),
        about="the messages of one person only, as in Discord's data package",
        todo="Export the channel with DiscordChatExporter, as JSON",
    ),
    KnownShape(
        matches=lambda record: isinstance(record, dict) and isinstance(record.get("translation"), dict),
        about="pairs of translations",
        todo="Choose the direction and write them as `question` and `answer`",
    ),
    KnownShape(
        matches=lambda record: (
            isinstance(record, dict) and isinstance(record.get("text"), str) and not _names_of_speakers(record)
        ),
        about="texts in which no turns were found: documents, or one message per record without a dialogue id",
        todo="If the texts hold dialogues, describe with --mapping what separates the turns",
    ),
    KnownShape(
        matches=lambda record: isinstance(record, str),
        about="lines of text, of which nothing says where a conversation begins and who speaks",
        todo="Put a conversation on each line, with tabs or __eou__ between its utterances; or describe with --mapping "
        "what separates them",
    ),
)


def _names_of_speakers(record: dict[str, Any]) -> bool:
    return any(name in record for name in ("speaker", "user", "role", "author", "from", "sender", "name"))


def known_shape(record: Any) -> str | None:
    """What a record of no known format looks like and what to do, in two sentences; None if nothing is known of it.

    >>> known_shape({"gamestarted": True, "actions": []}).partition(".")[0]
    'This looks like a story of KoboldAI, a text that was continued, without speakers'
    """
    found = next((one for one in SHAPES if one.matches(record)), None)
    return None if found is None else f"This looks like {found.about}. {found.todo}"
