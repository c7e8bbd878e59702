"""Which fields of a message say whether its answer is trained, whatever a corpus calls them.

ms-swift and XTuner call it `loss`, tinker `trainable`, Axolotl `training`, verl `loss_mask`, torchtune `masked`. A
field that could decide training is never left aside: what has no plain meaning is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ismdata.errors import Refused, shown

#: Fields whose `true` says that the answer is trained, and fields whose `true` says that it is not.
_TRAINED = ("train", "trainable", "training", "trained", "train_on_turn", "loss", "loss_mask", "step_loss_mask")
_LEFT_OUT = ("mask", "masked")
#: Fields that say it of parts of an answer, which no column here can hold.
_IN_PARTS = ("train_detail", "training_detail", "loss_masks", "label_mask", "labels_mask", "token_mask")

#: All fields of a message that could decide training; weights aside.
TRAINING_FLAGS = frozenset({*_TRAINED, *_LEFT_OUT, *_IN_PARTS})


def train_flag(message: Mapping[str, Any], number: int) -> bool | None:
    """Whether message `number` is to be trained, None where nothing says so. Raises Refused."""
    found: dict[str, bool] = {}
    for name in (*_TRAINED, *_LEFT_OUT, *_IN_PARTS):
        value = message.get(name)
        if value is None:
            continue
        if name in _IN_PARTS:
            raise Refused(
                "invalid_field",
                f"message {number} has {name} {shown(value)}, which says what is trained within an answer; expected "
                "train: true or false, for the whole of it. Take the field out, or make two messages of it",
            )
        said = _as_bool(value, numbers=name != "mask")  # `mask: 1` could mean either
        if said is None:
            hint = (
                "true to leave the answer out of the loss, false to train it" if name in _LEFT_OUT else "true or false"
            )
            raise Refused("invalid_field", f"message {number} has {name} {shown(value)}; expected {hint}")
        found[name] = said != (name in _LEFT_OUT)
    if len(set(found.values())) > 1:
        names = " and ".join(f"{name} {shown(message[name])}" for name in found)
        raise Refused("invalid_field", f"message {number} has {names}; expected fields that agree")
    return next(iter(found.values()), None)


def _as_bool(value: Any, *, numbers: bool) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return bool(value) if numbers and isinstance(value, int | float) and value in (0, 1) else None


def refuse_flags(ignored: Iterable[str]) -> None:
    """Raise Refused where a field of a message that could decide training is among those that are left out."""
    for name in ignored:
        if is_flag(name):
            raise Refused(
                "invalid_field",
                f"{name} could say what is trained, and is not read in this format; expected it on messages with role "
                "and content. Rename the field, or take it out",
            )


def is_flag(name: str) -> bool:
    """Whether a field, named like `messages[].loss`, could decide training.

    >>> is_flag("messages[].loss"), is_flag("loss"), is_flag("closs")
    (True, True, False)
    """
    return name.rpartition("].")[2] in TRAINING_FLAGS
