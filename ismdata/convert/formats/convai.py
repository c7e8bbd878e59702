"""PersonaChat as ConvAI2 has it in JSON: the history before each answer, and candidates of which the last one is it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, take_id
from ismdata.convert.formats.speakers import alternating, spoken
from ismdata.errors import Refused, shown


@dataclass(frozen=True, kw_only=True)
class ConvAi(CorpusFormat):
    """A record's last utterance holds the whole dialogue; the persona is of the one who answers."""

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
        told = [[*turn["history"], turn["candidates"][-1]] for turn in turns]
        for earlier, later in pairwise(told):
            if later[: len(earlier)] != earlier:
                raise Refused("broken_tree", f"{shown(earlier[-1])} is not in the history of the next answer")
        texts = told[-1]
        # The last one answers, so the first one does where the texts are odd in number.
        roles = alternating(len(texts), "second" if len(texts) % 2 == 0 else "first")[0][1]
        persona = fields.pop("personality", None)
        if persona is not None and not (isinstance(persona, list) and all(isinstance(one, str) for one in persona)):
            raise Refused("invalid_field", f"personality is {shown(persona)}; expected a list of sentences")
        first = [{"role": "system", "content": "\n".join(persona)}] if persona else []
        wrong = ["utterances[].candidates"] * sum(len(turn["candidates"]) > 1 for turn in turns)
        return [Draft(messages=first + spoken(roles, texts), id=take_id(fields), extra=fields, ignored=wrong)]


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    lists = (value.get("history"), value.get("candidates"))
    return all(isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in lists)


CONVAI = ConvAi()
