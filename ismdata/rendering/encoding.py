"""A tokenizer with its chat template: loaded, probed, saved with the shards and loaded again for chat.

`pack` and `chat` share an `Encoding`, so that a chat feeds a model exactly what it was trained on.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ismdata.choices import History
from ismdata.errors import DataError, UsageError
from ismdata.rendering.chat_template import BUILT_IN, DEFAULT_DATE, ChatTemplate, Message, built_in
from ismdata.rendering.control_tokens import Escapes
from ismdata.rendering.glm_tokens import GlmTokens, choose_tokens
from ismdata.rendering.pieces import Piece, compile_chunks
from ismdata.rendering.renderer import Chunk, Renderer
from ismdata.rendering.saved_tokenizer import SavedTokenizer
from ismdata.rendering.sensitivity import Sensitivity, find_sensitivity
from ismdata.rendering.template_probe import TemplateProfile, probe_template
from ismdata.rendering.tokenizer import Tokenizer, load_pretrained
from ismdata.rendering.tracing import Tracer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from typing_extensions import Unpack

#: The file beside a saved tokenizer that says how its template is rendered.
SETTINGS_NAME = "ismdata_template.json"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A tokenizer with its probed template.

    Attributes:
        tokenizer: The tokenizer.
        renderer: The probed template.
        history: What is done about earlier turns (docs/templates.md).
        sensitivity: Which contents need individual rendering.
        notes: Sentences that the user should see once.
        glm: The tokens of the GLM layout; None in the plain layout.
    """

    tokenizer: Tokenizer
    renderer: Renderer
    history: History
    sensitivity: Sensitivity
    notes: tuple[str, ...]
    glm: GlmTokens | None = None

    def with_glm(self, *, mask_token: str | None, start_token: str | None, every_answer: bool) -> Encoding:
        """The same encoding in the GLM layout.

        Args:
            mask_token: The control token for `[MASK]`; by default the tokenizer's own.
            start_token: The control token for `[START]`; by default the tokenizer's own.
            every_answer: Whether each answer gets the two tokens.

        Returns:
            The encoding.

        Raises:
            UsageError: If the tokenizer has no such token, or both are the same.
        """
        in_use = (self.tokenizer.unknown_id, self.tokenizer.pad_id, self.tokenizer.eos_id)
        controls = {text: token for text, token in self.tokenizer.controls.tokens.items() if token.id not in in_use}
        glm = choose_tokens(
            controls,
            self.tokenizer.name,
            mask_token=mask_token,
            start_token=start_token,
            every_answer=every_answer,
        )
        return replace(self, glm=glm)

    def chunks(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[list[Chunk], Escapes]:
        """Render one conversation individually and cut it.

        Args:
            messages: The conversation, as templates take it.
            tools: The tools described to the template.

        Returns:
            The chunks, still escaped, and what undoes the escaping.

        Raises:
            CannotRender: If the conversation cannot be rendered or its text cannot be escaped.
        """
        (messages, tools), escapes = self.tokenizer.controls.escape([list(messages), tools])
        return self.renderer.cut(messages, tools, self.history), escapes

    def document(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        *,
        encode: bool = True,
        without_reasoning: bool = False,
    ) -> tuple[Piece, ...]:
        """Encode one conversation individually: the reference, and the only way for conversations without a skeleton.

        Args:
            messages: The conversation, as templates take it.
            tools: The tools described to the template.
            encode: Encode all text. Otherwise text stays in `parts`, one per piece.
            without_reasoning: Give the reasoning in an answer a span of its own, with message -1: it is not trained.

        Returns:
            The document's pieces, without the tokens of the GLM layout.

        Raises:
            CannotRender: If the conversation cannot be rendered or its text cannot be escaped.
        """
        chunks, escapes = self.chunks(messages, tools)
        return compile_chunks(
            chunks,
            self.tokenizer,
            lambda text: (escapes.undo(text),),
            encode=encode,
            without_reasoning=without_reasoning,
        )

    def save(self, folder: Path) -> None:
        """Save the tokenizer with its template, and how the template is rendered, into `folder`."""
        template = self.renderer.template
        self.tokenizer.pretrained.chat_template = template.source
        self.tokenizer.save(folder)
        settings = {
            "template": template.name,
            "history": self.history,
            "date": template.date.isoformat(),
            "arguments": dict(template.arguments),
        }
        if self.glm is not None:
            settings["glm"] = asdict(self.glm)
        (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class TemplateKeywords(TypedDict, total=False):
    """The keywords of `probe_encoding` that choose a template and how it renders."""

    chat_template: str | None
    history: History
    arguments: Mapping[str, Any] | None
    date: datetime.date


def load_encoding(tokenizer: str, **template: Unpack[TemplateKeywords]) -> Encoding:
    """Load a tokenizer, choose its template and probe it.

    Args:
        tokenizer: A local folder, a GGUF file or a hub name.
        **template: Which template, and how it renders, as for `probe_encoding`.

    Returns:
        The encoding.

    Raises:
        DataError: If the tokenizer cannot be loaded, or the template cannot be used.
        UsageError: If there is no such template.

    >>> load_encoding("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    return probe_encoding(load_pretrained(tokenizer), name=tokenizer, **template)


def probe_encoding(
    pretrained: PreTrainedTokenizerFast | SavedTokenizer,
    *,
    name: str,
    chat_template: str | None = None,
    history: History = "append",
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date = DEFAULT_DATE,
) -> Encoding:
    """Choose and probe the template of a tokenizer that is loaded already.

    Args:
        pretrained: The tokenizer.
        name: What errors call it.
        chat_template: A Jinja file or the name of a built-in template. By default the tokenizer's own template, or
            ChatML if it has none.
        history: What is done about earlier turns (docs/templates.md).
        arguments: What `--template-arg` passes to the template.
        date: The date that the template prints.

    Returns:
        The encoding.

    Raises:
        DataError: If the tokenizer or the template cannot be used.
        UsageError: If there is no such template.
    """
    template_name, source, notes = _choose_template(pretrained.chat_template, chat_template, name)
    loaded = Tokenizer(pretrained, name=name, template=source)
    template = ChatTemplate(
        name=template_name,
        source=source,
        special_tokens=loaded.special_tokens,
        arguments=dict(arguments or {}),
        date=date,
    )
    if template_name in BUILT_IN:
        _check_vocabulary(loaded, source, template_name)
    template, found = probe_template(template, loaded.markers)
    renderer = Renderer(tracer=Tracer(template), profile=found, controls=loaded.controls, markers=loaded.markers)
    sensitive = find_sensitivity(renderer, prepends=loaded.prepends)
    if template.prints_date:
        notes.append(f"The template prints a date: it is fixed at {date.isoformat()} (--template-date).")
    if found.difference is not None:
        fed, rewritten = found.difference
        what = "append: what was fed stays as it is" if history == "append" else "expand: one document per answer"
        notes.append(
            f"The template rewrites history: after {fed[:60]!r} was fed, it renders {rewritten[:60]!r}. "
            f"Used: --history {what}."
        )
    if sensitive.everything:
        notes.append(
            "The template acts on the texts of messages, so each conversation is rendered individually: this is slower."
        )
    return Encoding(
        tokenizer=loaded,
        renderer=renderer,
        history=history,
        sensitivity=sensitive,
        notes=(*notes, *_notes_on_ends(found, loaded)),
    )


def _notes_on_ends(found: TemplateProfile, tokenizer: Tokenizer) -> list[str]:
    """What the user should know about the ends of answers."""
    notes = []
    if found.next_turn_ends:
        ends = " or ".join(repr(end) for end in found.next_turn_ends)
        notes.append(
            f"The template ends an answer only with the beginning of what follows, {ends}. If a message follows, that "
            "token is trained as the answer's last one; the last answer of a conversation has none."
        )
    elif not found.end_of_turn:
        notes.append("The template writes nothing after an answer, so no end-of-turn token is trained.")
    elif tokenizer.controls.pattern.search(found.end_of_turn) is None:
        notes.append(
            f"The template ends answers with {found.end_of_turn!r}, which is plain text to this tokenizer, not a token "
            "of its own."
        )
    if found.end_of_turn and not found.history_end:
        notes.append(
            f"The template writes {found.end_of_turn!r} only after the last answer of a conversation: earlier answers "
            "end with their text."
        )
    return notes


def _choose_template(own: Any, wanted: str | None, tokenizer: str) -> tuple[str, str, list[str]]:
    """The name and the source of the template to use, and notes for the user."""
    if wanted is None:
        if isinstance(own, str):
            return f"of {Path(tokenizer).name}", own, []
        if isinstance(own, dict) and "default" in own:
            note = "The tokenizer has several chat templates; 'default' is used."
            return f"of {Path(tokenizer).name} (default)", own["default"], [note]
        return "chatml", built_in("chatml"), [f"{tokenizer} has no chat template: the built-in chatml is used."]
    if wanted in BUILT_IN:
        return wanted, built_in(wanted), []
    path = Path(wanted)
    if not path.is_file():
        raise UsageError(
            f"--chat-template {wanted}: {'is a folder' if path.is_dir() else 'no such file'}; "
            f"expected a Jinja file or a built-in template ({', '.join(BUILT_IN)})"
        )
    return path.name, read_template(path), []


def read_template(path: Path) -> str:
    """Read a Jinja file. Raises DataError if it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; expected a Jinja template as text") from error


def _check_vocabulary(tokenizer: Tokenizer, source: str, name: str) -> None:
    """Check that a built-in template's markers are tokens of the vocabulary. Raises DataError."""
    markers = ("<|im_start|>", "<|im_end|>")
    missing = [marker for marker in markers if marker in source and marker not in tokenizer.controls.tokens]
    if missing:
        raise DataError(
            f"{tokenizer.name}: the vocabulary lacks {' and '.join(missing)}, which the {name} template writes. "
            "Pass the template that belongs to this tokenizer with --chat-template FILE, or add the tokens: "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': {missing}}}), save it, and resize the model"
        )
