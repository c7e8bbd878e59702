"""Alpaca: an instruction and its answer, with earlier exchanges in `history`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.arrays import offsets_of
from ismdata.convert.columnar import WHITESPACE, any_per_record, as_bools, flat_list, has_text
from ismdata.convert.corpus_format import Block, Columns, CorpusFormat, Draft, fields_of, kind_of, take_id
from ismdata.convert.formats.fields import missing_field, only_answer, take_text, take_thoughts
from ismdata.convert.formats.pairs import exchange_message, later_exchanges, take_system
from ismdata.convert.formats.speakers import to_messages
from ismdata.errors import Refused, shown

_TEXTS = ("instruction", "input", "output", "system")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", *_TEXTS, "tools")),
        ("history", pa.list_(pa.list_(pa.string()))),
    ]
)
#: The end of a prompt that holds a whole dialogue, and the start of each turn in it.
ANSWER_MARK = "Assistant:"
_TURN = re.compile(r"\n(Human|Assistant):")
_NAMES = pa.array(["system", "user", "assistant"])


@dataclass(frozen=True, kw_only=True)
class Alpaca(CorpusFormat):
    """The user's message is `instruction` and `input`, joined by a line break; the assistant's is `output`."""

    expects: str = "instruction/input/output, history, system"
    plain_text: bool = False

    def matches(self, record: Any) -> bool:
        return isinstance(record, dict) and {"instruction", "output"} <= record.keys()

    def parse_record(self, record: Any) -> Sequence[Draft]:
        fields = dict(fields_of(record))
        for name in ("instruction", "output"):
            if name not in fields:
                raise missing_field(fields, f"{name!r}, as in {self.expects}")
        later = later_exchanges(fields, ("instruction", "output"))
        fields["output"] = only_answer(fields["output"], "output")
        texts = {name: take_text(fields, name) for name in _TEXTS if name != "system"}
        messages = take_system(fields)
        for pair in _history_pairs(fields.pop("history", None)):
            messages += [*exchange_message(pair[0], "user"), {"role": "assistant", "content": pair[1]}]
        prompt = _prompt(texts["instruction"], texts["input"])
        earlier = split_prompt(prompt) if isinstance(prompt, str) else []
        if earlier:
            messages += to_messages(*zip(*earlier, strict=True))
        elif prompt is None or prompt.strip():
            messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": texts["output"], "reasoning_content": take_thoughts(fields)})
        for names in later:
            given = take_text(fields, names[0].replace("instruction", "input"))
            question, answer = (take_text(fields, name) for name in names)
            messages += exchange_message(_prompt(question, given), "user") + exchange_message(answer, "assistant")
        tools = fields.pop("tools", None)
        return [Draft(messages=messages, id=take_id(fields), tools=tools, extra=fields)]

    def parse_block(self, block: Block) -> Columns | None:
        table = block.table(_SCHEMA)
        if table is None:
            return None
        pair_offsets, pairs = flat_list(table["history"])
        sizes, earlier = flat_list(pa.chunked_array([pairs]))
        # An empty side of an earlier exchange is no message.
        blank = pc.or_kleene(earlier.is_null(), pc.equal(pc.utf8_ltrim(earlier, WHITESPACE), ""))
        bad_pair = (np.diff(sizes) != 2) | any_per_record(as_bools(blank), sizes)
        instruction, given, output = (table[name].combine_chunks() for name in ("instruction", "input", "output"))
        fallback = has_text(table["tools"]) | any_per_record(bad_pair, pair_offsets)
        fallback |= ~has_text(table["instruction"]) | as_bools(output.is_null())
        fallback |= as_bools(pc.fill_null(pc.ends_with(pc.utf8_rtrim(instruction, WHITESPACE), ANSWER_MARK), False))
        joined = pc.binary_join_element_wise(instruction, given, "\n")
        prompts = pc.if_else(pa.array(has_text(table["input"])), joined, instruction)
        fallback |= as_bools(pc.fill_null(pc.equal(pc.utf8_ltrim(prompts, WHITESPACE), ""), False))

        # Fallback rows may have ragged pairs; counting no history for them keeps the other rows aligned.
        counts = np.where(fallback, 0, np.diff(pair_offsets))
        first = sizes[pair_offsets[:-1]]
        with_system = has_text(table["system"])
        offsets = offsets_of(with_system + 2 * counts + 2)
        n, total = len(fallback), int(offsets[-1])
        # All texts in one array: system, history, prompt, output. `at` is the index of each message's text in it.
        texts = pa.concat_arrays([table["system"].combine_chunks(), earlier, prompts, output])
        at = np.empty(total, np.int64)
        role = np.zeros(total, np.int8)
        at[offsets[:-1][with_system]] = np.flatnonzero(with_system)
        start = offsets[:-1] + with_system
        inner = np.arange(2 * counts.sum()) - np.repeat(offsets_of(2 * counts)[:-1], 2 * counts)
        place = np.repeat(start, 2 * counts) + inner
        at[place] = n + np.repeat(first, 2 * counts) + inner
        role[place] = 1 + (inner & 1)
        at[offsets[1:] - 2] = n + len(earlier) + np.arange(n)
        role[offsets[1:] - 2] = 1
        at[offsets[1:] - 1] = n + len(earlier) + n + np.arange(n)
        role[offsets[1:] - 1] = 2
        return Columns(
            ids=table["id"].combine_chunks(),
            offsets=offsets,
            roles=pa.DictionaryArray.from_arrays(pa.array(role), _NAMES),
            contents=texts.take(pa.array(at)),
            fallback=fallback,
        )


def _prompt(instruction: str | None, given: str | None) -> str | None:
    """The user's message: an instruction, and its input on the next line."""
    return "\n".join(text for text in (instruction, given) if text) or instruction


def split_prompt(prompt: str) -> list[tuple[str, str]]:
    """The turns of a prompt that is a dialogue ending in "Assistant:", as in BELLE; an empty list for other prompts.

    >>> split_prompt("Human:Hi\\nAssistant:Hello!\\nHuman:Bye\\nAssistant:")
    [('Human', 'Hi'), ('Assistant', 'Hello!'), ('Human', 'Bye')]
    """
    if not prompt.rstrip().endswith(ANSWER_MARK):
        return []
    _, *pieces = _TURN.split("\n" + prompt.strip())
    turns = list(zip(pieces[::2], (piece.strip() for piece in pieces[1::2]), strict=True))
    ordered = all(name == ("Human", "Assistant")[at % 2] for at, (name, _) in enumerate(turns))
    begins = prompt.lstrip().startswith("Human:")
    return turns[:-1] if begins and ordered and len(turns) > 1 and not turns[-1][1] else []


def _history_pairs(history: Any) -> list[Any]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise Refused("invalid_field", f"history is {kind_of(history)}; expected a list of [user, assistant] pairs")
    for number, pair in enumerate(history, 1):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(text is None or isinstance(text, str) for text in pair)
        ):
            found = f"history pair {number} is {shown(pair)}"
            raise Refused("invalid_field", f"{found}; expected [user, assistant], two strings")
    return history


ALPACA = Alpaca()
