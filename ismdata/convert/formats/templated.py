"""Dialogues that a chat template has already made one string of, taken apart again at the template's marks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ismdata.convert.canonical import parse_json
from ismdata.errors import Refused, shown

#: The system prompt in the first question of Llama 2.
_LLAMA_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_CALL = re.compile(r"""\{"name": ?"([^"]+)", ?"arguments": ?'(.*)'\}""", re.DOTALL)
_CALL_MARK = "<functioncall>"


@dataclass(frozen=True, kw_only=True)
class Template:
    """How the turns of a string open, with a group for who speaks, and how they can end.

    `before` is what may stand before the first turn and is no part of any.
    """

    opening: re.Pattern[str]
    endings: tuple[str, ...] = ()
    before: str = ""

    def turns(self, text: str) -> list[tuple[str, str]]:
        """Who speaks and what is said; empty where the text is not of this template."""
        text = text.strip().removeprefix(self.before).lstrip() if self.before else text.strip()
        if self.opening.match(text) is None:
            return []
        found = list(self.opening.finditer(text))
        ends = [*(match.start() for match in found[1:]), len(text)]
        turns = [
            (match.group(1).lower(), self._ended(text[match.end() : end].strip()))
            for match, end in zip(found, ends, strict=True)
        ]
        # A mark without words at the end is where the next answer would be.
        return turns if turns[-1][1] else turns[:-1]

    def _ended(self, said: str) -> str:
        for ending in self.endings:
            said = said.removesuffix(ending).rstrip()
        return said


_TEMPLATES = (
    Template(opening=re.compile(r"<\|im_start\|>(\w+)\n"), endings=("<|endoftext|>", "<|im_end|>")),
    Template(
        opening=re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n"),
        endings=("<|end_of_text|>", "<|eot_id|>"),
        before="<|begin_of_text|>",
    ),
    Template(opening=re.compile(r"<\|(system|user|assistant)\|>\n"), endings=("<|endoftext|>", "</s>", "<|end|>")),
    Template(opening=re.compile(r"<start_of_turn>(user|model)\n"), endings=("<eos>", "<end_of_turn>"), before="<bos>"),
    Template(opening=re.compile(r"\[\|(Human|AI)\|\]"), before="The conversation between human and AI assistant."),
    Template(opening=re.compile(r"\[(Human|MOSS)\]:"), endings=("<eoh>", "<eoa>")),
    Template(
        opening=re.compile(r"(?:\A|(?<=\n)|(?<=</s>)|(?<= ))(USER|ASSISTANT|FUNCTION RESPONSE): ?"),
        endings=("</s>", "<|endoftext|>"),
    ),
)
#: What templates call a speaker beside the usual names.
_NAMES = {"moss": "assistant", "function response": "function_response"}


def templated_turns(text: str) -> list[tuple[str, str]]:
    """Who speaks and what is said, turn by turn; empty where the text is of no known template.

    >>> templated_turns("<s>[INST] Hi [/INST] Hello! </s>")
    [('user', 'Hi'), ('assistant', 'Hello!')]
    """
    for template in _TEMPLATES:
        turns = template.turns(text)
        if turns:
            return [(_NAMES.get(speaker, speaker), said) for speaker, said in turns]
    return _llama_turns(text.strip())


def with_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message of Glaive's texts, with the call of a function that stands in it as `tool_calls`. Raises Refused."""
    text, mark, called = message["content"].partition(_CALL_MARK)
    if not mark:
        return message
    found = _CALL.fullmatch(called.strip())
    try:
        call = parse_json(called) if found is None else {"name": found.group(1), "arguments": found.group(2)}
    except ValueError as error:
        expected = f"expected {_CALL_MARK} and a JSON object with name and arguments"
        raise Refused("invalid_tool_call", f"the call is {shown(called.strip())} ({error}); {expected}") from error
    return {**message, "content": text.strip() or None, "tool_calls": [call]}


def _llama_turns(text: str) -> list[tuple[str, str]]:
    before, *pieces = text.split("[INST]")
    turns: list[tuple[str, str]] = []
    for number, piece in enumerate(pieces):
        asked, mark, answer = piece.partition("[/INST]")
        if not mark or _unmarked(before):
            return []
        asked = asked.strip()
        system = _LLAMA_SYSTEM.match(asked) if number == 0 else None
        if system is not None:
            turns.append(("system", system.group(1).strip()))
            asked = asked[system.end() :].strip()
        turns.append(("user", asked))
        answer = _unmarked(answer)
        turns += [("assistant", answer)] if answer else []
    return turns


def _unmarked(said: str) -> str:
    """What is said between two questions, without the marks of the end and of a new beginning."""
    return said.strip().removesuffix("<s>").rstrip().removesuffix("</s>").rstrip()
