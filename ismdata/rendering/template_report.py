"""Which conversations a chat template can render: conversations of every shape, tried for `ismdata template`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ismdata.choices import History
from ismdata.conversation import ASSISTANT, ROLES, SYSTEM, USER
from ismdata.errors import UsageError
from ismdata.masks import ANSWER
from ismdata.rendering.chat_template import Message
from ismdata.rendering.control_tokens import AddedToken, ControlTokens, with_markers
from ismdata.rendering.encoding import Encoding, probe_encoding, read_template
from ismdata.rendering.refusals import CannotRender
from ismdata.rendering.renderer import Renderer
from ismdata.rendering.tokenizer import load_pretrained
from ismdata.rendering.tracing import REASONING_END

#: The tools of conversations with tools.
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "The next high water.",
            "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
        },
    }
]


def _user(content: str, **fields: Any) -> Message:
    return {"role": "user", "content": content, **fields}


def _answer(content: str | None, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _calls(*ports: str) -> dict[str, Any]:
    return {
        "tool_calls": [
            {"id": f"call0000{k}", "type": "function", "function": {"name": "tide", "arguments": {"port": port}}}
            for k, port in enumerate(ports, 1)
        ]
    }


def _result(number: int, content: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "tide", "content": content}


_TALK = [_user("Which sea is it?"), _answer("The North Sea."), _user("And there?"), _answer("The Baltic.")]
_CALL = [_user("When is the flood in Husum?"), _answer(None, **_calls("Husum")), _result(1, "14:05")]

#: A conversation of each shape: the messages, and whether tools are described to the template.
SHAPES: Mapping[str, tuple[list[Message], bool]] = {
    "several turns": (_TALK, False),
    "system prompt": ([_system("Be brief."), *_TALK], False),
    "system message later": ([*_TALK[:2], _system("In German."), *_TALK[2:]], False),
    "assistant first": ([_answer("Welcome."), *_TALK[:2]], False),
    "two answers in a row": ([_TALK[0], _answer("Let me see."), *_TALK[1:]], False),
    "two questions in a row": ([_user("Hello."), *_TALK], False),
    "names": ([_user("Which sea is it?", name="ann"), *_TALK[1:]], False),
    "tools, not called": (_TALK, True),
    "a tool call": ([*_CALL, _answer("At five past two."), *_TALK[:2]], True),
    "two calls at once": (
        [
            _user("And in Kiel and Bonn?"),
            _answer(None, **_calls("Kiel", "Bonn")),
            _result(1, "15:07"),
            _result(2, "none"),
            _answer("Kiel at seven past three."),
        ],
        True,
    ),
    "text beside a call": ([_CALL[0], _answer("I look.", **_calls("Husum")), _CALL[2], _answer("At five past.")], True),
    "reasoning field": (
        [_TALK[0], _answer("The North Sea.", reasoning_content="Husum is in the west."), *_TALK[2:]],
        False,
    ),
    "reasoning in the text": (
        [_TALK[0], _answer("<think>\nHusum is in the west.\n</think>\n\nThe North Sea."), *_TALK[2:]],
        False,
    ),
}

_HISTORIES: tuple[History, ...] = ("append", "expand")


def find_refusal(encoding: Encoding, shape: str, history: History) -> CannotRender | None:
    """Why a conversation of this shape cannot be packed; None if it can."""
    messages, with_tools = SHAPES[shape]
    ends = [len(messages)]
    if history == "expand":
        ends = [k for k, message in enumerate(messages, 1) if message["role"] == "assistant"]
    tools = TOOLS if with_tools else None
    try:
        for end in ends:
            replace(encoding, history=history).chunks(messages[:end], tools)
    except CannotRender as error:
        return error
    return None


def shapes_in(rows: pa.RecordBatch) -> list[str]:
    """Find the shapes of converted conversations.

    Args:
        rows: Rows of `conversation.CONVERSATION_SCHEMA`.

    Returns:
        The shapes that at least one conversation has, in the order of SHAPES.
    """
    messages = rows.column("messages")
    first = messages.offsets.to_numpy()[:-1] - messages.offsets[0].as_py()
    flat = messages.flatten()
    first = first[first < len(flat)]  # the first message of each conversation
    column = dict(zip((field.name for field in messages.type.value_type), flat.flatten(), strict=True))
    roles = pc.index_in(column["role"], value_set=pa.array(ROLES)).to_numpy(zero_copy_only=False)
    opens = np.zeros(len(roles), bool)
    opens[first] = True
    opens &= roles != SYSTEM
    before = np.concatenate([[-1], roles[:-1]])
    again = ~opens & (roles == before)
    again[first] = False
    has_text = np.asarray(pc.fill_null(pc.greater(pc.binary_length(column["content"]), 0), False))
    called = np.asarray(column["tool_calls"].is_valid())
    calls = np.asarray(pc.fill_null(pc.count_substring(column["tool_calls"], '"arguments"'), 0))
    reasoned = np.asarray(pc.fill_null(pc.match_substring_regex(column["content"], REASONING_END), False))
    answers = roles == ASSISTANT
    later = roles == SYSTEM
    later[1:] &= before[1:] != SYSTEM
    later[first] = False
    found = {
        "several turns": bool((answers & ~opens & (before == USER)).sum() > len(rows)),
        "system prompt": bool((roles[first] == SYSTEM).any()),
        "system message later": bool(later.any()),
        "assistant first": bool((opens & answers).any()),
        "two answers in a row": bool((again & answers).any()),
        "two questions in a row": bool((again & (roles == USER)).any()),
        "names": bool((np.asarray(column["name"].is_valid()) & (answers | (roles == USER))).any()),
        "tools, not called": rows.column("tools").null_count < len(rows),
        "a tool call": bool(called.any()),
        "two calls at once": bool((calls > 1).any()),
        "text beside a call": bool((called & has_text).any()),
        "reasoning field": column["reasoning_content"].null_count < len(roles),
        "reasoning in the text": bool((answers & reasoned).any()),
    }
    return [shape for shape in SHAPES if found[shape]]


def cautions(encoding: Encoding, shapes: Iterable[str]) -> list[str]:
    """Warn of shapes in a corpus that the template cannot render.

    Args:
        encoding: The tokenizer with its probed template.
        shapes: The shapes in the corpus.

    Returns:
        Sentences for the user; none if all conversations can be packed.
    """
    history = encoding.history
    refused = {shape: found for shape in shapes if (found := find_refusal(encoding, shape, history)) is not None}
    if not refused:
        return []
    names = ", ".join(f"{shape} ({found.reason})" for shape, found in refused.items())
    by_expand = [shape for shape in refused if history == "append" and find_refusal(encoding, shape, "expand") is None]
    other = f"With --history expand these can be packed: {', '.join(by_expand)}. " if by_expand else ""
    return [
        f"Conversations of these shapes go to quarantine under --history {history}: {names}. {other}"
        "`ismdata template` shows what this template can render."
    ]


@dataclass(frozen=True, kw_only=True)
class TemplateReport:
    """What was found about a template; `facts` is a JSON object."""

    facts: dict[str, Any]


def report_template(encoding: Encoding) -> TemplateReport:
    """Try a template on conversations of all shapes.

    Args:
        encoding: The tokenizer with its probed template.

    Returns:
        What `ismdata template` shows.
    """
    template, found = encoding.renderer.template, encoding.renderer.profile
    shapes = {
        shape: {history: _as_json(find_refusal(encoding, shape, history)) for history in _HISTORIES} for shape in SHAPES
    }
    difference = None if found.difference is None else dict(zip(("fed", "rewritten"), found.difference, strict=True))
    facts = {
        "template": template.name,
        "sha256": template.sha256,
        "tokenizer": encoding.tokenizer.name,
        "prefix_stable": found.prefix_stable,
        "difference": difference,
        "generation_prompt": found.generation_prompt,
        "end_of_turn": found.end_of_turn,
        "end_of_turn_in_history": found.history_end,
        "next_turn_ends": list(found.next_turn_ends),
        "end_of_turn_trained": _trained_end(encoding),
        "end_of_turn_is_token": _is_token(encoding, found.end_of_turn or "".join(found.next_turn_ends[:1])),
        "reasoning_field": _reasoning(encoding.renderer, "reasoning field"),
        "reasoning_in_text": _reasoning(encoding.renderer, "reasoning in the text"),
        "prints_date": template.prints_date,
        "typed_content": template.typed_content,
        "arguments": "text" if template.text_arguments else "object",
        "shapes": shapes,
        "example": _example(encoding),
    }
    return TemplateReport(facts=facts)


def _as_json(error: CannotRender | None) -> dict[str, str] | None:
    return None if error is None else {"reason": error.reason, "detail": error.detail}


def _trained_end(encoding: Encoding) -> str:
    """When the end of an answer is trained: `always`, `last` (only in a last message), `followed` (only if another
    message follows) or `never`.
    """
    found = encoding.renderer.profile
    if found.end_of_turn:
        return "always" if found.history_end else "last"
    return "followed" if found.next_turn_ends else "never"


def _is_token(encoding: Encoding, text: str) -> bool:
    cuts = encoding.tokenizer.controls.cut(text.strip())
    return bool(cuts) and all(isinstance(cut, AddedToken) for cut in cuts)


def _reasoning(renderer: Renderer, shape: str) -> str:
    """What happens to reasoning: `kept`, `cut` from history, `left out` altogether, or `refused`."""
    messages = SHAPES[shape][0]

    def written(count: int) -> bool:
        found = renderer.tracer.trace(messages[:count])
        kept = {place.text for place in found.occurrences}
        return all(
            number in kept for number, text in enumerate(found.texts) if text.message == 1 and text.part == "reasoning"
        )

    try:
        return ("kept" if written(4) else "cut") if written(2) else "left out"
    except CannotRender:
        return "refused"


def _example(encoding: Encoding) -> list[dict[str, Any]]:
    """The spans of one conversation, as much of it as the template accepts: kind, text, whether it is trained."""
    for shape in ("a tool call", "reasoning field", "system prompt", "several turns"):
        if find_refusal(encoding, shape, encoding.history) is None:
            break
    messages, with_tools = SHAPES[shape]
    system = [SHAPES["system prompt"][0][0]]
    tools = TOOLS if with_tools else None
    for attempt in ([*system, *messages], messages, messages[:2]):
        try:
            chunks, escapes = encoding.chunks(attempt, tools)
        except CannotRender:
            continue
        last = max((chunk.message for chunk in chunks), default=-1)
        return [
            {
                "kind": ("prompt", "query", "answer")[chunk.kind],
                "train": chunk.kind == ANSWER and (encoding.history == "append" or chunk.message == last),
                "text": escapes.undo(chunk.text),
            }
            for chunk in chunks
        ]
    return []


def encoding_of(
    source: str,
    *,
    tokenizer: str | None = None,
    history: History = "append",
    arguments: Mapping[str, Any] | None = None,
) -> Encoding:
    """Load the encoding of a tokenizer or of a Jinja file.

    Args:
        source: A tokenizer (a local folder, a GGUF file or a hub name) or a Jinja file.
        tokenizer: The tokenizer for a Jinja file. By default a substitute in which the template's markers are tokens.
        history: What is done about earlier turns (docs/templates.md).
        arguments: What `--template-arg` passes to the template.

    Returns:
        The encoding.

    Raises:
        DataError: If the tokenizer or the template cannot be used.
        UsageError: If `tokenizer` is given and `source` is no Jinja file.
    """
    path = Path(source)
    if not path.is_file() or path.suffix in (".gguf", ".json"):
        if tokenizer is not None:
            raise UsageError(f"{source} is no template file; expected a Jinja file, or a tokenizer without --tokenizer")
        return probe_encoding(load_pretrained(source), name=source, history=history, arguments=arguments)
    text = read_template(path)
    pretrained = _substitute_tokenizer(text) if tokenizer is None else load_pretrained(tokenizer)
    name = "a substitute with the template's markers as tokens" if tokenizer is None else tokenizer
    return probe_encoding(pretrained, name=name, chat_template=source, history=history, arguments=arguments)


def _substitute_tokenizer(template: str) -> Any:
    """A tokenizer of bytes in which every marker of the template is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    found = with_markers(ControlTokens([]), template).tokens
    paired = {text for text in found if f"</{text[1:]}" in found or f"<{text[2:]}" in found}
    markers = [text for text in found if text not in paired]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=sorted(markers),
    )
