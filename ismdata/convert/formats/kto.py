"""Answers marked as good or bad (KTO): any chat format with a boolean `label` beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ismdata.choices import Preference
from ismdata.convert.corpus_format import CorpusFormat, Draft, fields_of
from ismdata.convert.formats.alpaca import ALPACA
from ismdata.convert.formats.messages import OPENAI, SHAREGPT
from ismdata.convert.formats.prompt_completion import PROMPT_COMPLETION
from ismdata.errors import Refused, shown

_LABELS = ("label", "kto_tag")
#: What a record can be beside its label.
_INNER: tuple[CorpusFormat, ...] = (OPENAI, SHAREGPT, ALPACA, PROMPT_COMPLETION)


@dataclass(frozen=True, kw_only=True)
class Kto(CorpusFormat):
    """Records marked as good are read, and under `preference` "rejected" the others; the rest is refused."""

    expects: str = "messages or prompt/completion, label: true or false"
    plain_text: bool = False
    preference: Preference | None = None

    def matches(self, record: Any) -> bool:
        return (
            isinstance(record, dict) and isinstance(record.get(_label_of(record)), bool) and _inner(record) is not None
        )

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        name = _label_of(fields)
        label = fields.pop(name, None)
        if not isinstance(label, bool):
            raise Refused("invalid_field", f"{name} is {shown(label)}; expected true or false")
        inner = _inner(fields)
        if inner is None:
            found = f"beside {name} the record has {', '.join(map(str, fields)) or 'nothing'}"
            raise Refused("missing_field", f"{found}; expected messages, conversations or prompt/completion")
        if label is (self.preference == "rejected"):
            asked = "good one, and --preference rejected asks for bad ones" if label else "bad one"
            raise Refused("rejected", f"{name} is {str(label).lower()}: the answer is marked as a {asked}")
        return inner.parse_record(fields)


def _label_of(fields: dict[str, Any]) -> str:
    return next((name for name in _LABELS if name in fields), _LABELS[0])


def _inner(fields: dict[str, Any]) -> CorpusFormat | None:
    return next((corpus_format for corpus_format in _INNER if corpus_format.matches(fields)), None)


KTO = Kto()
