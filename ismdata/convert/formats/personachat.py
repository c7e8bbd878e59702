"""PersonaChat in its two encodings: numbered lines of text, and ConvAI2's JSON.

In the text, each line is `N user<TAB>reply`. The personas come first; the number 1 begins a dialogue. In the JSON, each
answer has its history and candidates, the last of which is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ismdata.choices import Side
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, fields_of, kind_of, take_id
from ismdata.convert.formats.speakers import alternating_roles, to_messages
from ismdata.convert.sources.grouping import group_by_start
from ismdata.errors import Refused, shown

_NUMBERED = re.compile(r"([0-9]{1,9}) (.*)", re.DOTALL)
_OWN, _PARTNER = "your persona: ", "partner's persona: "


@dataclass(frozen=True, kw_only=True)
class PersonaChat(CorpusFormat):
    """A record is the list of the lines of one dialogue.

    The system prompt is the persona of the trained side, one sentence per line. The other persona follows it, with
    "partner's persona: " before each sentence. Candidates after a second tab are left out.
    """

    expects: str = "numbered lines: 1 your persona: …, 2 user, tab, reply"
    plain_text: bool = True
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        """Whether a line is the first of a dialogue. Detection tries the lines of a file in order."""
        number, rest = _numbered(record)
        # "1 2 …" without a persona is more likely a text that begins with numbers.
        return number == 1 and (rest.startswith((_OWN, _PARTNER)) or ("\t" in rest and not rest[:1].isdigit()))

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        return group_by_start(blocks, lambda line: _numbered(line)[0] == 1)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if not isinstance(record, list):
            raise Refused("not_an_object", f"the record is {kind_of(record)}; expected numbered lines of text")
        personas: dict[str, list[str]] = {_OWN: [], _PARTNER: []}
        utterances: list[str] = []
        sides: list[int] = []
        ignored: list[str] = []
        for place, line in enumerate(record, 1):
            number, rest = _numbered(line)
            if number != place:
                found = f"line {place} of the dialogue is {shown(line)}"
                raise Refused(
                    "invalid_row",
                    f"{found}; expected it to begin with {place} and a space. "
                    "If the lines are not numbered, use --format tsv_pairs",
                )
            prefix = next((prefix for prefix in personas if rest.startswith(prefix)), None)
            if prefix is not None:
                personas[prefix].append(rest[len(prefix) :].strip())
                continue
            question, *replies = rest.split("\t")
            utterances += [question.strip(), *(reply.strip() for reply in replies[:1])]
            sides += [0, 1][: 1 + len(replies[:1])]
            ignored += ["candidates"] * any(map(str.strip, replies[1:]))
        return [
            Draft(
                messages=_system_prompt(personas, roles[0]) + to_messages([roles[side] for side in sides], utterances),
                ignored=ignored,
                id_suffix=part,
            )
            for part, roles in (alternating_roles(2, self.assistant) if utterances else ())
        ]


def _numbered(line: Any) -> tuple[int, str]:
    """The number of a line and the text after it; (0, "") if it has none."""
    match = _NUMBERED.fullmatch(line) if isinstance(line, str) else None
    return (int(match.group(1)), match.group(2)) if match else (0, "")


def _system_prompt(personas: dict[str, list[str]], opener: str) -> list[dict[str, Any]]:
    """ "Your" persona is that of the side that replies; if that side is the user, the two change places."""
    own, partner = personas[_OWN], personas[_PARTNER]
    if opener == "assistant":
        own, partner = partner, own
    lines = own + [_PARTNER + sentence for sentence in partner]
    return [{"role": "system", "content": "\n".join(lines)}] if lines else []


@dataclass(frozen=True, kw_only=True)
class ConvAi(CorpusFormat):
    """A record's last utterance holds the whole dialogue. The persona is that of the speaker who answers."""

    expects: str = "personality, utterances[].history/candidates"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        listed = record.get("utterances") if isinstance(record, dict) else None
        return isinstance(listed, list) and bool(listed) and all(_is_turn(one) for one in listed)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        if not self.matches(fields):
            raise Refused("invalid_field", f"utterances is {shown(fields.get('utterances'))}; expected {self.expects}")
        turns = fields.pop("utterances")
        dialogues = [[*turn["history"], turn["candidates"][-1]] for turn in turns]
        for earlier, later in pairwise(dialogues):
            if later[: len(earlier)] != earlier:
                raise Refused(
                    "broken_tree",
                    f"the answer {shown(earlier[-1])} is not in the history of the next one; expected each history to "
                    "continue the one before",
                )
        texts = dialogues[-1]
        # The last speaker answers, who is also the first if the number of texts is odd.
        roles = alternating_roles(len(texts), "second" if len(texts) % 2 == 0 else "first")[0][1]
        persona = fields.pop("personality", None)
        if persona is not None and not (isinstance(persona, list) and all(isinstance(one, str) for one in persona)):
            raise Refused("invalid_field", f"personality is {shown(persona)}; expected a list of sentences")
        system = [{"role": "system", "content": "\n".join(persona)}] if persona else []
        ignored = ["utterances[].candidates"] * sum(len(turn["candidates"]) > 1 for turn in turns)
        return [Draft(messages=system + to_messages(roles, texts), id=take_id(fields), extra=fields, ignored=ignored)]


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    lists = (value.get("history"), value.get("candidates"))
    return all(isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in lists)


PERSONACHAT = PersonaChat()
CONVAI = ConvAi()
