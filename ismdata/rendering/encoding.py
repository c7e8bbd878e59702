"""A tokenizer with its chat template, ready to use: set up, checked, saved with the shards, and read again for chat.

`Encoding` is what `pack` and `chat` share, so that a model is fed in a conversation exactly what it was trained on.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ismdata.choices import History
from ismdata.errors import DataError, UsageError
from ismdata.rendering.chat_template import BUILT_IN, DEFAULT_DATE, ChatTemplate, Message, built_in
from ismdata.rendering.glm_tokens import GlmTokens, choose_tokens
from ismdata.rendering.pieces import Piece, render_document
from ismdata.rendering.renderer import Renderer
from ismdata.rendering.sensitivity import Sensitivity, sensitivity
from ismdata.rendering.template_probe import profile
from ismdata.rendering.tokenizer import Tokenizer, load_pretrained
from ismdata.rendering.tracing import Tracer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Beside a saved tokenizer: how its template was rendered.
SETTINGS_NAME = "ismdata_template.json"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A tokenizer, its probed template and the way with history. `notes` are what a user should be told once.

    glm: in the GLM layout, the tokens put before answers.
    """

    tokenizer: Tokenizer
    renderer: Renderer
    history: History
    sensitivity: Sensitivity
    notes: tuple[str, ...]
    glm: GlmTokens | None = None

    def with_glm(self, *, mask_token: str | None, start_token: str | None, every_answer: bool) -> Encoding:
        """The same in the GLM layout, with these control tokens or those the tokenizer has for it. Raises
        UsageError.
        """
        taken = (self.tokenizer.unknown_id, self.tokenizer.pad_id, self.tokenizer.eos_id)
        controls = {text: token for text, token in self.tokenizer.controls.tokens.items() if token.id not in taken}
        glm = choose_tokens(
            controls,
            self.tokenizer.name,
            mask_token=mask_token,
            start_token=start_token,
            every_answer=every_answer,
        )
        return replace(self, glm=glm)

    def document(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[Piece, ...]:
        """One conversation rendered by itself: the reference for what `pack` writes, in the GLM layout before
        `marked_pieces`.
        """
        return render_document(self.renderer, self.tokenizer, messages, tools, self.history)

    def save(self, folder: Path) -> None:
        """Write the tokenizer with its template, and how the template was rendered, into `folder`."""
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


def load_encoding(
    tokenizer: str,
    *,
    chat_template: str | None = None,
    history: History = "append",
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date = DEFAULT_DATE,
) -> Encoding:
    """Load a tokenizer, choose and probe its template.

    tokenizer: a local folder, a GGUF file or a hub name. chat_template: a file, or the name of a built-in template;
    without it the tokenizer's own, or ChatML where it has none. Raises DataError, UsageError.
    """
    return probe_encoding(
        load_pretrained(tokenizer),
        name=tokenizer,
        chat_template=chat_template,
        history=history,
        arguments=arguments,
        date=date,
    )


def probe_encoding(
    pretrained: PreTrainedTokenizerFast,
    *,
    name: str,
    chat_template: str | None = None,
    history: History = "append",
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date = DEFAULT_DATE,
) -> Encoding:
    """As `load_encoding`, with a tokenizer that is loaded already; `name` is what errors call it."""
    notes: list[str] = []
    template_name, source = _choose_template(pretrained.chat_template, chat_template, name, notes)
    loaded = Tokenizer(pretrained, name=name, template=source)
    template = ChatTemplate(
        name=template_name,
        source=source,
        special_tokens=loaded.special_tokens,
        arguments=dict(arguments or {}),
        date=date,
    )
    if "strftime_now(" in template.dated_source.replace("strftime_now is", ""):
        raise DataError(
            f"chat template {template_name}: calls strftime_now with a format that is not a plain string, "
            "so its date cannot be fixed. Replace that call in a copy and pass it with --chat-template FILE"
        )
    if template_name in BUILT_IN:
        _check_vocabulary(loaded, source, template_name)
    template, found = profile(template, loaded.markers)
    renderer = Renderer(tracer=Tracer(template), profile=found, controls=loaded.controls, markers=loaded.markers)
    if template.prints_date:
        notes.append(f"The template prints a date: fixed at {date.isoformat()} (--template-date).")
    if not found.prefix_stable and found.difference is not None:
        fed, rewritten = found.difference
        way = "append: what was fed stays as it was" if history == "append" else "expand: one document an answer"
        notes.append(
            f"The template rewrites history: after {fed[:60]!r} was fed, it renders {rewritten[:60]!r}. "
            f"History goes by --history {way}."
        )
    sensitive = sensitivity(renderer, prepends=loaded.prepends)
    if sensitive.everything:
        notes.append("The template acts on what messages say, so each conversation is rendered by itself: slower.")
    if found.next_turn_ends:
        ends = " or ".join(repr(end) for end in found.next_turn_ends)
        notes.append(
            f"The template ends an answer with nothing but what follows it, {ends}. Where a message follows, that "
            "token is trained as the answer's last; the last answer of a conversation has none."
        )
    elif not found.end_of_turn:
        notes.append(
            "The template writes nothing after an answer, so answers have no end-of-turn token to be trained on."
        )
    elif loaded.controls.pattern.search(found.end_of_turn) is None:
        notes.append(
            f"The template ends answers with {found.end_of_turn!r}, which is plain text to this tokenizer "
            "and no token of its own."
        )
    if found.end_of_turn and not found.history_end:
        notes.append(
            f"The template writes {found.end_of_turn!r} behind the last answer of a conversation alone: earlier "
            "answers end with their text."
        )
    return Encoding(
        tokenizer=loaded,
        renderer=renderer,
        history=history,
        sensitivity=sensitive,
        notes=tuple(notes),
    )


def _choose_template(own: Any, wanted: str | None, tokenizer: str, notes: list[str]) -> tuple[str, str]:
    """Name and source of the template to use."""
    if wanted is None:
        if isinstance(own, str):
            return f"of {Path(tokenizer).name}", own
        if isinstance(own, dict) and "default" in own:
            notes.append("The tokenizer has several chat templates; 'default' is used.")
            return f"of {Path(tokenizer).name} (default)", own["default"]
        notes.append(f"{tokenizer} has no chat template: the built-in chatml is used.")
        return "chatml", built_in("chatml")
    if wanted in BUILT_IN:
        return wanted, built_in(wanted)
    path = Path(wanted)
    if not path.is_file():
        raise UsageError(
            f"--chat-template {wanted}: {'is a folder' if path.is_dir() else 'no such file'}; "
            f"expected a Jinja file or a built-in template ({', '.join(BUILT_IN)})"
        )
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{wanted}: not UTF-8 at byte {error.start}; expected a Jinja template as text") from error


def _check_vocabulary(tokenizer: Tokenizer, source: str, name: str) -> None:
    """A built-in template's markers must be tokens of the vocabulary. Raises DataError with what to do."""
    markers = ("<|im_start|>", "<|im_end|>")
    missing = [marker for marker in markers if marker in source and marker not in tokenizer.controls.tokens]
    if missing:
        raise DataError(
            f"{tokenizer.name}: the vocabulary lacks {' and '.join(missing)}, which the {name} template writes. "
            "Pass the template that this tokenizer was made for with --chat-template FILE, or add the tokens: "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': {missing}}}), save it, and resize the model"
        )
