"""One conversation with a model, whose KV cache lives as long as the conversation does (law 3).

Under `ism` each context block goes through the model once, in full attention over the past and itself, and each answer
token by token; under `causal` the same with a causal prefill. Nothing that was fed is ever fed again. Under `prefix`
all before an answer is bidirectional, so no cache survives a turn and the whole conversation is fed anew.

>>> session = Session(model, tokenizer, system="Be brief.")  # doctest: +SKIP
>>> for piece in session.ask("Hello!"):                      # doctest: +SKIP
...     print(piece, end="")
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ismdata.choices import WhenFull, check_choice
from ismdata.errors import DataError, Refused, UsageError
from ismdata.generate.chat_file import check_record, read_line, write_line
from ismdata.generate.eviction import SINKS
from ismdata.generate.feeding import Block, Encoder, answer_lead, as_encoder, with_markers
from ismdata.generate.kv_cache import KVCache
from ismdata.generate.model_facts import checked_mask, end_of_turn, glm_tokens, positions_of
from ismdata.generate.sampling import Sampling, can_show, chooser, message_text
from ismdata.generate.transcript import Transcript
from ismdata.rendering import Message, as_template_messages

#: What `sirllm` multiplies entropies by after each turn.
DECAY = 0.9


@dataclass(frozen=True, kw_only=True)
class Window:
    """How many tokens the model may have before it, and what happens when they are more.

    context: the most entries of the cache; None for all of the model's positions. when_full:

    - `stop`: a clear error; the session stays as it was
    - `drop-oldest`: the oldest turns leave, whole; the system prompt stays, and what is left is fed anew
    - `sirllm`: single tokens leave, those of the lowest entropy, but neither the first 4 nor the last turn
    - `streaming`, `random`, `interval`: what SirLLM is compared with (eviction.py)

    decay: what `sirllm` multiplies entropies by after each turn. seed: of `random`. Raises UsageError.
    """

    when_full: WhenFull = "stop"
    context: int | None = None
    decay: float = DECAY
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("--when-full", self.when_full, WhenFull)
        if self.context is not None and self.context < 1:
            raise UsageError(f"--context is {self.context}; expected 1 token or more")
        if not 0 <= self.decay <= 1:
            raise UsageError(f"decay is {self.decay}; expected 0 to 1")

    @property
    def policy(self) -> str | None:
        """Who stays when single tokens leave; None where none do."""
        return None if self.when_full in ("stop", "drop-oldest") else self.when_full


class _Mark(NamedTuple):
    """After the first `messages` messages, the last of which is an answer, the cache held `tokens` tokens."""

    messages: int
    tokens: int


class _Room(NamedTuple):
    """`tokens` are left for an answer, its end of turn not counted, when `needed` of `of` are taken."""

    tokens: int
    needed: int
    of: int


class Session:
    """One conversation with a model.

    model: attached (`attention.attach` or `attention.load`) and in evaluation mode. tokenizer: a tokenizer of
    transformers with a chat template, or an `encoder.ConversationEncoder`. mask: by default the one in the model's
    config. tools: descriptions for the template, as OpenAI has them. Raises UsageError, DataError, and
    UnsupportedModelError where tokens are to leave a cache whose keys cannot be turned.
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
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
        self.model = model
        self.encoder = as_encoder(tokenizer)
        self.mask = checked_mask(model, mask)
        self.system = system
        self.tools = tools
        self.max_new_tokens = max_new_tokens
        self.window = window or Window()
        self.context = _context(model, self.window)
        if self.window.policy is not None:
            self._check_policy()
        self._held = KVCache(
            model,
            mask=self.mask,
            size=self.context,
            policy=self.window.policy,
            decay=self.window.decay,
            seed=self.window.seed,
        )
        self._glm = glm_tokens(model, self.encoder, self.mask)
        #: What opens an answer without being written by the model: `[START]` in the GLM layout.
        self._opening = [] if self._glm is None else [self._glm.start_id]
        self._choose = chooser(sampling or Sampling(), model.device)
        self._end = end_of_turn(model, self.encoder)
        self._files: set[Path] = set()
        self._talk = Transcript(messages=[])
        self._marks: list[_Mark] = []
        self._evictions = 0
        #: What the template writes at the beginning of an answer; None until it is asked for.
        self._lead: str | None = None
        self.restart()

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as templates take it."""
        return list(self._talk.messages)

    @property
    def fed(self) -> list[int]:
        """The tokens behind the cache, in order; each has been through the model."""
        return self._held.ids

    @property
    def left_out(self) -> int:
        """How many messages behind the system prompt the model no longer sees (`drop-oldest`)."""
        return self._talk.first - self._talk.head

    def restart(self) -> None:
        """Forget the conversation; the system text and the tools stay."""
        messages = [] if self.system is None else [_message("system", self.system)]
        self._talk = Transcript(messages=messages, tools=self.tools)
        self._lead = None
        self._forget()

    def reply(self, text: str, *, role: str = "user") -> str:
        """The model's answer to `text`, whole. Errors as for `ask`."""
        return "".join(self.ask(text, role=role))

    def ask(self, text: str, *, role: str = "user") -> Generator[str, None, None]:
        """The model's answer to `text` as it comes, in pieces of text. role: `user`, or `tool` for a tool's result.

        An iterator that is closed early ends the answer there, and the conversation goes on from it. Raises DataError,
        with the conversation as it was, when this turn does not fit or the template does not take it. After any other
        error the conversation is as it was too; what was fed is fed anew at the next turn.
        """
        if role not in ("user", "tool"):
            raise UsageError(f"role is {role!r}; expected user or tool. `give` enters other messages")
        return self._answer(self._talk.with_messages(_checked([_message(role, text)])))

    def give(self, messages: Sequence[Message]) -> None:
        """Enter messages of any role into the conversation without an answer, as OpenAI has them: several results of
        tools, or turns that did not happen here. They are fed with the next answer. Raises UsageError.
        """
        self._talk = self._talk.with_messages(_checked(messages))

    def answer(self) -> Generator[str, None, None]:
        """The model's answer to what was given or loaded. Errors as for `ask`; UsageError with nothing to answer."""
        if not self.messages or self.messages[-1]["role"] == "assistant":
            raise UsageError("nothing to answer: the last message is the model's own. Ask something")
        return self._answer(self._talk)

    def undo(self) -> list[Message]:
        """Take back the last question and its answer, and return them; [] when there is none.

        The cache is cropped to what it held before. Where that cannot be, since tokens left it, the conversation is fed
        anew at the next turn.
        """
        former, self._talk = self._talk, self._talk.undone()
        left = len(self._talk.messages)
        marks = [mark for mark in self._marks if mark.messages <= left]
        if not marks or self._talk.first != former.first:
            self._forget()
        else:
            self._marks = marks
            self._held.crop(marks[-1].tokens)
        return former.messages[left:]

    def save(self, path: str | Path) -> None:
        """Write the conversation to `path` as one line of `messages`, which `load` and `ismdata convert` read.

        Raises DataError when it cannot be written or `convert` would refuse it (an empty answer), UsageError when the
        file is there already and not of this session.
        """
        path = Path(path)
        if path.exists() and path.resolve() not in self._files:
            raise UsageError(f"{path}: exists and is not of this session; name another file")
        write_line(path, self.messages, self._talk.tools)
        self._files.add(path.resolve())

    def load(self, path: str | Path) -> None:
        """Go on with the conversation in `path`, one JSON line of `messages`, with its own system prompt and tools.

        Raises DataError, with the session as it was, where the file holds no such thing, the template does not take it,
        or it is longer than the context under `stop`.
        """
        path = Path(path)
        messages, tools = read_line(path)
        talk = Transcript(messages=messages, tools=tools)
        try:
            self._check_loadable(talk)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        self._talk = talk
        self._lead = None
        self._forget()
        self._files.add(path.resolve())

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _answer(self, talk: Transcript) -> Generator[str, None, None]:
        talk, blocks, limit = self._plan(talk)
        if self._lead is None:
            self._lead = answer_lead(self.encoder, talk.messages, talk.tools)
        answer: list[int] = []
        shown = ""
        try:
            logits = self._feed_blocks(talk, blocks)
            while len(answer) < limit:
                token = self._choose(logits, self.fed)
                if self._end.stops(token):
                    break
                answer.append(token)
                logits = self._held.feed([token], is_answer=True)
                if self._end.complete(answer):
                    break
                text = self.encoder.decode(self._end.content(answer))
                if can_show(text, self._lead):
                    text = message_text(text, self._lead)
                    yield text[len(shown) :]
                    shown = text
            text = self._finish(talk, answer)
        except GeneratorExit:
            self._finish(talk, answer)
            raise
        except BaseException:
            self._forget()
            raise
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _feed_blocks(self, talk: Transcript, blocks: Sequence[Block]) -> Tensor:
        """Feed what comes before this turn's answer, noting where each answer in it ends; the last token's logits."""
        if not self._keeps_cache or talk.first != self._talk.first:
            self._forget()
        for block in blocks:
            opening = self._opening if block is blocks[-1] else ()
            logits = self._held.feed(block.ids, is_answer=block.is_answer, opening=opening)
            if block.is_answer and not (self._marks and self._marks[-1].messages == block.message + 1):
                self._mark(block.message + 1)
        return logits

    def _finish(self, talk: Transcript, answer: list[int]) -> str:
        """Feed what the answer lacks of its end of turn, enter it into the conversation, and return its text."""
        missing = self._end.missing(answer)
        if missing:
            self._held.feed(missing, is_answer=True)
        text = message_text(self.encoder.decode(self._end.content(answer)), self._lead or "")
        self._talk = talk.with_answer(text, answer + missing)
        self._mark(len(self.messages))
        return text

    def _mark(self, messages: int) -> None:
        """A turn is over: the cache holds all through an answer, the last of so many messages."""
        self._held.end_turn()
        if self._held.evictions != self._evictions:  # earlier marks count tokens that are no longer where they were
            self._marks, self._evictions = [], self._held.evictions
        self._marks.append(_Mark(messages, len(self.fed)))

    def _forget(self) -> None:
        """The cache is of no use: all that the model sees of the conversation is fed anew with the next answer."""
        self._held.forget()
        self._evictions = self._held.evictions
        self._marks = []

    # -- what to feed, and whether it fits ----------------------------------------------------------------------------

    @property
    def _keeps_cache(self) -> bool:
        """Whether what was fed in earlier turns survives: not under `prefix`, nor where history is rendered anew."""
        return self.mask != "prefix" and self.encoder.history == "append"

    def _plan(self, talk: Transcript) -> tuple[Transcript, list[Block], int]:
        """The conversation to answer, what to feed before that, and how many tokens the answer may have.

        Oldest turns are left out of it under `drop-oldest`. Raises DataError.
        """
        fed = self._marks[-1].messages if self._marks and self._keeps_cache else 0
        blocks = self._blocks(talk, fed=fed)
        room = self._room(blocks, before=len(self.fed) if fed else 0)
        if self.window.when_full == "drop-oldest":
            wanted = min(self.max_new_tokens, room.of // 4)
            starts = [start for start in talk.turns if start > talk.first]
            if room.tokens < wanted and starts:
                # The fewest turns that leave room for two answers, so that not every turn drops; or all but the last.
                shorter = [replace(talk, first=start) for start in starts]
                chosen = bisect_left(shorter, 2 * wanted, key=lambda one: self._room(self._blocks(one)).tokens)
                talk = shorter[min(chosen, len(shorter) - 1)]
                blocks = self._blocks(talk)
                room = self._room(blocks)
        return talk, blocks, min(self.max_new_tokens, self._checked_room(room))

    def _blocks(self, talk: Transcript, *, fed: int = 0) -> list[Block]:
        blocks = talk.blocks(self.encoder, fed=fed)
        if self._glm is not None:
            blocks = with_markers(blocks, self._glm)
        if self.mask == "prefix":  # all before this turn's answer sees all of it
            return [Block([id for block in blocks for id in block.ids])]
        return blocks

    def _room(self, blocks: Sequence[Block], *, before: int = 0) -> _Room:
        """The room for an answer behind `before` tokens and `blocks`."""
        if self.window.policy is None:
            needed = before + sum(len(block.ids) for block in blocks) + len(self._opening)
        else:  # the last turn stays, all else but the sinks may leave
            needed = SINKS + max(len(block.ids) for block in blocks)
        of = sys.maxsize if self.context is None else self.context
        return _Room(of - needed - len(self._end.ids), needed, of)

    def _checked_room(self, room: _Room) -> int:
        """The tokens that an answer may have. Raises DataError where it may have none."""
        if room.tokens >= 1:
            return room.tokens
        holds = "the model has" if self.window.context is None else "the cache holds"
        advice = "Say less, or start a new conversation with /new"
        if self.window.when_full == "stop":
            advice += "; with --when-full drop-oldest the oldest turns leave"
        what = "the conversation" if self.window.policy is None else f"a turn and the first {SINKS} tokens"
        raise DataError(
            f"{what} would have {room.needed} tokens; {holds} {room.of} positions, with the answer. {advice}"
        )

    def _check_loadable(self, talk: Transcript) -> None:
        """Raise DataError unless the conversation can be gone on with."""
        asked = replace(talk, messages=talk.messages[:-1]) if talk.messages[-1]["role"] == "assistant" else talk
        if len(asked.messages) == asked.head:
            raise DataError("the conversation has no question; expected a message of the user")
        room = self._room(self._blocks(asked))
        if self.window.when_full == "stop":
            self._checked_room(room)

    def _check_policy(self) -> None:
        """Raise UsageError where single tokens cannot leave."""
        what = f"--when-full {self.window.when_full}"
        if not self._keeps_cache:
            raise UsageError(
                f"{what}: single tokens leave a cache that lives from turn to turn; the mask {self.mask} with history "
                f"{self.encoder.history} keeps none. Use stop or drop-oldest"
            )
        if self.context is None or self.context <= 2 * SINKS:
            raise UsageError(f"{what}: the context is {self.context}; expected --context N, more than {2 * SINKS}")


def _context(model: PreTrainedModel, window: Window) -> int | None:
    positions = positions_of(model)
    if window.context is None:
        return positions
    if positions is not None and window.context > positions:
        raise UsageError(f"--context is {window.context}; the model has {positions} positions, expected at most those")
    return window.context


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates take them, by the rules of `convert`. Raises UsageError."""
    try:
        return as_template_messages(check_record({"messages": [dict(message) for message in messages]}))[0]
    except Refused as refusal:
        raise UsageError(refusal.detail) from refusal
