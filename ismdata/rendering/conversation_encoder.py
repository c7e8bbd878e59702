"""The tokens that a chat feeds to a model: the same that `pack` writes for the conversation."""

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
    """Encodes a conversation turn by turn.

    Args:
        encoding: The tokenizer with its chat template.

    >>> encoder = ConversationEncoder.load("model")  # doctest: +SKIP
    >>> encoder.next_context([{"role": "user", "content": "Hello!"}])  # doctest: +SKIP
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    @classmethod
    def load(cls, folder: str | Path) -> ConversationEncoder:
        """Load what `Encoding.save` wrote into a model's folder.

        Args:
            folder: The folder.

        Returns:
            The encoder.

        Raises:
            DataError: If the folder was not written by `ismdata train`.
        """
        path = Path(folder) / SETTINGS_NAME
        if not path.is_file():
            exists = Path(folder).exists()
            found = f"no {SETTINGS_NAME}" if Path(folder).is_dir() else "a file" if exists else "nothing"
            raise DataError(f"{folder}: found {found}; expected the folder of a model that `ismdata train` wrote")
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
        """The tokens of the GLM layout; None in the plain layout.

        What the methods here return is without them: `glm_tokens.insert_glm_tokens_in_blocks` inserts them.
        """
        return self.encoding.glm

    @property
    def history(self) -> History:
        """How earlier turns are fed: `append` keeps what was fed, `expand` renders everything again."""
        return self.encoding.history

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens to feed before the model answers, if everything up to the last answer's end of turn has been fed.

        Args:
            messages: The conversation so far.
            tools: The tools described to the template.

        Returns:
            Token ids.

        Raises:
            CannotRender: If the template refuses or rewrites the conversation.
        """
        return self._next(messages, tools)[1]

    def turn_end(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens that end the last answer and are known only once other messages follow it.

        Templates with `TemplateProfile.next_turn_ends` have some; all others none. Raises CannotRender.
        """
        return self._next(messages, tools)[0] if self.next_turn_end_ids else []

    def _next(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[int], list[int]]:
        """`turn_end` and `next_context`."""
        renderer, controls = self.encoding.renderer, self.encoding.tokenizer.controls
        (escaped, escaped_tools), escapes = controls.escape([list(messages), tools])
        end, next_turn_end, context = renderer.next_context(escaped, escaped_tools)
        first = not any(message["role"] == "assistant" for message in messages)
        ending = controls.cut(end)
        last = ending[-1] if ending and isinstance(ending[-1], AddedToken) else None
        ids = self._ids([Chunk(text=context, kind=QUERY)], escapes, preceding=last, opening=first)[0]
        return self._ids([Chunk(text=next_turn_end, kind=ANSWER)], escapes, opening=False)[0], ids

    def blocks(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[tuple[bool, list[int]]]:
        """Encode the whole conversation as `expand` renders it, up to where the model answers.

        Args:
            messages: The conversation so far.
            tools: The tools described to the template.

        Returns:
            (is an answer, token ids) in order.

        Raises:
            CannotRender: If the template refuses or rewrites the conversation.
        """
        renderer, controls = self.encoding.renderer, self.encoding.tokenizer.controls
        (escaped, escaped_tools), escapes = controls.escape([list(messages), tools])
        chunks = renderer.expand([*escaped, {"role": "assistant", "content": ANY_ANSWER}], escaped_tools)
        newest = next(k for k, chunk in enumerate(chunks) if chunk.message == len(messages))
        joined: list[Chunk] = []
        for chunk in chunks[:newest]:  # to a mask, prompt and query are one context
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
        """The tokens that end an answer; none if the template writes none."""
        tokenizer = self.encoding.tokenizer
        ids: list[int] = []
        for cut in tokenizer.controls.cut(self.encoding.renderer.profile.end_of_turn):
            ids += [cut.id] if isinstance(cut, AddedToken) else tokenizer.encode([cut])[0]
        return ids

    @property
    def next_turn_end_ids(self) -> frozenset[int]:
        """The tokens that the model writes to end an answer, but the template only once another message follows
        (`TemplateProfile.next_turn_ends`).
        """
        controls = self.encoding.tokenizer.controls
        cuts = [cut for end in self.encoding.renderer.profile.next_turn_ends for cut in controls.cut(end)[-1:]]
        return frozenset(cut.id for cut in cuts if isinstance(cut, AddedToken))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return self.encoding.tokenizer.decode(ids)
