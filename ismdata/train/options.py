"""The options of `ismdata train`: defaults, checks, and reading them from a TOML file and from flags."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ismdata.choices import AttentionBackend, LossWeighting, Precision, Schedule, check_choice
from ismdata.errors import DataError, UsageError
from ismdata.suggestions import did_you_mean, foreign_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Fields that take one of a few words.
_CHOICES: dict[str, Any] = {
    "precision": Precision,
    "schedule": Schedule,
    "loss_weighting": LossWeighting,
    "backend": AttentionBackend,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train.

    Each field is a key of the TOML file and, with dashes for underscores, a flag of `ismdata train` (`fsdp_config` is a
    table of the file only).

    Raises:
        UsageError: if a value has the wrong type or is out of range, or if two options exclude each other.

    Example:
        >>> TrainOptions(model="tiny", steps=100).schedule
        'cosine'
    """

    model: str
    mask: str | None = None  # None: the mask of the shards
    backend: str = "auto"  # of attention: auto, sdpa, flex, varlen
    eval: str | None = None  # a packed folder to evaluate on

    steps: int | None = None  # None: `epochs` over the data
    epochs: float = 1.0
    batch_size: int = 4  # sequences per micro-batch, on one process
    accumulation: int | None = None  # micro-batches per step, on one process; None: 1, or as global_batch requires
    global_batch: int | None = None  # sequences per step; None: batch_size x accumulation x processes
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loss_weighting: str = "token"
    seed: int = 0

    precision: str = "auto"  # auto: bfloat16 on a GPU, float32 elsewhere
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: bool = False
    lora_rank: int = 16
    lora_alpha: float | None = None  # None: twice the rank
    fsdp: bool = False
    fsdp_config: dict[str, Any] = field(default_factory=dict)  # passed to TrainingArguments

    workers: int = 0  # data loading processes per training process
    log_every: int = 10
    save_every: int = 500
    keep: int = 2  # how many checkpoints
    eval_every: int | None = None  # None: only at the end
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_values(self)

    def batches_per_step(self, processes: int) -> tuple[int, int]:
        """Divide a step among processes.

        Args:
            processes: How many train.

        Returns:
            Micro-batches per step on one process, and sequences per step over all.

        Raises:
            UsageError: if the global batch does not divide evenly.
        """
        micro = self.batch_size * processes
        if self.global_batch is None:
            accumulation = self.accumulation or 1
            return accumulation, micro * accumulation
        if self.global_batch % micro:
            raise UsageError(
                f"--global-batch is {self.global_batch}; expected a multiple of {micro} (--batch-size "
                f"{self.batch_size} x {processes} processes). Change one of them"
            )
        accumulation = self.global_batch // micro
        if self.accumulation not in (None, accumulation):
            raise UsageError(
                f"--accumulation is {self.accumulation}; --global-batch {self.global_batch} requires {accumulation} on "
                f"{processes} processes with --batch-size {self.batch_size}. Leave --accumulation out"
            )
        return accumulation, self.global_batch

    def as_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)


def read_options(config: Path | None, flags: Mapping[str, Any]) -> TrainOptions:
    """Read the options. Precedence: flag, TOML file, default.

    Args:
        config: A TOML file of options, if there is one.
        flags: Flags by field name; None and () mean that a flag was not given.

    Returns:
        The options.

    Raises:
        DataError: if the file cannot be read or has a key that is no option.
        UsageError: if a value is invalid or no model is named.
    """
    found: dict[str, Any] = {} if config is None else _read_config(config)
    found |= {name: value for name, value in flags.items() if value is not None and value != ()}
    if "model" not in found:
        raise UsageError('no model given; expected --model, or model = "..." in the file that --config names')
    return TrainOptions(**found)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Expected a TOML file of options") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid TOML ({error}). Expected lines as in: learning_rate = 1e-4") from error
    names = {each.name for each in fields(TrainOptions)}
    options = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in names:
            raise DataError(f"{path}: unknown option {key!r}.{_meant(key, names)}")
        if name in options:
            raise DataError(f"{path}: {name!r} is set twice, once as {key!r}. Remove one of them")
        options[name] = tuple(value) if name == "report_to" and isinstance(value, list) else value
    try:
        _check_kinds(options)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from error
    return options


def _meant(key: str, names: set[str]) -> str:
    """What an unknown key may have meant, or what can be written instead."""
    if foreign := foreign_name(key):
        meant, source = foreign
        option = meant.removeprefix("train --").replace("-", "_")
        if option in names:
            return f" {key!r} of {source} is {option!r} here"
        what = f"`ismdata {meant}`" if re.fullmatch(r"[a-z]+ (--[a-z-]+|[A-Z]+)", meant) else meant
        return f" It is known from {source}; here {what}. Remove the line"
    return did_you_mean(key.replace("-", "_"), names) or f" Expected some of {', '.join(sorted(names))}"


#: The Python types that a field accepts, by the annotation above.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "tuple[str, ...]": (tuple,),
    "dict[str, Any]": (dict,),
}


_KIND_NAMES = {
    "str": "text in quotes",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple[str, ...]": 'a list of names, as in ["tensorboard"]',
    "dict[str, Any]": "a table",
}


def _check_kinds(options: TrainOptions | Mapping[str, Any]) -> None:
    values = options if isinstance(options, Mapping) else vars(options)
    for each in fields(TrainOptions):
        if each.name not in values:
            continue
        value = values[each.name]
        kind, _, optional = str(each.type).partition(" | ")
        fits = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
        if not (fits or (optional and value is None)):
            raise UsageError(f"{flag(each.name)} is {value!r}; expected {_KIND_NAMES[kind]}")
    trackers = values.get("report_to", ())
    if not all(isinstance(name, str) for name in trackers):
        raise UsageError(f"--report-to is {list(trackers)!r}; expected {_KIND_NAMES['tuple[str, ...]']}")


def _check_values(options: TrainOptions) -> None:
    values = vars(options)
    at_least_one = "steps batch_size accumulation global_batch lora_rank log_every save_every keep eval_every"
    for name in at_least_one.split():
        if values[name] is not None and values[name] < 1:
            raise UsageError(f"{flag(name)} is {values[name]}; expected 1 or more")
    for name in ("warmup", "workers", "seed"):
        if values[name] < 0:
            raise UsageError(f"{flag(name)} is {values[name]}; expected 0 or more")
    if values["seed"] >= 1 << 32:
        raise UsageError(f"--seed is {values['seed']}; expected less than 2^32")
    if options.eval_every is not None and options.eval is None:
        raise UsageError(
            "--eval-every is given without --eval. Name a packed folder to evaluate on, or leave --eval-every out"
        )
    for name in ("epochs", "learning_rate", "lora_alpha"):
        if values[name] is not None and not 0 < values[name] < math.inf:
            raise UsageError(f"{flag(name)} is {values[name]}; expected a number above 0")
    for name in ("weight_decay", "max_grad_norm"):
        if not 0 <= values[name] < math.inf:
            raise UsageError(f"{flag(name)} is {values[name]}; expected 0 or more")
    for name, choice in _CHOICES.items():
        check_choice(flag(name), values[name], choice)
    if options.fsdp_config and not options.fsdp:
        raise UsageError("fsdp_config is given without fsdp. Set fsdp = true as well, or remove fsdp_config")


def flag(name: str) -> str:
    """A field as the flag that a user types.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")
