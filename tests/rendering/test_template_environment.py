"""Templates run in the environment that transformers gives them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from ismdata.rendering.template_environment import render
from tests.conftest import TEMPLATES

TODAY = datetime.date(2024, 7, 26)


def ours(source: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, **context: Any) -> str:
    return render(source, messages, tools=tools, add_generation_prompt=False, context=context, today=TODAY)


def theirs(source: str, messages: list[dict[str, Any]], tools: list[Any] | None = None, **context: Any) -> str:
    texts, _ = render_jinja_template([messages], tools=tools, chat_template=source, **context)  # type: ignore[misc]
    return str(texts[0])


def outcome(render_: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """The text, or the kind of exception with its message."""
    try:
        return "text", render_(*args, **kwargs)
    except Exception as error:  # a template raises what it likes
        return type(error).__name__, str(error)


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "<b>&"},
    {"role": "user", "content": "Q ü\u2028"},
    {
        "role": "assistant",
        "content": "A",
        "reasoning": "R",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": "é<"}}}],
    },
]

SOURCES = [
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}",
    "{{ messages | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}\n  {% if loop.index0 == 1 %}{% continue %}{% endif %}\n{{ m.content }}\n{% endfor %}\n",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }}/{{ m.reasoning }} {% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{%- generation -%}\n {{ messages[1].content }}\n {%- endgeneration -%} .",
    "{% generation %}{% break %}{% endgeneration %}",
    "{% set ns = namespace(a=1, self=2) %}{% set ns.a = 3 %}{{ ns.a }}{{ ns.self }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 3 %}",
    "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}",
    "{{ dict.__class__ }}{{ dict.mro is defined }}",
    "{{ raise_exception('no ' ~ messages[0].role) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages[0].content.format(1) }}{{ '{0.__class__}'.format(messages) }}",
    "{{ undefined_name }}{{ undefined_name.attribute }}",
    "{{ tools | length if tools is not none else 'none' }}{{ documents is none }}{{ add_generation_prompt }}",
    "{{ range(10**7) | list | length }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "{% unknown %}",
    "{{ extra }}{{ extra.a | default('d') }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}",
    "   {# c #}\n{{- messages[0].content | trim | upper | e -}}\n ",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_template_gets_what_transformers_gives_it(source: str) -> None:
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        arguments: Any = (source, MESSAGES, tools)
        assert outcome(ours, *arguments, extra={"b": 1}) == outcome(theirs, *arguments, extra={"b": 1})


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_real_templates_write_the_same(path: Path) -> None:
    source = path.read_text("utf-8")
    if "strftime_now" in source:
        pytest.skip("prints today's date")
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2], [{**MESSAGES[2], "tool_calls": []}], []):
        names = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": True}
        assert outcome(ours, source, messages, **names) == outcome(theirs, source, messages, **names)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "thinking", "reasoning", "x"]), VALUES), max_size=3)
)
def test_any_messages_are_rendered_alike(messages: list[dict[str, Any]]) -> None:
    source = "{% for m in messages %}{{ m | tojson }}{{ m.content }}{{ m.x is mapping }}{% endfor %}"
    assert outcome(ours, source, messages) == outcome(theirs, source, messages)


def test_the_date_is_fixed_whatever_its_format() -> None:
    source = (
        "{% set f = '%d' ~ ' %b %Y' %}{{ strftime_now(f) }}|{{ strftime_now('%H:%M') }}|{{ strftime_now is defined }}"
    )
    assert ours(source, []) == "26 Jul 2024|00:00|True"
