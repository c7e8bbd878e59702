"""One conversation with a model, which keeps its KV cache from turn to turn.

Under `ism` each context block goes through the model once, in a prefill with full attention over the past and itself;
each answer follows token by token. Under `causal` the prefill is causal. No token is fed twice. Under `prefix`
everything before an answer is bidirectional, so the cache cannot be kept and each turn feeds the whole conversation.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ismdata.errors import DataError, Refused, UsageError
from ismdata.generate.chat_file import canonical_conversation, read_conversation, write_conversation
from ismdata.generate.eviction import SINKS
from ismdata.generate.feeding import Block, Encoder, answer_lead, arrange_blocks, as_encoder
from ismdata.generate.kv_cache import KVCache
from ismdata.generate.model_facts import end_of_turn, glm_tokens, resolve_mask
from ismdata.generate.sampling import Sampling, can_show, make_sampler, message_text
from ismdata.generate.transcript import Transcript
from ismdata.generate.window import Window, context_size
from ismdata.rendering import Message, as_template_messages


class _TurnEnd(NamedTuple):
    """The number of entries in the cache after the first `messages` messages, the last of which is an answer."""

    messages: int
    entries: int


class _Room(NamedTuple):
    """The tokens `free` for an answer without its end of turn, those `needed` before it, and the `capacity`."""

    free: int
    needed: int
    capacity: int


class Session:
    """One conversation with a model.

    Example:
        >>> session = Session(model, tokenizer, system="Be brief.")  # doctest: +SKIP
        >>> for piece in session.ask("Hello!"):                      # doctest: +SKIP
        ...     print(piece, end="")
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Encoder | PreTrainedTokenizerBase,
        *,
        mask: str | None = None,
        system: str | None = None,
        tools: list[Any] | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        window: Window | None = None,
    ) -> None:
        """Begin an empty conversation.

        Args:
            model: An attached model (`attention.attach` or `attention.load`) in evaluation mode.
            tokenizer: A Hugging Face tokenizer with a chat template, or a `rendering.ConversationEncoder`.
            mask: The mask to run the model under; None for the one in its config.
            system: The system prompt.
            tools: Tool descriptions for the template, in OpenAI's form.
            max_new_tokens: Maximum number of tokens in an answer.
            sampling: How to choose tokens; by default the most likely one.
            window: The size of the context, and what happens when it is full.

        Raises:
            UsageError: If the call is wrong.
            DataError: If the template or the tokenizer cannot be used.
            UnsupportedModelError: If single tokens are to be evicted and the model's keys cannot be rotated.
        """
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
        self.model = model
        self.encoder = as_encoder(tokenizer)
        self.mask = resolve_mask(model, mask)
        self.system = system
        self.tools = tools
        self.max_new_tokens = max_new_tokens
        self.window = window or Window()
        self.context = context_size(model, self.window)
        if self.window.policy is not None:
            self._check_policy()
        self._cache = KVCache(
            model,
            mask=self.mask,
            size=self.context,
            policy=self.window.policy,
            decay=self.window.decay,
            seed=self.window.seed,
        )
        self._glm = glm_tokens(model, self.encoder, self.mask)
        #: The tokens that open an answer and are not generated: `[START]` in the GLM layout.
        self._opening = [] if self._glm is None else [self._glm.start_id]
        self._choose = make_sampler(sampling or Sampling(), model.device)
        self._end = end_of_turn(model, self.encoder)
        self._files: set[Path] = set()
        self._transcript = Transcript(messages=[])
        self._turn_ends: list[_TurnEnd] = []
        self._evictions = 0
        #: The text that the template writes at the beginning of an answer; None until it is needed.
        self._lead: str | None = None
        self.restart()

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, in the form that templates take."""
        return list(self._transcript.messages)

    @property
    def fed(self) -> list[int]:
        """The tokens of the entries in the cache, in order."""
        return self._cache.ids

    @property
    def left_out(self) -> int:
        """Number of messages after the system prompt that the model no longer sees (`drop-oldest`)."""
        return self._transcript.first - self._transcript.system_count

    def restart(self) -> None:
        """Begin a new conversation with the same system prompt and tools."""
        messages = [] if self.system is None else [_message("system", self.system)]
        self._transcript = Transcript(messages=messages, tools=self.tools)
        self._lead = None
        self._clear_cache()

    def reply(self, text: str, *, role: str = "user") -> str:
        """Return the model's answer to `text` as a whole. Arguments and errors are those of `ask`."""
        return "".join(self.ask(text, role=role))

    def ask(self, text: str, *, role: str = "user") -> Generator[str, None, None]:
        """Stream the model's answer to `text`.

        Closing the iterator early ends the answer there; the conversation continues from it. After an error the
        conversation is unchanged. If the error came from the model, the next turn feeds the conversation again.

        Args:
            text: The content of the message.
            role: `user`, or `tool` for the result of a tool.

        Yields:
            Pieces of the answer's text.

        Raises:
            UsageError: If the role is another one.
            DataError: If the turn does not fit into the context, or the template does not accept it.
        """
        if role not in ("user", "tool"):
            raise UsageError(f"role is {role!r}; expected user or tool. Use `give` for other messages")
        return self._answer(self._transcript.with_messages(_template_messages([_message(role, text)])))

    def give(self, messages: Sequence[Message]) -> None:
        """Add messages of any role to the conversation without answering: several tool results, or earlier turns.

        The next answer feeds them.

        Args:
            messages: The messages, in OpenAI's form.

        Raises:
            UsageError: If a message breaks the rules of `ismdata convert`.
        """
        self._transcript = self._transcript.with_messages(_template_messages(messages))

    def answer(self) -> Generator[str, None, None]:
        """Stream the model's answer to the messages that `give` or `load` added. Yields and raises as `ask` does.

        Raises:
            UsageError: If the conversation is empty or ends with an answer.
        """
        if not self.messages or self.messages[-1]["role"] == "assistant":
            raise UsageError("nothing to answer: expected a last message that is not the model's. Ask something first")
        return self._answer(self._transcript)

    def undo(self) -> list[Message]:
        """Remove the last question and its answer.

        The cache is cropped to its former length. If entries were evicted since, the next turn feeds the conversation
        again.

        Returns:
            The removed messages; [] if there is no question.
        """
        former, self._transcript = self._transcript, self._transcript.without_last_turn()
        left = len(self._transcript.messages)
        turn_ends = [each for each in self._turn_ends if each.messages <= left]
        if not turn_ends or self._transcript.first != former.first:
            self._clear_cache()
        else:
            self._turn_ends = turn_ends
            self._cache.crop(turn_ends[-1].entries)
        return former.messages[left:]

    def save(self, path: str | Path) -> None:
        """Write the conversation as one JSON line of `messages`, which `load` and `ismdata convert` read.

        Args:
            path: The file. It may exist only if this session wrote or loaded it.

        Raises:
            DataError: If it cannot be written, or `convert` would refuse the conversation (an empty answer).
            UsageError: If the file exists and this session neither wrote nor loaded it.
        """
        path = Path(path)
        if path.exists() and path.resolve() not in self._files:
            raise UsageError(f"{path}: exists, and this session did not write or load it; name another file")
        write_conversation(path, self.messages, self._transcript.tools)
        self._files.add(path.resolve())

    def load(self, path: str | Path) -> None:
        """Continue the conversation in a file, with its own system prompt and tools.

        Args:
            path: A file with one JSON line of `messages`.

        Raises:
            DataError: If the file holds no such line, the template does not accept the conversation, or, under `stop`,
                it does not fit into the context. The session is unchanged.
        """
        path = Path(path)
        messages, tools = read_conversation(path)
        transcript = Transcript(messages=messages, tools=tools)
        try:
            self._check_loadable(transcript)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self._transcript = transcript
        self._lead = None
        self._clear_cache()
        self._files.add(path.resolve())

    # ---- one turn ----

    def _answer(self, transcript: Transcript) -> Generator[str, None, None]:
        transcript, blocks, limit = self._plan(transcript)
        if self._lead is None:
            self._lead = answer_lead(self.encoder, transcript.messages, transcript.tools)
        answer: list[int] = []
        shown = ""
        try:
            logits = self._feed_blocks(transcript, blocks)
            while len(answer) < limit:
                token = self._choose(logits, self.fed)
                if self._end.is_stop(token):
                    break
                answer.append(token)
                logits = self._cache.append([token], is_answer=True)
                if self._end.is_complete(answer):
                    break
                text = self.encoder.decode(self._end.content(answer))
                if can_show(text, self._lead):
                    text = message_text(text, self._lead)
                    yield text[len(shown) :]
                    shown = text
            text = self._finish_answer(transcript, answer)
        except GeneratorExit:
            try:
                self._finish_answer(transcript, answer)
            except BaseException:
                self._clear_cache()
                raise
            raise
        except BaseException:
            self._clear_cache()
            raise
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _feed_blocks(self, transcript: Transcript, blocks: Sequence[Block]) -> Tensor:
        """Feed the blocks before the answer, and record where each answer in them ends. Returns the last logits."""
        if not self._reuses_cache or transcript.first != self._transcript.first:
            self._clear_cache()
        for block in blocks:
            opening = self._opening if block is blocks[-1] else ()
            logits = self._cache.append(block.ids, is_answer=block.is_answer, opening=opening)
            if block.is_answer and not (self._turn_ends and self._turn_ends[-1].messages == block.message + 1):
                self._end_turn(block.message + 1)
        return logits

    def _finish_answer(self, transcript: Transcript, answer: list[int]) -> str:
        """Feed the rest of the answer's end of turn, add the answer to the conversation, and return its text."""
        missing = self._end.missing(answer)
        if missing:
            self._cache.append(missing, is_answer=True)
        text = message_text(self.encoder.decode(self._end.content(answer)), self._lead or "")
        self._transcript = transcript.with_answer(text, answer + missing)
        self._end_turn(len(self.messages))
        return text

    def _end_turn(self, messages: int) -> None:
        """Record the length of the cache after an answer, the last of `messages` messages."""
        self._cache.end_turn()
        if self._cache.evictions != self._evictions:  # earlier lengths counted entries that were evicted since
            self._turn_ends, self._evictions = [], self._cache.evictions
        self._turn_ends.append(_TurnEnd(messages, len(self.fed)))

    def _clear_cache(self) -> None:
        """Clear the cache; the next answer feeds all that the model sees of the conversation."""
        self._cache.clear()
        self._evictions = self._cache.evictions
        self._turn_ends = []

    # ---- what to feed, and whether it fits ----

    @property
    def _reuses_cache(self) -> bool:
        """Whether the cache is kept from turn to turn: not under `prefix`, nor if history is rendered anew."""
        return self.mask != "prefix" and self.encoder.history == "append"

    def _plan(self, transcript: Transcript) -> tuple[Transcript, list[Block], int]:
        """The conversation to answer, the blocks to feed, and the maximum number of tokens in the answer.

        Drops the oldest turns under `drop-oldest`. Raises DataError if the conversation does not fit.
        """
        fed = self._turn_ends[-1].messages if self._turn_ends and self._reuses_cache else 0
        blocks = self._blocks(transcript, fed=fed)
        room = self._room(blocks, before=len(self.fed) if fed else 0)
        if self.window.when_full == "drop-oldest":
            wanted = min(self.max_new_tokens, room.capacity // 4)
            starts = [start for start in transcript.turn_starts if start > transcript.first]
            if room.free < wanted and starts:
                # Drop the fewest turns that leave room for two answers, so that not every turn drops some; or all but
                # the last.
                shorter = [replace(transcript, first=start) for start in starts]
                chosen = bisect_left(shorter, 2 * wanted, key=lambda each: self._room(self._blocks(each)).free)
                transcript = shorter[min(chosen, len(shorter) - 1)]
                blocks = self._blocks(transcript)
                room = self._room(blocks)
        self._check_room(room)
        return transcript, blocks, min(self.max_new_tokens, room.free)

    def _blocks(self, transcript: Transcript, *, fed: int = 0) -> list[Block]:
        """The blocks to feed before the next answer, after the first `fed` messages."""
        return arrange_blocks(transcript.blocks(self.encoder, fed=fed), self._glm, self.mask)

    def _room(self, blocks: Sequence[Block], *, before: int = 0) -> _Room:
        """The room for an answer after `before` entries and `blocks`."""
        if self.window.policy is None:
            needed = before + sum(len(block.ids) for block in blocks) + len(self._opening)
        else:  # all entries but the sinks and the last turn can be evicted
            needed = SINKS + max(len(block.ids) for block in blocks)
        capacity = sys.maxsize if self.context is None else self.context
        return _Room(capacity - needed - len(self._end.ids), needed, capacity)

    def _check_room(self, room: _Room) -> None:
        """Raise DataError if there is no room for a token of the answer."""
        if room.free >= 1:
            return
        holder = "the model" if self.window.context is None else "the cache"
        advice = "Say less, or start a new conversation with /new"
        if self.window.when_full == "stop":
            advice += "; --when-full drop-oldest drops the oldest turns"
        what = "the conversation" if self.window.policy is None else f"the turn and the first {SINKS} tokens"
        raise DataError(
            f"{what} would have {room.needed} tokens before the answer; {holder} has {room.capacity} positions, which "
            f"must hold the answer too. {advice}"
        )

    def _check_loadable(self, transcript: Transcript) -> None:
        """Raise DataError if the conversation has no question or, under `stop`, no room for an answer."""
        last = transcript.messages[-1]
        asked = replace(transcript, messages=transcript.messages[:-1]) if last["role"] == "assistant" else transcript
        if len(asked.messages) == asked.system_count:
            raise DataError("the conversation has no question; expected a message of the user")
        room = self._room(self._blocks(asked))
        if self.window.when_full == "stop":
            self._check_room(room)

    def _check_policy(self) -> None:
        """Raise UsageError if single tokens cannot be evicted."""
        option = f"--when-full {self.window.when_full}"
        if not self._reuses_cache:
            raise UsageError(
                f"{option} needs a cache that is kept from turn to turn; mask {self.mask} with history "
                f"{self.encoder.history} keeps none. Use stop or drop-oldest"
            )
        if self.context is None or self.context <= 2 * SINKS:
            raise UsageError(f"{option}: the context is {self.context}; expected --context N with N above {2 * SINKS}")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _template_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages in the form that templates take. Raises UsageError if they break the rules of `ismdata convert`."""
    try:
        return as_template_messages(canonical_conversation({"messages": [dict(message) for message in messages]}))[0]
    except Refused as refusal:
        raise UsageError(refusal.detail) from refusal
