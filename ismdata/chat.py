"""Talk with a model that `ismdata train` saved, the KV cache kept across turns (law 3).

Under `ism` each context block goes through the model once, in full attention over the past and itself, and each answer
token by token; under `causal` the same with a causal prefill. Nothing that was fed is ever fed again. Under `prefix`
all before an answer is bidirectional, so no cache survives a turn and the whole conversation is fed anew.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any, Protocol, cast

import torch
from torch import FloatTensor, LongTensor, Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

from ismdata import attention
from ismdata.encoder import ConversationEncoder
from ismdata.errors import DataError, UsageError

#: What a byte-level decoder prints for a character that is not complete yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Encoder(Protocol):
    """What chat needs of `encoder.ConversationEncoder`."""

    @property
    def end_of_turn_ids(self) -> list[int]:
        """The tokens that together end an answer; empty where the template writes none."""

    @property
    def history(self) -> str:
        """`append`: what was fed stays. `expand`: the conversation is rendered anew each turn."""

    def next_context(self, messages: Sequence[Any]) -> list[int]:
        """Tokens to feed before the model answers, all through the last answer's end of turn having been fed."""

    def blocks(self, messages: Sequence[Any]) -> list[tuple[bool, list[int]]]:
        """Under `expand`: the whole conversation up to where the model answers, as (is an answer, tokens) in order."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the `top_p` nucleus."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"--temperature is {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}; expected more than 0 and at most 1")


@torch.no_grad()
def feed(model: PreTrainedModel, ids: Sequence[int], cache: DynamicCache, *, bidirectional: bool) -> Tensor:
    """Run `ids` after what the cache holds, extend the cache by them, and return the last token's logits, [V].

    Every token sees all the cache; among themselves they see all (`bidirectional`, a context block) or what is before
    them. A single token is the same either way.
    """
    past = int(cache.get_seq_length())
    end = past + len(ids)
    tokens = torch.tensor([list(ids)], device=model.device)
    if bidirectional:
        kv_end = torch.full(tokens.shape, end, dtype=torch.int32, device=model.device)
    else:
        kv_end = torch.arange(past + 1, end + 1, dtype=torch.int32, device=model.device)[None]
    output = model(
        input_ids=tokens,
        doc_start=torch.zeros_like(kv_end),
        kv_end=kv_end,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[0, -1]
    return logits


class Chat:
    """One conversation with a model.

    model: attached (`attention.attach` or `attention.load`) and in evaluation mode. mask: the one it was trained under.
    `messages` is the conversation so far; `fed` the tokens behind it, each of which has been through the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        mask: str,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}; expected 1 or more")
        self.model = model
        self.encoder = encoder
        self.mask = mask
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.max_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._choose = _chooser(sampling or Sampling(), model.device)
        self._stop_ids = _eos_ids(model)
        self.restart()

    def restart(self) -> None:
        """Forget the conversation; the system text stays."""
        self.messages: list[dict[str, str]] = [] if self.system is None else [_message("system", self.system)]
        self._forget_fed()

    def reply(self, user_text: str) -> str:
        """The model's answer to `user_text`, whole. Errors as for `stream`."""
        return "".join(self.stream(user_text))

    def stream(self, user_text: str) -> Generator[str, None, None]:
        """The model's answer as it comes, in pieces of text.

        An iterator that is closed early ends the answer there, and the conversation goes on from it. Raises DataError,
        with the conversation as it was, when the model has no positions left for this turn. An error inside the model
        leaves the cache between two states, so it starts the conversation anew.
        """
        messages = [*self.messages, _message("user", user_text)]
        blocks = self._blocks(messages)
        limit = self._answer_limit(sum(len(ids) for _, ids in blocks))
        answer: list[int] = []
        shown = ""
        try:
            logits = self._feed_blocks(blocks)
            while len(answer) < limit:
                token = self._choose(logits)
                if token in self._stop_ids and token not in self.encoder.end_of_turn_ids:
                    break
                answer.append(token)
                logits = self._feed_answer([token])
                if self._unfinished(answer) == []:
                    break
                text = self.encoder.decode(self._content(answer))
                if not text.endswith(_INCOMPLETE):
                    yield text[len(shown) :]
                    shown = text
            text = self._finish(messages, answer)
        except GeneratorExit:
            self._finish(messages, answer)
            raise
        except BaseException:
            self.restart()
            raise
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _finish(self, messages: list[dict[str, str]], answer: list[int]) -> str:
        """Feed what the answer lacks of its end of turn, enter it into the conversation, and return its text."""
        missing = self._unfinished(answer)
        if missing:
            self._feed_answer(missing)
        text = self.encoder.decode(self._content(answer))
        self.messages = [*messages, _message("assistant", text)]
        return text

    @property
    def _keeps_cache(self) -> bool:
        """Whether what was fed in earlier turns survives: not under `prefix`, nor where history is rendered anew."""
        return self.mask != "prefix" and self.encoder.history == "append"

    def _blocks(self, messages: list[dict[str, str]]) -> list[tuple[bool, list[int]]]:
        """What to feed before this turn's answer, on top of what is kept: (is an answer, tokens) in order."""
        if self.encoder.history == "expand":
            return self.encoder.blocks(messages)
        context = self.encoder.next_context(messages)
        return [(False, context if self._keeps_cache else self.fed + context)]

    def _feed_blocks(self, blocks: list[tuple[bool, list[int]]]) -> Tensor:
        if not self._keeps_cache:
            self._forget_fed()
        if self.mask == "prefix":  # all before this turn's answer sees all of it
            blocks = [(False, [id for _, ids in blocks for id in ids])]
        for is_answer, ids in blocks:
            self.fed += ids
            logits = feed(self.model, ids, self.cache, bidirectional=self.mask != "causal" and not is_answer)
        return logits

    def _forget_fed(self) -> None:
        self.fed: list[int] = []
        self.cache = DynamicCache(config=self.model.config)

    def _feed_answer(self, ids: list[int]) -> Tensor:
        self.fed += ids
        return feed(self.model, ids, self.cache, bidirectional=False)

    def _answer_limit(self, context: int) -> int:
        """How many tokens the answer may have, its end of turn included."""
        if self.max_positions is None:
            return self.max_new_tokens
        ending = len(self.encoder.end_of_turn_ids)
        before = context + (len(self.fed) if self._keeps_cache else 0)
        room = self.max_positions - before - ending
        if room < 1:
            raise DataError(
                f"the conversation would have {before} tokens; the model has {self.max_positions} "
                "positions, with the answer. Say less, or start a new conversation with /new"
            )
        return min(self.max_new_tokens, room)

    def _unfinished(self, answer: list[int]) -> list[int] | None:
        """What an answer lacks of its end of turn: [] when it is all there, None where the template writes none."""
        ending = self.encoder.end_of_turn_ids
        if not ending:
            return None
        return ending[_overlap(answer, ending) :]

    def _content(self, answer: list[int]) -> list[int]:
        """An answer without its end of turn, as far as that has come."""
        return answer[: len(answer) - _overlap(answer, self.encoder.end_of_turn_ids)]


def open_chat(
    folder: Path,
    *,
    mask: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling | None = None,
) -> Chat:
    """A chat with the model in `folder`, on a GPU in bfloat16 where there is one, else on the CPU in float32.

    Raises DataError when the folder is no saved model with its tokenizer, UsageError when no mask is known.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = ConversationEncoder.load(folder)
    on_gpu = torch.cuda.is_available()
    model = attention.load(folder, mask=mask, dtype=torch.bfloat16 if on_gpu else torch.float32)
    nn.Module.to(model, torch.device("cuda" if on_gpu else "cpu")).train(False)
    return Chat(
        model,
        encoder,
        mask=model.config.ismdata_mask,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )


def run_terminal(
    chat: Chat,
    *,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Read a line, stream the answer, until `/exit` or the end of input. `/new` starts over; Ctrl-C ends an answer."""
    write(f"Mask {chat.mask}. /new starts a new conversation, /exit leaves.\n")
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8 ({error.reason}); expected text") from error
        if line == "/exit":
            return
        if line == "/new":
            chat.restart()
            write("A new conversation.\n")
        elif line:
            _answer(chat, line, write)


def _answer(chat: Chat, line: str, write: Callable[[str], None]) -> None:
    with _interrupts() as interrupted, closing(chat.stream(line)) as pieces:
        try:
            for piece in pieces:
                write(piece)
                if interrupted.is_set():
                    break
            write("\n")
        except DataError as error:
            write(f"{error}\n")


@contextmanager
def _interrupts() -> Iterator[Event]:
    """An event that Ctrl-C sets, instead of breaking into the model and leaving a token in half of its layers."""
    interrupted = Event()
    if current_thread() is not main_thread():
        yield interrupted
        return
    former = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, former)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _overlap(answer: list[int], ending: list[int]) -> int:
    """How many tokens at the end of `answer` begin `ending`."""
    for length in range(min(len(answer), len(ending)), 0, -1):
        if answer[-length:] == ending[:length]:
            return length
    return 0


def _eos_ids(model: PreTrainedModel) -> set[int]:
    config = getattr(model, "generation_config", None) or model.config
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor], int]:
    """From logits [V] to the next token."""
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device).manual_seed(sampling.seed)

    no_ids = cast(LongTensor, torch.empty(1, 0, dtype=torch.long, device=device))  # neither warper looks at them

    def draw(logits: Tensor) -> int:
        scores = warpers(no_ids, cast(FloatTensor, logits.float()[None]))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return draw
