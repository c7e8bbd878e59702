"""Questions about a story and their answers, in two parallel lists: CoQA and similar corpora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.errors import Refused

_STORIES = ("story", "context", "passage")
_TEXTS = ("input_text", "text")


@dataclass(frozen=True, kw_only=True)
class QuestionLists(CorpusFormat):
    """A record has `questions` and as many `answers`. The story they are about becomes the system prompt."""

    expects: str = "story, questions[], answers[]"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        if not isinstance(record, dict):
            return False
        questions, answers = _texts(record.get("questions")), _texts(record.get("answers"))
        return bool(questions) and answers is not None and len(answers) == len(questions or ())

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        questions, answers = (_texts(fields.pop(name, None)) for name in ("questions", "answers"))
        if questions is None or answers is None or len(questions) != len(answers):
            raise Refused("invalid_field", "questions and answers do not match; expected two lists of equal length")
        name = next((name for name in _STORIES if fields.get(name)), None)
        story = fields.pop(name) if name is not None else None
        if story is not None and not isinstance(story, str):
            raise Refused("invalid_field", f"{name} is {kind_of(story)}; expected a string")
        messages = [{"role": "system", "content": story}] if story else []
        for question, answer in zip(questions, answers, strict=True):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [Draft(messages=messages, id=take_id(fields), extra=fields)]


def _texts(value: Any) -> list[str] | None:
    """The texts in a list of strings, a list of objects with a text each, or an object with such a list."""
    if isinstance(value, dict):
        value = next((value[name] for name in _TEXTS if name in value), None)
    if not isinstance(value, list):
        return None
    found = [
        next((one[name] for name in _TEXTS if name in one), None) if isinstance(one, dict) else one for one in value
    ]
    texts = [text for text in found if isinstance(text, str)]
    return texts if len(texts) == len(found) else None


QUESTION_LISTS = QuestionLists()
