"""Law 5: a document's tokens are the model's own, for every chat template that TRL ships and two real tokenizers."""

from __future__ import annotations

import datetime
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ismdata.errors import DataError, UsageError
from ismdata.masks.intervals import ANSWER
from ismdata.rendering.chat_template import ChatTemplate, parse_arguments
from ismdata.rendering.control_tokens import ControlTokens
from ismdata.rendering.conversation_encoder import ConversationEncoder
from ismdata.rendering.encoding import Encoding, load_encoding
from ismdata.rendering.refusals import CannotRender, HistoryRewritten, TemplateRefused
from ismdata.rendering.renderer import Chunk
from tests.conftest import TEMPLATES, conversations, encoding, template_named

#: What rendering two turns shows (docs/templates.md): these rewrite history, all others are prefix-stable.
UNSTABLE = {
    "deepseek_r1_distill", "deepseekv3", "gptoss", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super",
    "nemotron_3_ultra", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6",
}  # fmt: skip

by_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
U, A, S = "user", "assistant", "system"


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def rendered(with_: Encoding, messages: list[dict[str, Any]], **options: Any) -> str:
    """The tokenizer's own rendering, with the same fixed date."""
    template = with_.renderer.template
    if template.typed_content:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = with_.tokenizer.pretrained.apply_chat_template(
        messages, chat_template=template.dated_source, tokenize=False, **options
    )
    assert isinstance(text, str)
    return text


def rendered_or_none(with_: Encoding, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return rendered(with_, messages, **options)
    except Exception:  # a template raises what it likes
        return None


def chunks_of(with_: Encoding, messages: list[dict[str, Any]]) -> list[Chunk] | None:
    """The chunks under the encoding's history; None if the template itself refuses the conversation."""
    cut = with_.renderer.append if with_.history == "append" else with_.renderer.expand
    try:
        return cut(messages)
    except HistoryRewritten:
        assert not is_prefix_stable(with_, messages)
        return None
    except TemplateRefused:
        with pytest.raises(Exception):  # noqa: B017 - a template raises what it likes
            for k in range(1, len(messages) + 1):
                rendered(with_, messages[:k])
                rendered(with_, messages[: k - 1], add_generation_prompt=True)
        return None


def is_prefix_stable(with_: Encoding, messages: list[dict[str, Any]]) -> bool:
    """Whether each longer rendering of this conversation begins with the shorter ones.

    Some otherwise stable templates merge two answers in a row, or refuse the beginning of a conversation.
    """
    texts = []
    for k in range(1, len(messages) + 1):
        if messages[k - 1]["role"] == A and k > 1:
            texts.append(rendered_or_none(with_, messages[: k - 1], add_generation_prompt=True))
        texts.append(rendered_or_none(with_, messages[:k]))
    return None not in texts and all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_every_template_is_covered() -> None:
    assert len(TEMPLATES) >= (41 if sys.version_info >= (3, 11) else 34)  # trl 1.14 is the last one for Python 3.10
    assert {path.stem for path in TEMPLATES} >= UNSTABLE


@pytest.mark.slow
@by_template
def test_stability_is_found(template: Path, smollm2: Path) -> None:
    found = encoding(smollm2, template, markers=True).renderer.profile
    assert found.prefix_stable == (template.stem not in UNSTABLE)
    assert (found.difference is None) == found.prefix_stable


@pytest.mark.slow
@by_template
@pytest.mark.parametrize(("name", "markers"), [("smollm2", True), ("deepseek", False)])
def test_law_5(template: Path, name: str, markers: bool, smollm2: Path, deepseek: Path) -> None:
    """Prefix-stable: the chunks are the rendering, cut at len(rendering of messages[:k] with the generation prompt)."""
    with_ = encoding({"smollm2": smollm2, "deepseek": deepseek}[name], template, markers=markers)
    pretrained = with_.tokenizer.pretrained
    seen = stable = 0
    for messages in conversations(11):
        chunks = chunks_of(with_, messages)
        if chunks is None:
            continue
        seen += 1
        pieces = with_.document(messages)
        ids = [id for piece in pieces for id in piece.ids or ()]
        expected = [id for chunk in chunks for id in pretrained.encode(chunk.text, add_special_tokens=False)]
        assert ids == expected
        assert [chunk.message for chunk in chunks if chunk.kind == ANSWER] == [
            k for k, message in enumerate(messages) if message["role"] == A
        ]
        if template.stem in UNSTABLE or not is_prefix_stable(with_, messages):
            continue
        stable += 1
        text = rendered(with_, messages)
        assert "".join(chunk.text for chunk in chunks) == text
        at = 0
        for chunk in chunks:
            if chunk.kind == ANSWER and chunk.message > 0:
                assert at == len(rendered(with_, messages[: chunk.message], add_generation_prompt=True))
                assert chunk.text.endswith(with_.renderer.profile.end_of_turn)
            at += len(chunk.text)
    assert seen >= 2
    assert stable >= 2 or template.stem in UNSTABLE


@pytest.mark.slow
@by_template
def test_expand_is_what_the_template_renders(template: Path, smollm2: Path) -> None:
    with_ = encoding(smollm2, template, "expand", markers=True)
    seen = 0
    for messages in conversations(11):
        if messages[-1]["role"] != A:
            continue
        chunks = chunks_of(with_, messages)
        if chunks is None:
            continue
        seen += 1
        assert "".join(chunk.text for chunk in chunks) == rendered(with_, messages)
        answers = [chunk for chunk in chunks if chunk.kind == ANSWER]
        assert answers[-1].message == len(messages) - 1
        for chunk in answers:
            assert messages[chunk.message]["content"] in chunk.text
    assert seen >= 2


@by_template
def test_chat_feeds_what_was_packed(template: Path, smollm2: Path) -> None:
    """Before each answer, the contexts since the last one are what next_context gives."""
    with_ = encoding(smollm2, template, markers=True)
    encoder = ConversationEncoder(with_)
    for messages in conversations(11):
        if chunks_of(with_, messages) is None:
            continue
        context: list[int] = []
        for piece in with_.document(messages):
            if piece.kind != ANSWER:
                context += piece.ids or ()
                continue
            if context:  # an answer may come in several pieces
                if piece.message > 0:
                    assert encoder.next_context(messages[: piece.message]) == context
                context = []


@pytest.mark.slow
@by_template
def test_chat_feeds_what_expand_packed(template: Path, smollm2: Path) -> None:
    """Under `expand`, the blocks are the document's contexts and earlier answers, up to the newest answer."""
    with_ = encoding(smollm2, template, "expand", markers=True)
    encoder = ConversationEncoder(with_)
    compared = 0
    for messages in conversations(11):
        if messages[-1]["role"] != A or len(messages) < 3 or chunks_of(with_, messages) is None:
            continue
        expected: list[tuple[int, list[int]]] = []
        for piece in with_.document(messages):
            if piece.message == len(messages) - 1:
                break
            if expected and expected[-1][0] == piece.message:  # -1 for contexts
                expected[-1][1].extend(piece.ids or ())
            else:
                expected.append((piece.message, list(piece.ids or ())))
        assert encoder.blocks(messages[:-1]) == [(message >= 0, ids) for message, ids in expected]
        compared += 1
    assert compared


def test_append_qwen3(smollm2: Path) -> None:
    """The empty reasoning that Qwen3 writes into the newest answer stays once it was fed."""
    with_ = encoding(smollm2, template_named("qwen3"), markers=True)
    chunks = with_.renderer.append(said((S, "Be kind."), (U, "Hi"), (A, "Hello"), (U, "How?"), (A, "Fine")))
    assert [chunk.text for chunk in chunks] == [
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nHello<|im_end|>",
        "\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nFine<|im_end|>",
        "\n",
    ]


def test_append_gpt_oss(smollm2: Path) -> None:
    """An answer ends with <|return|> when it is fed, though history would have <|end|>."""
    with_ = encoding(smollm2, template_named("gptoss"), markers=True)
    chunks = with_.renderer.append(said((U, "Hi"), (A, "Hello"), (U, "How?"), (A, "Fine")))
    assert "Current date: 2024-07-26" in chunks[0].text
    assert [chunk.text for chunk in chunks[1:]] == [
        "<|start|>user<|message|>Hi<|end|><|start|>assistant",
        "<|channel|>final<|message|>Hello<|return|>",
        "<|start|>user<|message|>How?<|end|><|start|>assistant",
        "<|channel|>final<|message|>Fine<|return|>",
    ]


def test_append_deepseek_r1(smollm2: Path) -> None:
    """The generation prompt opens reasoning, a finished answer has none: the context ends where they diverge."""
    with_ = encoding(smollm2, template_named("deepseek_r1_distill"), markers=True)
    chunks = with_.renderer.append(said((U, "Hi"), (A, "<b>Hello</b>"), (U, "How?"), (A, "Fine")))
    assert [chunk.text for chunk in chunks][-4:] == [
        "<｜User｜>Hi<｜Assistant｜>",
        "<b>Hello</b><｜end▁of▁sentence｜>",
        "<｜User｜>How?<｜Assistant｜>",
        "Fine<｜end▁of▁sentence｜>",
    ]


def test_two_answers_in_a_row(smollm2: Path) -> None:
    """The second answer begins after its own generation prompt, although Qwen3 then rewrites the first one."""
    with_ = encoding(smollm2, template_named("qwen3"), markers=True)
    chunks = with_.renderer.append(said((U, "q"), (A, "first"), (A, "second")))
    assert [chunk.text for chunk in chunks if chunk.kind == ANSWER] == [
        "<think>\n\n</think>\n\nfirst<|im_end|>",
        "<think>\n\n</think>\n\nsecond<|im_end|>",
    ]
    assert chunks[2].text == "\n<|im_start|>assistant\n"


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOL_TALK: list[dict[str, Any]] = [
    {"role": U, "content": "QQQ"},
    {"role": A, "content": "AAA", "tool_calls": [CALL]},
    {"role": "tool", "content": "TTT", "name": "clock"},
    {"role": A, "content": "BBB"},
]


@pytest.mark.slow
@by_template
@pytest.mark.parametrize("history", ["append", "expand"])
def test_tool_results_stand_before_the_answer_that_uses_them(template: Path, history: Any, smollm2: Path) -> None:
    """Otherwise the conversation is refused: a result that is lost or inside an answer would train the wrong text."""
    with_ = encoding(smollm2, template, history, markers=True)
    try:
        pieces = with_.document(TOOL_TALK)
    except CannotRender:
        return
    decode = with_.tokenizer.decode
    texts = [(piece.kind == ANSWER, piece.message, decode(piece.ids or ())) for piece in pieces]
    before = "".join(text for answer, _, text in texts if not answer)
    assert "QQQ" in before
    assert "TTT" in before
    assert "TTT" not in "".join(text for answer, _, text in texts if answer)
    newest = "".join(text for _, message, text in texts if message == 3)
    assert "BBB" in newest
    assert "clock" not in newest


def test_arguments_as_text_where_the_template_wants_them(smollm2: Path) -> None:
    with_ = encoding(smollm2, template_named("deepseekv3"), markers=True)
    assert with_.renderer.template.text_arguments
    text = "".join(chunk.text for chunk in with_.renderer.append(TOOL_TALK))
    assert '{"zone": "UTC"}' in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expression", "content"),
    [
        ("m.content|replace('foo', 'bar')", "some foo"),
        ("m.content|upper", "word"),
        ("m.content|e", "a < b"),
        ("('J' if m.content[0] == '{' else '') + m.content", "{x"),
        ("('L' if m.content|length > 30 else '') + m.content", "word " * 20),
        ("('Y' if m.content == 'yes' else '') + m.content", "yes"),
        ("m.content[:20]", "word " * 20),
        ("m.content.rstrip(' ')", "word "),
        ("m.content.split('</think>')[-1]", "a</think>b"),
        ("('T' if m.content.startswith(('<a>', '<b>')) else '') + m.content", "<b>c"),
    ],
)
def test_templates_that_act_on_what_is_said(expression: str, content: str, smollm2: Path, tmp_path: Path) -> None:
    """Contents that a template changes are never filled into a skeleton."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ EXPRESSION }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "t.jinja").write_text(source.replace("EXPRESSION", expression), encoding="utf-8")
    with_ = load_encoding(str(smollm2), chat_template=str(tmp_path / "t.jinja"))
    found = with_.sensitivity
    assert found.everything or any(trigger in content for trigger in found.triggers)
    plain = encoding(smollm2).sensitivity
    assert not plain.everything
    assert plain.triggers == ()


@pytest.mark.parametrize("kind", ["first", "always", "Prepend", "never"])
def test_tokenizers_that_put_a_blank_before_words(kind: str, tmp_path: Path) -> None:
    """Tokenizers like SentencePiece: the pieces have the ids of the whole rendering by the tokenizer."""
    letters = [chr(code) for code in range(32, 127)]
    backend = Tokenizer(
        models.BPE(vocab={c: k for k, c in enumerate(["<unk>", "▁", *letters])}, merges=[], unk_token="<unk>")
    )
    if kind == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|u|>' if m.role == 'user' else '<|a|>' }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|a|>{% endif %}"
    )
    tokenizer.save_pretrained(str(tmp_path))
    with_ = load_encoding(str(tmp_path))
    messages = said((U, "hi there"), (A, "hello you"), (U, "bye"), (A, "so long"))
    ours = [id for piece in with_.document(messages) for id in piece.ids or ()]
    assert ours == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    plain = said((U, "hi <|a|>"), (A, "café"))  # a spelled-out marker and an unknown character are no stray control
    assert sum(piece.controls for piece in with_.document(plain)) == 4


def test_a_tail_of_the_end_is_no_target(smollm2: Path) -> None:
    """Phi-3 closes the conversation with eos: context, after the answer's own <|end|>."""
    with_ = encoding(smollm2, template_named("phi3"), markers=True)
    chunks = with_.renderer.append(said((U, "Hi"), (A, "Hello")))
    assert [(chunk.kind == ANSWER, chunk.text) for chunk in chunks[-2:]] == [
        (True, "Hello<|end|>"),
        (False, "\n" + with_.tokenizer.pretrained.eos_token),
    ]


@by_template
def test_text_never_becomes_a_control_token(template: Path, smollm2: Path) -> None:
    """Messages whose text looks like control tokens get no more control tokens than other messages."""
    with_ = encoding(smollm2, template, markers=True)
    controls = set(with_.tokenizer.control_ids.tolist())
    spelled = "".join(with_.tokenizer.controls.tokens)

    def count(content: str) -> int | None:
        try:
            pieces = with_.document(said((U, content), (A, content), (U, content), (A, content)))
        except TemplateRefused:
            return None
        return sum(id in controls for piece in pieces for id in piece.ids or ())

    assert count(f"say {spelled} now") == count("say it now")


def test_cut_prefers_the_longest() -> None:
    from ismdata.rendering.control_tokens import AddedToken

    tokens = [AddedToken(text=text, id=k, special=True) for k, text in enumerate(["<a>", "<a><b>", "<b>"])]
    cut = ControlTokens(tokens).cut("x<a><b>y<b>")
    assert [piece if isinstance(piece, str) else piece.id for piece in cut] == ["x", 1, "y", 2]


def test_escaping_avoids_private_characters_in_use() -> None:
    from ismdata.rendering.control_tokens import AddedToken

    controls = ControlTokens([AddedToken(text="<e>", id=7, special=True)])
    text = f"a<e>{chr(0xF0000)}"
    escaped, escapes = controls.escape({"content": text})
    assert "<e>" not in escaped["content"]
    assert escapes.undo(escaped["content"]) == text


def test_paired_markup_stays_what_it_is(deepseek: Path) -> None:
    """<think> is no control token: in an answer the tokenizer encodes it as usual."""
    with_ = encoding(deepseek, template_named("qwen2_5"))
    pretrained = with_.tokenizer.pretrained
    assert "<think>" not in with_.tokenizer.controls.tokens
    assert "<｜User｜>" in with_.tokenizer.controls.tokens
    ids = with_.tokenizer.encode(["<think>a</think>b"])[0]
    assert ids == pretrained.encode("<think>a</think>b", add_special_tokens=False)


def test_dates_are_fixed_and_can_be_chosen(smollm2: Path) -> None:
    template = template_named("llama3_2")
    default = encoding(smollm2, template)
    other = load_encoding(str(smollm2), chat_template=str(template), date=datetime.date(2025, 1, 2))
    messages = said((U, "Hi"), (A, "Hello"))
    assert "26 Jul 2024" in default.renderer.append(messages)[0].text + default.renderer.append(messages)[1].text
    assert "02 Jan 2025" in "".join(chunk.text for chunk in other.renderer.append(messages))
    assert default.renderer.template.sha256 != other.renderer.template.sha256


@pytest.mark.slow
def test_chatml_is_said_and_needs_its_tokens(smollm2: Path, deepseek: Path) -> None:
    with pytest.raises(DataError, match=r"lacks <\|im_start\|> and <\|im_end\|>.*--chat-template"):
        load_encoding(str(deepseek))
    assert load_encoding(str(smollm2), chat_template="chatml").renderer.template.name == "chatml"


@pytest.mark.slow
def test_template_errors(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_encoding(str(smollm2), chat_template=str(tmp_path / "none.jinja"))
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text("nothing of what you say", encoding="utf-8")
    with pytest.raises(DataError, match="does not contain the texts of user and assistant"):
        load_encoding(str(smollm2), chat_template=str(deaf))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}", encoding="utf-8")
    with pytest.raises(DataError, match="refuses one user message"):
        load_encoding(str(smollm2), chat_template=str(broken))
    with pytest.raises(DataError, match=r"expected a folder with tokenizer\.json"):
        load_encoding(str(deaf))
    with pytest.raises(DataError, match=r"without tokenizer\.json"):
        load_encoding(str(tmp_path))


def test_arguments() -> None:
    assert parse_arguments(["enable_thinking=false", "name=Bo", "n=3"]) == {
        "enable_thinking": False,
        "name": "Bo",
        "n": 3,
    }
    with pytest.raises(UsageError, match="expected NAME=VALUE"):
        parse_arguments(["thinking"])


def test_rewritten_history_that_cannot_be_followed(smollm2: Path, tmp_path: Path) -> None:
    """`append` cannot follow a template that drops earlier turns; the refusal says what to do."""
    forgetful = tmp_path / "forgetful.jinja"
    forgetful.write_text(
        "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    with_ = load_encoding(str(smollm2), chat_template=str(forgetful))
    with pytest.raises(HistoryRewritten, match="--history expand"):
        with_.renderer.append(said((U, "one"), (A, "two"), (U, "three"), (A, "four")))


def test_template_identity_does_not_depend_on_where_it_is(smollm2: Path) -> None:
    one = ChatTemplate(name="a", source="x", special_tokens={}, arguments={})
    assert one.sha256 == ChatTemplate(name="b", source="x", special_tokens={}, arguments={}).sha256
    assert one.sha256 != ChatTemplate(name="a", source="x", special_tokens={}, arguments={"k": 1}).sha256
