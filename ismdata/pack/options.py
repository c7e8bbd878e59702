"""The options of `pack`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ismdata.choices import (
    History,
    Layout,
    Mask,
    OverLong,
    TokenizerBackend,
    TrainOn,
    check_choice,
    check_mask,
)
from ismdata.errors import UsageError
from ismdata.masks import BLOCK_SIZE
from ismdata.rendering import DEFAULT_DATE


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How conversations become packed sequences.

    Attributes:
        tokenizer: A local folder, a GGUF file or a name on the Hugging Face Hub.
        chat_template: A Jinja file or `chatml`; None for the tokenizer's own template.
        seq_len: Tokens per sequence, a multiple of 128.
        mask: The mask that block tables and targets are computed for.
        over_long: What happens to documents longer than `seq_len`.
        history: One document per conversation (`append`), or one per answer, as the template renders it (`expand`).
        template_arguments: Variables for the template, such as `enable_thinking`.
        template_date: The date that templates print as today.
        prefix_every: Under `prefix`, make a document for every N-th answer only.
        train_on: Which answers are trained, of those that the messages' own flags leave: `all`, the `last` one of
            each conversation, or all without their reasoning (`content`).
        layout: `glm` inserts two tokens before each answer and writes two positions per token.
        glm_mask_token: The control token used as `[MASK]`; None to choose it from the tokenizer.
        glm_start_token: The control token used as `[START]`; None to choose it from the tokenizer.
        tokenizer_backend: `auto` uses gigatoken if it is installed and its ids match those of tokenizers (`hf`).
            The packed sequences are the same with each backend; only their names in the index differ.
        workers: Threads of the tokenizer; 0 for all cores. The output does not depend on it.
        seed: Decides which documents share a sequence, and the order of the sequences.

    Raises:
        UsageError: If an option is out of range, or two options exclude each other.

    Example:
        >>> PackOptions(tokenizer="gpt2", seq_len=1000)
        Traceback (most recent call last):
        ismdata.errors.UsageError: --seq-len 1000: expected a positive multiple of 128, for instance 1024
    """

    tokenizer: str
    chat_template: str | None = None
    seq_len: int = 8192
    mask: Mask = "ism"
    over_long: OverLong = "split"
    history: History = "append"
    template_arguments: Mapping[str, Any] | None = None
    template_date: datetime.date = DEFAULT_DATE
    prefix_every: int = 1
    train_on: TrainOn = "all"
    layout: Layout = "plain"
    glm_mask_token: str | None = None
    glm_start_token: str | None = None
    tokenizer_backend: TokenizerBackend = "auto"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_seq_len()
        check_mask(self.mask, "--mask")
        check_choice("--over-long", self.over_long, OverLong)
        check_choice("--history", self.history, History)
        check_choice("--train-on", self.train_on, TrainOn)
        check_choice("--tokenizer-backend", self.tokenizer_backend, TokenizerBackend)
        check_choice("--layout", self.layout, Layout)
        if self.prefix_every < 1:
            raise UsageError(f"--prefix-every {self.prefix_every}: expected 1 or more")
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: expected 0 (all cores) or more")
        self._check_combinations()

    def _check_seq_len(self) -> None:
        if self.seq_len < BLOCK_SIZE or self.seq_len % BLOCK_SIZE:
            near = max(1, round(self.seq_len / BLOCK_SIZE)) * BLOCK_SIZE
            raise UsageError(
                f"--seq-len {self.seq_len}: expected a positive multiple of {BLOCK_SIZE}, for instance {near}"
            )
        most = np.iinfo(np.int16).max * BLOCK_SIZE
        if self.seq_len > most:
            raise UsageError(
                f"--seq-len {self.seq_len}: expected at most {most}, because block tables number blocks in 16 bits"
            )

    def _check_combinations(self) -> None:
        if self.prefix_every > 1 and self.mask != "prefix":
            raise UsageError(f"--prefix-every requires --mask prefix; found --mask {self.mask}")
        for option, token in (("--glm-mask-token", self.glm_mask_token), ("--glm-start-token", self.glm_start_token)):
            if token is not None and self.layout != "glm":
                raise UsageError(f"{option} requires --layout glm; found --layout {self.layout}")
        if self.train_on == "content" and self.mask == "prefix":
            raise UsageError(
                "--train-on content requires --mask ism or causal: under prefix, everything before the trained part "
                "of an answer attends in both directions, and that would include its reasoning"
            )
        if self.train_on == "content" and self.layout == "glm":
            raise UsageError(
                "--train-on content requires --layout plain: in the GLM layout an answer has a single [START]"
            )

    @property
    def document_per_answer(self) -> bool:
        """Whether each trained answer becomes a document of its own, rather than each conversation."""
        return self.mask == "prefix" or self.history == "expand"
