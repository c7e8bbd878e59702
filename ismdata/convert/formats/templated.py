"""Dialogues that a chat template rendered to one string, split again at the template's marks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ismdata.convert.json_values import parse_json
from ismdata.errors import Refused, shown

#: The system prompt in the first question of Llama 2.
_LLAMA_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_CALL = re.compile(r"""\{"name": ?"([^"]+)", ?"arguments": ?'(.*)'\}""", re.DOTALL)
_CALL_MARK = "<functioncall>"


@dataclass(frozen=True, kw_only=True)
class Template:
    """The marks of one chat template.

    `opening` begins a turn and has a group for the speaker; `endings` can end one. `before` may precede the first turn
    and is removed.
    """

    opening: re.Pattern[str]
    endings: tuple[str, ...] = ()
    before: str = ""

    def turns(self, text: str) -> list[tuple[str, str]]:
        """The speaker and the text of each turn; an empty list if the text is not of this template."""
        text = text.strip().removeprefix(self.before).lstrip() if self.before else text.strip()
        if self.opening.match(text) is None:
            return []
        found = list(self.opening.finditer(text))
        ends = [*(match.start() for match in found[1:]), len(text)]
        turns = [
            (match.group(1).lower(), self._without_ending(text[match.end() : end].strip()))
            for match, end in zip(found, ends, strict=True)
        ]
        # An empty last turn is the generation prompt.
        return turns if turns[-1][1] else turns[:-1]

    def _without_ending(self, text: str) -> str:
        for ending in self.endings:
            text = text.removesuffix(ending).rstrip()
        return text


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
    Template(opening=re.compile(r"(?:\A|(?<=\n))<(human|bot)>:")),
    Template(opening=re.compile(r"\[(Human|MOSS)\]:"), endings=("<eoh>", "<eoa>")),
    Template(
        opening=re.compile(r"(?:\A|(?<=\n)|(?<=</s>)|(?<= ))(USER|ASSISTANT|FUNCTION RESPONSE): ?"),
        endings=("</s>", "<|endoftext|>"),
    ),
)
#: Speaker names of templates that are no usual role names.
_NAMES = {"moss": "assistant", "function response": "function_response"}


def split_templated_turns(text: str) -> list[tuple[str, str]]:
    """The speaker and the text of each turn; an empty list if the text is of no known template.

    >>> split_templated_turns("<s>[INST] Hi [/INST] Hello! </s>")
    [('user', 'Hi'), ('assistant', 'Hello!')]
    """
    for template in _TEMPLATES:
        turns = template.turns(text)
        if turns:
            return [(_NAMES.get(speaker, speaker), content) for speaker, content in turns]
    return _llama2_turns(text.strip())


def with_tool_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message of Glaive's texts, with the function call in its text moved to `tool_calls`. Raises Refused."""
    text, mark, call_text = message["content"].partition(_CALL_MARK)
    if not mark:
        return message
    found = _CALL.fullmatch(call_text.strip())
    try:
        call = parse_json(call_text) if found is None else {"name": found.group(1), "arguments": found.group(2)}
    except ValueError as error:
        expected = f"expected {_CALL_MARK} and a JSON object with name and arguments"
        raise Refused("invalid_tool_call", f"the call is {shown(call_text.strip())} ({error}); {expected}") from error
    return {**message, "content": text.strip() or None, "tool_calls": [call]}


def _llama2_turns(text: str) -> list[tuple[str, str]]:
    before, *pieces = text.split("[INST]")
    turns: list[tuple[str, str]] = []
    for number, piece in enumerate(pieces):
        question, mark, answer = piece.partition("[/INST]")
        if not mark or _without_marks(before):
            return []
        question = question.strip()
        system = _LLAMA_SYSTEM.match(question) if number == 0 else None
        if system is not None:
            turns.append(("system", system.group(1).strip()))
            question = question[system.end() :].strip()
        turns.append(("user", question))
        answer = _without_marks(answer)
        turns += [("assistant", answer)] if answer else []
    return turns


def _without_marks(text: str) -> str:
    """The text between two questions without `</s>` and `<s>`."""
    return text.strip().removesuffix("<s>").rstrip().removesuffix("</s>").rstrip()
