"""PersonaChat: numbered lines, `N user<TAB>reply`; the persona of each side comes first, number 1 opens a dialogue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.choices import Side
from ismdata.convert.corpus_format import Block, CorpusFormat, Draft, Place, kind_of
from ismdata.convert.formats.speakers import alternating, spoken
from ismdata.convert.sources.grouping import by_start
from ismdata.errors import Refused, shown

_NUMBERED = re.compile(r"([0-9]{1,9}) (.*)", re.DOTALL)
_OWN, _PARTNER = "your persona: ", "partner's persona: "


@dataclass(frozen=True, kw_only=True)
class PersonaChat(CorpusFormat):
    """The persona of the side that is trained is the system prompt, a sentence a line; the other one's follows it with
    "partner's persona: " before each sentence. Candidates after a second tab are left out.
    """

    expects: str = "numbered lines: 1 your persona: …, 2 user, tab, reply"
    plain_text: bool = True
    assistant: Side = "second"

    def matches(self, record: Any) -> bool:
        """Whether a line is the first of a dialogue: the lines of a file are asked in their order."""
        number, rest = _parsed(record)
        # Without a persona, a digit after the number speaks for a text that opens with digits set apart by blanks.
        return number == 1 and (rest.startswith((_OWN, _PARTNER)) or ("\t" in rest and not rest[:1].isdigit()))

    def regroup(self, blocks: Iterable[tuple[Block, Place]]) -> Iterator[tuple[Block, Place]]:
        return by_start(blocks, lambda line: _parsed(line)[0] == 1)

    def parse_record(self, record: Any) -> Sequence[Draft]:
        if not isinstance(record, list):
            raise Refused("not_an_object", f"the record is {kind_of(record)}; expected numbered lines of text")
        personas: dict[str, list[str]] = {_OWN: [], _PARTNER: []}
        utterances: list[str] = []
        sides: list[int] = []
        ignored: list[str] = []
        for place, line in enumerate(record, 1):
            number, rest = _parsed(line)
            if number != place:
                found = f"line {place} of the dialogue is {shown(line)}"
                raise Refused(
                    "invalid_row",
                    f"{found}; expected it to open with {place} and a blank. "
                    "Where the lines are not numbered, pass --format tsv_pairs",
                )
            prefix = next((prefix for prefix in personas if rest.startswith(prefix)), None)
            if prefix is not None:
                personas[prefix].append(rest[len(prefix) :].strip())
                continue
            said, *replies = rest.split("\t")
            utterances += [said.strip(), *(reply.strip() for reply in replies[:1])]
            sides += [0, 1][: 1 + len(replies[:1])]
            ignored += ["candidates"] * any(map(str.strip, replies[1:]))
        return [
            Draft(
                messages=_system(personas, roles[0]) + spoken([roles[side] for side in sides], utterances),
                ignored=ignored,
                part=part,
            )
            for part, roles in (alternating(2, self.assistant) if utterances else ())
        ]


def _parsed(line: Any) -> tuple[int, str]:
    """The number of a line and what follows it; 0 where there is none."""
    match = _NUMBERED.fullmatch(line) if isinstance(line, str) else None
    return (int(match.group(1)), match.group(2)) if match else (0, "")


def _system(personas: dict[str, list[str]], opener: str) -> list[dict[str, Any]]:
    """ "Your" persona is that of the side which replies: the other side sees the two the other way round."""
    own, partner = personas[_OWN], personas[_PARTNER]
    if opener == "assistant":
        own, partner = partner, own
    lines = own + [_PARTNER + sentence for sentence in partner]
    return [{"role": "system", "content": "\n".join(lines)}] if lines else []


PERSONACHAT = PersonaChat()
