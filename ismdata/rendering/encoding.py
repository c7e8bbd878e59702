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

from ismdata.errors import DataError, UsageError
from ismdata.masks.intervals import ANSWER, QUERY
from ismdata.rendering.chat_template import BUILT_IN, DEFAULT_DATE, ChatTemplate, Message, built_in
from ismdata.rendering.control_tokens import AddedToken, Escapes
from ismdata.rendering.glm_tokens import GlmTokens, choose_tokens
from ismdata.rendering.renderer import ANY_ANSWER, Chunk, Renderer
from ismdata.rendering.sensitivity import Sensitivity, sensitivity
from ismdata.rendering.skeleton import History, Piece, compile_chunks, render_document
from ismdata.rendering.template_probe import profile
from ismdata.rendering.tokenizer import Tokenizer, load_pretrained

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


def set_up(
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
    return probe(
        load_pretrained(tokenizer),
        name=tokenizer,
        chat_template=chat_template,
        history=history,
        arguments=arguments,
        date=date,
    )


def probe(
    pretrained: PreTrainedTokenizerFast,
    *,
    name: str,
    chat_template: str | None = None,
    history: History = "append",
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date = DEFAULT_DATE,
) -> Encoding:
    """As `set_up`, with a tokenizer that is loaded already; `name` is what errors call it."""
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
    renderer = Renderer(template=template, profile=found, controls=loaded.controls, markers=loaded.markers)
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


def marked_pieces(pieces: Sequence[Piece], glm: GlmTokens) -> tuple[Piece, ...]:
    """The pieces of a document, all of them known tokens, with `[MASK]` and `[START]` put in: the plain version of
    `glm_layout.insert_markers`, with which a sample of every batch is compared.
    """
    answers = list(dict.fromkeys(piece.span for piece in pieces if piece.kind == ANSWER and piece.ids))
    chosen = answers if glm.every_answer else answers[-1:]
    marked: list[Piece] = []
    for piece in pieces:
        if piece.span in chosen and not any(other.span == 4 * piece.span for other in marked):
            before = marked[-1] if marked else None
            joins = before is not None and before.kind == QUERY and before.message < 0
            span = before.span if before is not None and joins else 4 * piece.span - 2
            marked.append(Piece(span=span, kind=QUERY, message=-1, ids=(glm.mask_id,), controls=1))
            marked.append(Piece(span=4 * piece.span - 1, kind=ANSWER, message=-1, ids=(glm.start_id,), controls=1))
        history = not glm.every_answer and piece.kind == ANSWER and piece.span not in chosen
        kind = QUERY if history else piece.kind
        marked.append(replace(piece, span=4 * piece.span, kind=kind))
    return tuple(marked)


class ConversationEncoder:
    """What chat feeds a model, turn by turn: the tokens that `pack` would have written.

    >>> ConversationEncoder.load("model")  # doctest: +SKIP
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    @classmethod
    def load(cls, folder: str | Path) -> ConversationEncoder:
        """Read what `Encoding.save` wrote. Raises DataError when the folder holds no such thing."""
        path = Path(folder) / SETTINGS_NAME
        if not path.is_file():
            exists = Path(folder).exists()
            found = f"no {SETTINGS_NAME}" if Path(folder).is_dir() else "a file" if exists else "nothing"
            raise DataError(f"{folder}: found {found}; expected a model's folder, which `ismdata train` writes")
        settings = json.loads(path.read_text(encoding="utf-8"))
        encoding = set_up(
            str(folder),
            history=settings["history"],
            arguments=settings["arguments"],
            date=datetime.date.fromisoformat(settings["date"]),
        )
        return cls(replace(encoding, glm=GlmTokens(**settings["glm"])) if "glm" in settings else encoding)

    @property
    def glm(self) -> GlmTokens | None:
        """In the GLM layout, the tokens to put before answers. What the methods here give is without them:
        `glm_layout.marked` puts them into blocks to feed, and `glm_layout.block_positions` says where tokens stand.
        """
        return self.encoding.glm

    @property
    def history(self) -> History:
        """How earlier turns are fed: `append` keeps what was fed, `expand` renders the conversation anew each turn."""
        return self.encoding.history

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokens to feed before the model answers `messages`, all through the last answer's end of turn having been
        fed.

        Raises CannotRender, ValueError (text that cannot be escaped).
        """
        return self._next(messages, tools)[1]

    def turn_end(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokens that belong to the last answer and end it, but are known only now that other messages follow.

        Empty for all templates but those of `TemplateProfile.next_turn_ends`. Raises as `next_context`.
        """
        return self._next(messages, tools)[0] if self.next_turn_end_ids else []

    def _next(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[int], list[int]]:
        """`turn_end` and `next_context`."""
        renderer, controls = self.encoding.renderer, self.encoding.tokenizer.controls
        (escaped, escaped_tools), escapes = controls.escape([list(messages), tools])
        end, brought, context = renderer.next_context(escaped, escaped_tools)
        first = not any(message["role"] == "assistant" for message in messages)
        ending = controls.cut(end)
        last = ending[-1] if ending and isinstance(ending[-1], AddedToken) else None
        ids = self._ids([Chunk(text=context, kind=QUERY)], escapes, preceding=last, opening=first)[0]
        return self._ids([Chunk(text=brought, kind=ANSWER)], escapes, opening=False)[0], ids

    def blocks(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[tuple[bool, list[int]]]:
        """The whole conversation as `expand` renders it, up to where the model answers: (is an answer, tokens) in
        order.
        """
        renderer, controls = self.encoding.renderer, self.encoding.tokenizer.controls
        (escaped, escaped_tools), escapes = controls.escape([list(messages), tools])
        chunks = renderer.expand([*escaped, {"role": "assistant", "content": ANY_ANSWER}], escaped_tools)
        newest = next(k for k, chunk in enumerate(chunks) if chunk.message == len(messages))
        joined: list[Chunk] = []
        for chunk in chunks[:newest]:  # prompt and query are one context to a mask
            if joined and joined[-1].message < 0 and chunk.message < 0:
                joined[-1] = Chunk(text=joined[-1].text + chunk.text, kind=QUERY)
            else:
                joined.append(chunk)
        return list(zip((chunk.message >= 0 for chunk in joined), self._ids(joined, escapes), strict=True))

    def _ids(
        self, chunks: list[Chunk], escapes: Escapes, *, preceding: AddedToken | None = None, opening: bool = True
    ) -> list[list[int]]:
        """The tokens of each chunk."""
        pieces = compile_chunks(
            chunks,
            self.encoding.tokenizer,
            lambda text: (escapes.undo(text),),
            preceding=preceding,
            opening=opening,
        )
        return [[id for piece in pieces if piece.span == span for id in piece.ids or ()] for span in range(len(chunks))]

    @property
    def end_of_turn_ids(self) -> list[int]:
        """The tokens that end an answer; empty where the template writes none."""
        tokenizer = self.encoding.tokenizer
        ids: list[int] = []
        for cut in tokenizer.controls.cut(self.encoding.renderer.profile.end_of_turn):
            ids += [cut.id] if isinstance(cut, AddedToken) else tokenizer.encode([cut])[0]
        return ids

    @property
    def next_turn_end_ids(self) -> frozenset[int]:
        """The tokens of which one ends an answer as soon as another message follows, `TemplateProfile.next_turn_ends`:
        the model writes it, the template only then.
        """
        controls = self.encoding.tokenizer.controls
        cuts = [cut for end in self.encoding.renderer.profile.next_turn_ends for cut in controls.cut(end)[-1:]]
        return frozenset(cut.id for cut in cuts if isinstance(cut, AddedToken))

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.tokenizer.decode(ids)
