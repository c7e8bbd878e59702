"""What ends an answer, and what becomes of arguments, reasoning and null contents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ismdata.masks.intervals import ANSWER
from ismdata.rendering.conversation_encoder import ConversationEncoder
from ismdata.rendering.messages import as_template_messages
from ismdata.rendering.refusals import InvalidArguments
from tests.rendering.test_conservation import ALWAYS_OPEN as ALWAYS_OPEN
from tests.rendering.test_conservation import CALL_TOOLS as CALL_TOOLS
from tests.rendering.test_conservation import CALLS as CALLS
from tests.rendering.test_conservation import CHATML as CHATML
from tests.rendering.test_conservation import INTO_THE_LAST_QUESTION as INTO_THE_LAST_QUESTION
from tests.rendering.test_conservation import TALK as TALK
from tests.rendering.test_conservation import a as a
from tests.rendering.test_conservation import call as call
from tests.rendering.test_conservation import calls as calls
from tests.rendering.test_conservation import cut as cut
from tests.rendering.test_conservation import made as made
from tests.rendering.test_conservation import s as s
from tests.rendering.test_conservation import t as t
from tests.rendering.test_conservation import u as u

# ---- F9 and F10: the end of an answer ----


def test_f9_the_next_turns_first_token_is_not_trained(made: Any) -> None:
    """The user's end follows the last answer too, directly after the answer's own token: two tokens end it."""
    found = made(ALWAYS_OPEN).renderer.profile
    assert found.end_of_turn == found.history_end == "<|STOP|><|END|>"
    assert [text for kind, text in cut(made(ALWAYS_OPEN).renderer.append(TALK)) if kind == "answer"] == [
        "1.<|STOP|><|END|>",
        "2.<|STOP|><|END|>",
    ]


ENDED_BY_THE_NEXT = (
    "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}"
    "{{ call.function.name }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|user|> <|observation|> #}"
)
CLOSED_BY_THE_NEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if add_generation_prompt or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_f10_the_token_that_ends_an_answer_is_its_last(made: Any) -> None:
    with_ = made(ENDED_BY_THE_NEXT)
    assert with_.renderer.profile.next_turn_ends == ("<|user|>", "<|observation|>")
    talk = [u("flood?"), a("", **calls("Husum")), t("14:05"), a("At five past."), u("thanks"), a("Welcome.")]
    assert cut(with_.renderer.append(talk, CALL_TOOLS)) == [
        ("context", "<|user|>\nflood?<|assistant|>"),
        ("answer", '\n<tool_call>{"port": "Husum"}tide</tool_call><|observation|>'),
        ("context", "\n14:05<|assistant|>"),
        ("answer", "\nAt five past.<|user|>"),
        ("context", "\nthanks<|assistant|>"),
        ("answer", "\nWelcome."),
    ]
    end, brought, context = with_.renderer.next_context(talk[:5], CALL_TOOLS)
    assert (end, brought, context) == ("<|user|>", "<|user|>", "\nthanks<|assistant|>")
    encoder = ConversationEncoder(with_)
    assert encoder.decode(encoder.turn_end(talk[:5], CALL_TOOLS)) == "<|user|>"
    assert {encoder.decode([id]) for id in encoder.next_turn_end_ids} == {"<|user|>", "<|observation|>"}
    assert "'<|user|>' or '<|observation|>'" in " ".join(with_.notes)


def test_f10_an_end_that_only_history_has(made: Any) -> None:
    with_ = made(CLOSED_BY_THE_NEXT)
    assert with_.renderer.profile.next_turn_ends == ("<|im_end|>",)
    assert cut(with_.renderer.append(TALK))[1:] == [
        ("answer", "1.<|im_end|>"),
        ("context", "\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"),
        ("answer", "2."),
    ]
    assert "writes nothing after an answer" not in " ".join(with_.notes)


# ---- F11 to F13: arguments, reasoning, null ----


@pytest.mark.parametrize("arguments", ["", " ", None])
def test_f11_no_arguments_are_an_empty_object(arguments: str | None) -> None:
    function = {"name": "tide"} if arguments is None else {"name": "tide", "arguments": arguments}
    message = {"role": "assistant", "tool_calls": json.dumps([{"type": "function", "function": function}])}
    [shaped], _ = as_template_messages({"messages": [message]})
    assert shaped["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ['{"port": "Hus', "{'port': 1}", "port"])
def test_f11_broken_arguments_are_refused(arguments: str) -> None:
    function = {"name": "tide", "arguments": arguments}
    message = {"role": "assistant", "tool_calls": json.dumps([{"type": "function", "function": function}])}
    with pytest.raises(InvalidArguments, match="message 1 calls the tool 'tide' with arguments that are not JSON"):
        as_template_messages({"messages": [message]})


def test_f12_reasoning_that_is_not_written_is_known(made: Any) -> None:
    thought = [u("one?"), a("1.", reasoning_content="hm"), u("two?"), a("2.")]
    never = CHATML % "{{ m.content }}"
    assert [chunk.unwritten for chunk in made(never).renderer.append(thought) if chunk.kind == ANSWER] == [True, False]
    assert not any(chunk.unwritten for chunk in made(CALLS).renderer.append(thought))
    cut_off = CHATML % "{{ m.content.split('</think>')[-1] }}"
    inline = [u("one?"), a("<think>hm</think>1.")]
    assert made(cut_off).renderer.append(inline)[-2].unwritten


NULL_MATTERS = CHATML % (
    "{% if m.role == 'assistant' and m.content is none %}<tool_call>{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}</tool_call>{% else %}{{ m.content }}{% endif %}"
)


def test_f13_null_stays_null(made: Any) -> None:
    shaped, _ = as_template_messages({"messages": [{"role": "assistant", "content": None, "tool_calls": "[]"}]})
    assert shaped[0]["content"] is None
    for content in (None, ""):  # nothing but a call: what the template wants for it is tried
        talk = [u("flood?"), a(content, **calls("Husum")), t("14:05"), a("At five past.")]
        answer = cut(made(NULL_MATTERS).renderer.append(talk, CALL_TOOLS))[1]
        assert answer == ("answer", '<tool_call>tide{"port": "Husum"}</tool_call><|im_end|>')
        assert "None" not in "".join(chunk.text for chunk in made(CALLS.replace(" or ''", "")).renderer.append(talk))


def test_null_that_only_history_does_not_take(made: Any) -> None:
    """A template that splits the content of earlier answers."""
    parts = CALLS.replace("m.content or ''", "m.content.split('</think>')[-1] if not loop.last else m.content or ''")
    with_ = made(parts)
    assert with_.renderer.template.call_content == "empty"
    talk = [u("flood?"), a(None, **calls("Husum")), t("14:05"), a("At five past.")]
    assert cut(with_.renderer.append(talk, CALL_TOOLS))[1][1].startswith("<tool_call>")


def test_a_marker_that_every_header_has_is_no_other_turns(made: Any) -> None:
    """A call is a turn of its own after the text: the model writes its header, which shares a marker with all."""
    shared = (
        "{% for m in messages %}{{ m.role }}<|role_sep|>\n{{ m.content or '' }}<|message_sep|>\n"
        "{% for call in m.tool_calls or [] %}function call<|role_sep|>\n{{ call.function.name }}"
        "{{ call.function.arguments | tojson }}<|message_sep|>\n{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant<|role_sep|>\n{% endif %}"
    )
    talk = [u("flood?"), a(None, **calls("Husum")), t("14:05"), a("At five past.")]
    assert cut(made(shared).renderer.append(talk, CALL_TOOLS))[1] == (
        "answer",
        '<|message_sep|>\nfunction call<|role_sep|>\ntide{"port": "Husum"}<|message_sep|>',
    )


# ---- F14: history without a generation prompt ----


def test_f14_earlier_answers_are_answers(made: Any) -> None:
    for source, header in (
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}", "assistant:"),
        (INTO_THE_LAST_QUESTION, "[/INST]"),
    ):
        with_ = made(source)
        assert with_.renderer.profile.generation_prompt == ""
        found = cut(with_.renderer.expand(TALK))
        assert [text.strip() for kind, text in found if kind == "answer"] == ["1.</s>", "2.</s>"]
        assert all(text.endswith(header) for kind, text in found if kind == "context")
        assert found == cut(with_.renderer.append(TALK))


def test_an_answer_that_opens_a_document_is_trained_whole(made: Any) -> None:
    """The first token of a document is never a target: here it is the blank before the answer."""
    assert cut(made(INTO_THE_LAST_QUESTION).renderer.append([a("0."), *TALK]))[:2] == [
        ("context", " "),
        ("answer", "0.</s>"),
    ]
