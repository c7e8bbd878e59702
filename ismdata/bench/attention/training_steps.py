"""Measure whole training steps: forward, backward and AdamW, on the same documents under each mask.

Weights are random, in float32; on a GPU, matrix products are in bfloat16. The batch comes from the Collator, as in
training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ismdata.attention import BACKENDS, attach, detach, preset_config
from ismdata.bench.attention.report import StepRow
from ismdata.bench.attention.workload import Workload, sharegpt_like
from ismdata.bench.timing import Lap, Outcome, Stopwatch, attempt, median_processor, median_seconds, peak_bytes, release
from ismdata.choices import MASKS
from ismdata.data import Collator, Sample

#: Causal comes first: the others are compared with it.
_MASKS_IN_TURN = sorted(MASKS, key=lambda mask: mask != "causal")

#: Tokens of the one row of a step, by device.
SEQ_LEN = {"cuda": 8192, "cpu": 256}


def base_config(seq_len: int) -> LlamaConfig:
    """The preset `base` with 49,152 tokens: 125 M parameters."""
    return preset_config("base", vocab_size=49_152, seq_len=seq_len)


def one_billion_config(seq_len: int) -> LlamaConfig:
    """The shape of Llama 3.2 1B: 1.24 B parameters."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=max(131_072, seq_len),
        tie_word_embeddings=True,
    )


#: The models, by device.
CONFIGS = {"cuda": {"base": base_config, "1b": one_billion_config}, "cpu": {"base": base_config}}


def training_steps(device: torch.device, *, backends: Sequence[str], rounds: int) -> Iterator[StepRow]:
    """Measure a step of each model under each backend and mask. Masks alternate; backends run one after another."""
    workload = sharegpt_like(SEQ_LEN[device.type], rows=1)
    for name, config in CONFIGS[device.type].items():
        yield from model_steps(name, config(workload.seq_len), workload, device, backends=backends, rounds=rounds)


@dataclass(kw_only=True)
class _Run:
    """A mask under one backend while it is measured."""

    mask: str
    batch: Mapping[str, Tensor]
    outcome: Outcome
    peak_bytes: int | None = None
    laps: list[Lap] = field(default_factory=list)

    def warm_up(self, trainer: _Trainer) -> None:
        if trainer.device.type == "cuda" or not trainer.optimizer.state:  # chooses kernels, makes AdamW's state
            trainer.step(self.batch)
        self.peak_bytes = peak_bytes(partial(trainer.step, self.batch), trainer.device)

    def sample(self, trainer: _Trainer) -> None:
        self.laps += trainer.watch.laps(partial(trainer.step, self.batch))


def model_steps(
    name: str, config: LlamaConfig, workload: Workload, device: torch.device, *, backends: Sequence[str], rounds: int
) -> list[StepRow]:
    """Measure one model on the rows of the workload."""
    trainers: list[_Trainer] = []
    made = attempt(lambda: trainers.append(_Trainer(config, device)), device)
    rows: list[StepRow] = []
    for backend in backends:
        batches = {mask: _batch(workload, mask, config.vocab_size, backend, device) for mask in _MASKS_IN_TURN}
        runs = [_Run(mask=mask, batch=batch, outcome=made) for mask, batch in batches.items()]
        for trainer in trainers:
            _measure(trainer, backend, runs, rounds)
        rows += [_row(name, backend, run, workload, base=runs[0]) for run in runs]
    trainers.clear()
    release(device)
    return rows


def _measure(trainer: _Trainer, backend: str, runs: Sequence[_Run], rounds: int) -> None:
    """Fill in the times of the runs of one backend, or why there are none."""
    device = trainer.device
    missing = BACKENDS[backend].missing(device) or BACKENDS[backend].missing_for_training(device)
    outcome = Outcome(reason=missing) if missing else attempt(partial(attach, trainer.model, backend), device)
    if outcome.reason:
        for run in runs:
            run.outcome = outcome
        return
    for turn in range(rounds + 1):
        for run in runs:
            if not run.outcome.reason:
                run.outcome = attempt(partial(run.sample if turn else run.warm_up, trainer), device)
                trainer.optimizer.zero_grad()  # gradients of a step that failed
    detach(trainer.model)


class _Trainer:
    """A model with random weights and its optimizer."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.watch = Stopwatch(device)
        with torch.device(device):
            self.model: PreTrainedModel = LlamaForCausalLM(config)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One optimizer step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _batch(workload: Workload, mask: str, vocab_size: int, backend: str, device: torch.device) -> dict[str, Tensor]:
    """The Collator's batch of the workload with random tokens, with the tables that the backend reads."""
    samples = [Sample(sequence=row, mask=mask) for row in workload.sequences(mask, vocab_size=vocab_size)]
    collator = Collator(mask, tables=bool(BACKENDS[backend].tables))
    return {name: tensor.to(device) for name, tensor in collator(samples).items()}


def _row(name: str, backend: str, run: _Run, workload: Workload, *, base: _Run) -> StepRow:
    seconds, causal = median_seconds(run.laps), median_seconds(base.laps)
    return StepRow(
        model=name,
        backend=backend,
        mask=run.mask,
        seq_len=workload.seq_len,
        rows=workload.rows,
        seconds=seconds,
        tokens_per_second=None if seconds is None else workload.tokens / seconds,
        processor=median_processor(run.laps),
        peak_bytes=run.peak_bytes,
        ratio=None if seconds is None or causal is None else seconds / causal,
        note=run.outcome.reason,
        failed=run.outcome.unexpected,
        details={"laps": [vars(lap) for lap in run.laps], "trace": run.outcome.trace},
    )
