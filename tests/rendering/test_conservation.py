"""Law 7: no text is lost or in the wrong kind of span. One small template for each way in which this once failed.

Each template has what made a public one fail, and little else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ismdata.conversation import CONVERSATION_SCHEMA
from ismdata.masks.intervals import ANSWER
from ismdata.pack.batch_encoder import BatchEncoder
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.pack.template_check import SkeletonMismatch, prepare_comparison
from ismdata.rendering.encoding import Encoding
from ismdata.rendering.refusals import CannotRender, HistoryRewritten, NotRendered, TextLost
from ismdata.rendering.renderer import Chunk
from tests.conftest import encoding
from tests.pack.test_batch_encoder import whole

CALL_TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]


def s(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def u(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def a(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def t(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def calls(*ports: str, name: str = "tide") -> dict[str, Any]:
    return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": {"port": p}}} for p in ports]}


TALK = [u("one?"), a("1."), u("two?"), a("2.")]

#: Turns as `<|im_start|>role … <|im_end|>`; the caller gives the expression for a message's text.
CHATML = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


@pytest.fixture
def made(tmp_path: Path, smollm2: Path) -> Any:
    """The encoding under a template given as text."""

    def make(source: str, history: str = "append") -> Encoding:
        path = tmp_path / f"{abs(hash(source))}.jinja"
        path.write_text(source, encoding="utf-8")
        return encoding(smollm2, path, history, markers=True)

    return make


def cut(chunks: Sequence[Chunk]) -> list[tuple[str, str]]:
    """Contexts joined, each answer separate."""
    joined: list[tuple[str, str]] = []
    for chunk in chunks:
        kind = "answer" if chunk.kind == ANSWER else "context"
        if kind == "context" and joined and joined[-1][0] == kind:
            joined[-1] = kind, joined[-1][1] + chunk.text
        else:
            joined.append((kind, chunk.text))
    return joined


def fed_by_chat(with_: Encoding, messages: list[dict[str, Any]]) -> list[str]:
    """The context that chat feeds before each answer."""
    places = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    return [with_.renderer.next_context(messages[:k])[2] for k in places]


# ---- F1: the token that ends the conversation ends no answer in history ----

ONLY_AT_THE_END = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}<|assistant|>\n{% endif %}{# <|user|> <|assistant|> #}"
)
PLAIN_AT_THE_END = (
    "{% for m in messages %}{{ m.role.upper() }}: {{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}ASSISTANT: {% endif %}"
)


def test_f1_an_end_that_only_the_last_answer_has(made: Any) -> None:
    with_ = made(ONLY_AT_THE_END)
    assert cut(with_.renderer.append(TALK)) == [
        ("context", "<|user|>\none?\n<|assistant|>\n"),
        ("answer", "1.</s>"),
        ("context", "\n<|user|>\ntwo?\n<|assistant|>\n"),
        ("answer", "2.</s>"),
    ]
    assert fed_by_chat(with_, TALK) == ["<|user|>\none?\n<|assistant|>\n", "\n<|user|>\ntwo?\n<|assistant|>\n"]
    assert any("only after the last answer of a conversation" in note for note in with_.notes)


def test_f1_the_same_in_plain_text(made: Any) -> None:
    with_ = made(PLAIN_AT_THE_END)
    assert cut(with_.renderer.append(TALK))[1:3] == [("answer", "1.</s>"), ("context", "\nUSER: two?\nASSISTANT: ")]
    assert with_.renderer.expand(TALK)[-1].text == "2.</s>"
    history = [chunk.text for chunk in with_.renderer.expand(TALK) if chunk.kind == ANSWER]
    assert history == ["1.", "2.</s>"]  # history has no end of turn


# ---- F2: the system prompt goes into the last question ----

INTO_THE_LAST_QUESTION = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if m == users[-1] and system %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_f2_a_system_prompt_that_moves_cannot_be_appended(made: Any) -> None:
    with_ = made(INTO_THE_LAST_QUESTION)
    with pytest.raises(HistoryRewritten, match="--history expand"):
        with_.renderer.append([s("be brief"), *TALK])
    assert cut(with_.renderer.append([s("be brief"), *TALK[:2]])) == [
        ("context", "[INST] be brief\n\none? [/INST]"),
        ("answer", " 1.</s>"),
    ]
    assert cut(with_.renderer.expand([s("be brief"), *TALK])) == [
        ("context", "[INST] one? [/INST]"),
        ("answer", " 1.</s>"),
        ("context", "[INST] be brief\n\ntwo? [/INST]"),
        ("answer", " 2.</s>"),
    ]


# ---- F3: history is cut, and answers follow one another ----

CUTS_REASONING = CHATML % (
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think></think>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}"
)


def test_f3_an_answer_holds_no_other_answer_and_no_header(made: Any) -> None:
    with_ = made(CUTS_REASONING)
    talk = [u("one?"), a("<think>hm</think>1."), a("1, really."), u("two?"), a("2.")]
    answers = ["<think>hm</think>1.<|im_end|>", "<think></think>1, really.<|im_end|>", "<think></think>2.<|im_end|>"]
    assert [text for kind, text in cut(with_.renderer.append(talk)) if kind == "answer"] == answers
    for k, expected in zip((2, 3, 5), answers, strict=True):
        chunks = with_.renderer.expand(talk[:k])
        assert chunks[-2].text == expected
        assert chunks[-3].text.endswith("<|im_start|>assistant\n")


# ---- F4: the two renderings diverge before the header ----

TWO_WAYS_TO_THE_HEADER = (
    "<|begin|>{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content }}\n<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n' }}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def test_f4_no_header_is_trained(made: Any) -> None:
    with_ = made(TWO_WAYS_TO_THE_HEADER)
    contexts = [
        "<|begin|><|header_start|>user<|header_end|>\n\none?\n<|eot|><|header_start|>assistant<|header_end|>\n\n",
        "<|header_start|>user<|header_end|>\n\ntwo?\n<|eot|><|header_start|>assistant<|header_end|>\n\n",
    ]
    assert cut(with_.renderer.append(TALK)) == [
        ("context", contexts[0]),
        ("answer", "1.\n<|eot|>"),
        ("context", contexts[1]),
        ("answer", "2.\n<|eot|>"),
    ]
    assert fed_by_chat(with_, TALK) == contexts
    first = with_.renderer.append([a("0."), *TALK])
    assert cut(first)[:2] == [
        ("context", "<|begin|><|header_start|>assistant<|header_end|>\n\n"),
        ("answer", "0.\n<|eot|>"),
    ]


# ---- F5: a conversation is cut the same way individually and with a skeleton ----

OPENS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_f5_a_name_changes_no_border(made: Any) -> None:
    """Because of the name the conversation is rendered individually; the template does not write the name."""
    with_ = made(OPENS_REASONING)
    talk = [u("one?"), a("<think>\nhm\n</think>\n\n1."), u("two?"), a("2.")]
    named = [{**talk[0], "name": "ann"}, *talk[1:]]
    rows = [{"id": str(k), "source": f"t:{k}", "messages": messages} for k, messages in enumerate((talk, named))]
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    assert batch.individual.tolist() == [False, True]
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    documents = encoder.documents(encoder.lay_out(whole(batch)), whole(batch))
    first = int(documents.lengths[0])
    assert documents.input_ids[:first].tolist() == documents.input_ids[first:].tolist()
    count = int(documents.span_counts[0])
    assert documents.spans[:count].tolist() == documents.spans[count:].tolist()
    assert (
        fed_by_chat(with_, talk) == [text for kind, text in cut(with_.renderer.append(talk)) if kind == "context"][:2]
    )


def test_f5_the_roads_are_compared_by_spans(made: Any) -> None:
    """The same tokens with another border count as different."""
    with_ = made(OPENS_REASONING)
    rows = [{"id": "0", "source": "t:0", "messages": TALK}]
    batch = ConversationBatch.from_rows(pa.RecordBatch.from_pylist(rows, schema=CONVERSATION_SCHEMA), with_.sensitivity)
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    comparison = prepare_comparison(encoder, whole(batch))
    assert comparison.check() == 1
    [(first, second, *others)] = comparison.spans
    moved = [(first[0] + 1, first[1]), (second[0] - 1, second[1]), *others]
    with pytest.raises(SkeletonMismatch, match="different spans"):
        dataclasses.replace(comparison, spans=[moved]).check()


# ---- F6: a later system message moves to the front, or is dropped ----

TO_THE_FRONT = (
    "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEFT_OUT = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LATER = [*TALK[:2], s("in German"), *TALK[2:]]


def test_f6_a_system_message_that_moves_or_vanishes(made: Any) -> None:
    with_ = made(TO_THE_FRONT)
    with pytest.raises(HistoryRewritten, match="message 3 \\(system\\)"):
        with_.renderer.append(LATER)
    assert cut(with_.renderer.expand(LATER))[0][1].startswith("in German\n")
    for ways in (made(LEFT_OUT).renderer.append, made(LEFT_OUT).renderer.expand):
        with pytest.raises(TextLost, match="message 3 \\(system\\)"):
            ways(LATER)
        with pytest.raises(TextLost, match="message 1 \\(system\\)"):
            ways([s("be brief"), *TALK])


def test_a_text_written_twice_is_refused(made: Any) -> None:
    twice = CHATML % "{{ m.content }}{% if m.role == 'user' %} ({{ m.content }}){% endif %}"
    with pytest.raises(TextLost, match="more than once"):
        made(twice).renderer.append(TALK)


def test_a_text_that_is_changed_is_refused(made: Any) -> None:
    with pytest.raises(TextLost, match="changes the text of message 1"):
        made(CHATML % "{{ m.content | replace('one', 'two') }}").renderer.append(TALK)
    shouted = made(CHATML % "{{ m.content | upper }}").renderer.append([u("one?"), a("yes")])
    assert cut(shouted)[-2] == ("answer", "YES<|im_end|>")


# ---- F7 and F8: calls ----

CALLS = CHATML % (
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</tool_call>{% endfor %}"
)
ONE_CALL = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
FLOOD = [u("flood?"), a(None, reasoning_content="look", **calls("Husum")), t("14:05"), a("At five past two.")]


@pytest.mark.parametrize("history", ["append", "expand"])
def test_f7_a_call_with_reasoning_is_written_once(history: str, made: Any) -> None:
    with_ = made(CALLS)
    chunks = getattr(with_.renderer, history)(FLOOD, CALL_TOOLS)
    assert "".join(chunk.text for chunk in chunks) == with_.renderer.template.render(FLOOD, tools=CALL_TOOLS)
    assert [text for kind, text in cut(chunks) if kind == "answer"] == [
        '<think>look</think><tool_call>tide {"port": "Husum"}</tool_call><|im_end|>',
        "At five past two.<|im_end|>",
    ]


def test_f7_answers_that_a_template_puts_side_by_side_share_no_character(made: Any) -> None:
    """The end of the first of two answers is not the beginning of the second as well."""
    merged = (
        "{% for m in messages %}{% set before = messages[loop.index0 - 1].role %}"
        "{% if loop.first or m.role == 'user' or before == 'user' %}"
        "<|turn>{{ m.role }}\n{% endif %}{{ m.content }}<turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
    )
    with_ = made(merged)
    talk = [u("one?"), a("1."), a("1, really."), u("two?"), a("2.")]
    chunks = with_.renderer.expand(talk)
    assert "".join(chunk.text for chunk in chunks) == with_.renderer.template.render(talk)
    assert [chunk.text.strip() for chunk in chunks if chunk.kind == ANSWER] == [
        "1.<turn|>",
        "1, really.<turn|>",
        "2.<turn|>",
    ]


@pytest.mark.parametrize("history", ["append", "expand"])
def test_f8_a_call_that_is_left_out(history: str, made: Any) -> None:
    talk = [u("floods?"), a(None, **calls("Husum", "Kiel")), t("14:05"), a("At five past two.")]
    end = 4 if history == "append" else 2
    assert cut(getattr(made(CALLS).renderer, history)(talk[:end], CALL_TOOLS))
    with pytest.raises(NotRendered, match="Kiel"):
        getattr(made(ONE_CALL).renderer, history)(talk[:end], CALL_TOOLS)
    for pair in ([call(), call()], [*calls("Husum")["tool_calls"], call()]):  # no text of its own tells the second
        silent = [u("floods?"), a(None, tool_calls=pair), t("14:05"), a("At five past two.")]
        assert cut(getattr(made(CALLS).renderer, history)(silent[:end], CALL_TOOLS))
        with pytest.raises(NotRendered, match="'tide'"):
            getattr(made(ONE_CALL).renderer, history)(silent[:end], CALL_TOOLS)


def call() -> dict[str, Any]:
    """It differs from another call of the same tool only in values that are no text."""
    return {"type": "function", "function": {"name": "tide", "arguments": {"day": 1}}}


def test_text_beside_a_call_is_not_dropped_in_silence(made: Any) -> None:
    only_calls = CALLS.replace("{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    talk = [u("flood?"), a("I look.", **calls("Husum")), t("14:05"), a("At five past two.")]
    assert cut(made(CALLS).renderer.append(talk, CALL_TOOLS))
    with pytest.raises(TextLost, match="message 2 \\(assistant\\)"):
        made(only_calls).renderer.append(talk, CALL_TOOLS)


# ---- every text and position ----


ALWAYS_OPEN = (
    "<s>{% for m in messages %}<|START|><|{{ m.role }}|>{{ m.content }}<|STOP|><|END|>{% endfor %}"
    "<|START|><|assistant|>{% if add_generation_prompt %}<|SAY|>{% endif %}{# <|user|> #}"
)


@pytest.mark.slow
@pytest.mark.parametrize("history", ["append", "expand"])
@pytest.mark.parametrize(
    "text", ["", " ", "user", "assistant\n", "1.", "<|im_end|>", "<think>", "</think>", "{{ x }}", "…"]
)
def test_texts_that_look_like_anything(text: str, history: str, made: Any) -> None:
    """Contexts and answers contain their own texts in order, whatever these are, or the conversation is refused."""
    for source in (CHATML % "{{ m.content }}", CUTS_REASONING, ONLY_AT_THE_END, TWO_WAYS_TO_THE_HEADER, ALWAYS_OPEN):
        with_ = made(source)
        talk = [
            u(f"q1 {text}"),
            a(f"a1 {text}"),
            u(text.strip() or "q2"),
            a(f"{text} a2"),
            u(f"{text}q3{text}"),
            a("a3"),
        ]
        (escaped, _), escapes = with_.tokenizer.controls.escape([talk, None])
        try:
            chunks = getattr(with_.renderer, history)(escaped)
        except CannotRender:
            continue
        answers = [(chunk.message, escapes.undo(chunk.text)) for chunk in chunks if chunk.kind == ANSWER]
        context = escapes.undo("".join(chunk.text for chunk in chunks if chunk.kind != ANSWER))
        if history == "append":
            assert [k for k, _ in answers] == [1, 3, 5]
            assert all(marker in said for (_, said), marker in zip(answers, ("a1", "a2", "a3"), strict=True))
        assert answers[-1][0] == 5
        assert "a3" in answers[-1][1]
        at = -1
        for question in ("q1", text.strip() or "q2", "q3"):
            at = context.find(question, at + 1)
            assert at >= 0


def test_a_text_traced_by_words_here_and_whole_there_ends_at_one_place(made: Any) -> None:
    """With the result, the rendering is traced by words: the call's text is then without its full stop."""
    as_json = CALLS.replace(
        "{{ m.content or '' }}", "{{ m.content | tojson if m.role == 'tool' else m.content or '' }}"
    )
    talk = [u("note?"), a(None, **calls("Buy milk.")), t('{"done": "yes"}'), a("Done."), u("thanks"), a("Welcome.")]
    found = cut(made(as_json).renderer.append(talk, CALL_TOOLS))
    assert found[1] == ("answer", '<tool_call>tide {"port": "Buy milk."}</tool_call><|im_end|>')
    assert found[2][1].startswith("\n<|im_start|>tool\n")


def test_a_result_that_names_its_tool_ends_no_call(made: Any) -> None:
    """Calls without text are located by the tool's name, which the template repeats in the result's header."""
    named = CALLS.replace("{{ m.role }}", "{{ m.role }}{% if m.role == 'tool' %} tide{% endif %}")
    talk = [u("flood?"), a(None, tool_calls=[call()]), t("14:05"), a("At five past two.")]
    assert [text for kind, text in cut(made(named).renderer.append(talk, CALL_TOOLS)) if kind == "answer"] == [
        '<tool_call>tide {"day": 1}</tool_call><|im_end|>',
        "At five past two.<|im_end|>",
    ]
