"""Message fields that decide whether an answer is trained, under the names that different libraries use.

ms-swift and XTuner call it `loss`, tinker `trainable`, Axolotl `training`, verl `loss_mask`, torchtune `masked`. Such a
field is never dropped: if its meaning is not clear, the record is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ismdata.errors import Refused, shown

#: Fields in which true means that the answer is trained, and fields in which true means that it is not.
_TRAINED = ("train", "trainable", "training", "trained", "train_on_turn", "loss", "loss_mask", "step_loss_mask")
_MASKED = ("mask", "masked")
#: Labels of a single answer; one that is labelled as bad is not trained. Labels of a record: `answer_labels.py`.
_GOOD = ("is_good", "is_chosen", "is_desirable", "is_accepted", "is_correct", "is_preferred", "kto_tag")
_BAD = ("is_bad", "is_rejected", "is_undesirable", "is_wrong", "is_incorrect", "thumbs_down")
#: Fields that decide it for parts of an answer, which conversations cannot express.
_PARTIAL = ("train_detail", "training_detail", "loss_masks", "label_mask", "labels_mask", "token_mask")

#: All fields of a message that can decide training, except weights.
TRAINING_FLAGS = frozenset({*_TRAINED, *_MASKED, *_GOOD, *_BAD, *_PARTIAL})

#: Booleans as text, as files without types have them.
_TEXTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def train_flag(message: Mapping[str, Any], number: int) -> bool | None:
    """Whether message `number` is trained, None if no field decides it. Raises Refused."""
    found: dict[str, bool] = {}
    for name in (*_TRAINED, *_MASKED, *_GOOD, *_BAD, *_PARTIAL):
        value = message.get(name)
        if value is None:
            continue
        if name in _PARTIAL:
            raise Refused(
                "invalid_field",
                f"message {number} has {name} {shown(value)}, which trains parts of an answer; expected train: true or "
                "false, for the whole answer. Remove the field, or split the message in two",
            )
        flag = _as_bool(value, numbers=name != "mask")  # `mask: 1` is ambiguous
        if flag is None:
            hint = "true to leave the answer out of the loss, false to train it" if name in _MASKED else "true or false"
            raise Refused("invalid_field", f"message {number} has {name} {shown(value)}; expected {hint}")
        found[name] = flag != (name in _MASKED or name in _BAD)
    if len(set(found.values())) > 1:
        names = " and ".join(f"{name} {shown(message[name])}" for name in found)
        raise Refused("invalid_field", f"message {number} has {names}; expected fields that agree")
    return next(iter(found.values()), None)


def _as_bool(value: Any, *, numbers: bool) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        return _TEXTS[text] if text in _TEXTS and (numbers or text.isalpha()) else None
    return bool(value) if numbers and isinstance(value, int | float) and value in (0, 1) else None


def refuse_flags(ignored: Iterable[str]) -> None:
    """Raise Refused if a message field that can decide training is among those that are dropped."""
    for name in ignored:
        if is_flag(name):
            raise Refused(
                "invalid_field",
                f"{name} may decide what is trained, and this format does not read it; expected it in messages with "
                "role and content. Rename or remove the field",
            )


def is_flag(name: str) -> bool:
    """Whether a field can decide training, given its name, such as `messages[].loss`.

    >>> is_flag("messages[].loss"), is_flag("loss"), is_flag("closs")
    (True, True, False)
    """
    return name.rpartition("].")[2] in TRAINING_FLAGS
