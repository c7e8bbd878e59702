"""Conversations to the blocks of tokens that a model is fed, as pack cuts them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ismdata.choices import History
from ismdata.errors import DataError
from ismdata.masks import ANSWER, QUERY
from ismdata.rendering.chat_template import Message
from ismdata.rendering.control_tokens import AddedToken, Escapes
from ismdata.rendering.encoding import SETTINGS_NAME, Encoding, load_encoding
from ismdata.rendering.glm_tokens import GlmTokens
from ismdata.rendering.pieces import compile_chunks
from ismdata.rendering.renderer import Chunk
from ismdata.rendering.tracing import ANY_ANSWER


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
        encoding = load_encoding(
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

        Raises CannotRender.
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
