"""Record fields that say whether an answer is good, under the names that corpora use.

Whatever the format, an answer labelled as bad is never trained as a good one. Labels are booleans, 0 and 1, or words,
since CSV files have no other values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from ismdata.choices import Preference
from ismdata.errors import Refused, shown

_BOOLEANS = {"true": True, "false": False}
_NUMBERS = {"1": True, "0": False, "-1": False, "1.0": True, "0.0": False, "-1.0": False}
#: Words without anything but letters. The second half are classes too, as in `label: "no"`.
_WORDS = dict.fromkeys(
    ["good", "desirable", "chosen", "accepted", "accept", "thumbsup", "like", "liked"], True
) | dict.fromkeys(["bad", "undesirable", "rejected", "reject", "thumbsdown", "dislike", "disliked"], False)
_CLASSES = dict.fromkeys(["yes", "y", "up", "upvote", "positive", "correct", "safe"], True) | dict.fromkeys(
    ["no", "n", "down", "downvote", "negative", "incorrect", "wrong", "unsafe"], False
)
_SIGNS = {"+1": True, "👍": True, "👎": False}

#: Fields that can be nothing but a label: other values than these are refused.
_SURE = _BOOLEANS | _NUMBERS | _WORDS | _CLASSES | _SIGNS
#: Fields that are a label if they have one of these values. Otherwise they are a class, a rating or an answer.
_LABEL = _BOOLEANS | _NUMBERS | _WORDS | _SIGNS
_RATING = _BOOLEANS | {"-1": False, "-1.0": False} | _WORDS | _CLASSES | _SIGNS
_FLAG = _BOOLEANS | _NUMBERS

#: By name, in lower case and without anything but letters: which values are labels, and whether true means good.
_FIELDS: dict[str, tuple[Mapping[str, bool], bool]] = {
    "label": (_LABEL, True),
    **dict.fromkeys(
        ["ktotag", "ktolabel", "isgood", "ischosen", "isdesirable", "desirable", "isaccepted", "isapproved"],
        (_SURE, True),
    ),
    **dict.fromkeys(
        ["isacceptable", "ispreferred", "iscorrect", "issafe", "thumbsup", "liked", "upvoted"], (_SURE, True)
    ),
    **dict.fromkeys(
        ["isbad", "isrejected", "isundesirable", "undesirable", "isunacceptable", "iswrong"], (_SURE, False)
    ),
    **dict.fromkeys(["isincorrect", "isunsafe", "thumbsdown", "disliked", "downvoted"], (_SURE, False)),
    **dict.fromkeys(["rating", "feedback", "humanfeedback", "userfeedback", "vote", "reaction"], (_RATING, True)),
    **dict.fromkeys(["verdict", "judgment", "judgement", "thumbs"], (_RATING, True)),
    **dict.fromkeys(("good", "chosen"), (_FLAG, True)),
    **dict.fromkeys(("bad", "rejected"), (_FLAG, False)),
    **dict.fromkeys(["accepted", "approved", "acceptable", "preferred", "correct", "safe"], (_BOOLEANS, True)),
    **dict.fromkeys(["unacceptable", "incorrect", "wrong", "unsafe"], (_BOOLEANS, False)),
}
#: Fields that say of a whole record that it is not trained: with false, or as a weight with 0.
_TRAINED = frozenset({"train", "trainable", "training", "trained", "loss"})
_WEIGHTS = frozenset({"weight", "loss_weight", "loss_scale"})
#: What is read of a label that is an object, such as `{"rating": "thumbs_down"}`.
_INNER = ("rating", "label", "thumbs", "value")
#: Fields with a worse answer, which `--preference` decides about.
_WORSE_ANSWERS = frozenset({"rejected", "rejected_messages", "non_preferred_output", "rejected_response"})


@lru_cache(maxsize=4096)
def _field(name: Any) -> tuple[Mapping[str, bool], bool] | None:
    """What `_FIELDS` says about a field, None for fields that are no label."""
    return _FIELDS.get(re.sub(r"[\W_]+", "", name.lower())) if isinstance(name, str) else None


def may_be_labelled(fields: Iterable[Any]) -> bool:
    """Whether a record has a field that can label its answer or hold a worse one, whatever its value.

    >>> may_be_labelled({"prompt": "", "Is-Good": None}), may_be_labelled({"prompt": ""})
    (True, False)
    """
    special = _WORSE_ANSWERS | _TRAINED | _WEIGHTS
    return any(_field(name) is not None or name in special for name in fields)


def labels_of(fields: Mapping[str, Any]) -> dict[str, bool]:
    """The fields that label the answer of a record, and whether they call it good. Raises Refused if one is unclear.

    >>> labels_of({"prompt": "", "label": "False", "rating": 5}), labels_of({"label": "sports"})
    ({'label': False}, {})
    """
    found = {}
    for name, value in fields.items():
        known = _field(name)
        if known is None or value is None or value == "":
            continue
        values, good = known
        flag = _as_label(_inner(value), values)
        if flag is not None:
            found[name] = flag is good
        elif values is _SURE:
            raise Refused(
                "invalid_field",
                f"{name} is {shown(value)}; expected true or false, because an answer that is labelled as bad is not "
                "trained. Correct the value, or rename the field",
            )
    return found


def check_labels(fields: Mapping[str, Any], preference: Preference | None) -> None:
    """Refuse an answer that its record labels as bad, or with `preference` "rejected" one that it labels as good.

    Args:
        fields: The record's fields beside its messages.
        preference: Which answers are read; None reads the good ones.

    Raises:
        Refused: If the answer is not to be read, if labels are unclear or contradict each other, or if the record has
            a worse answer too.
    """
    worse = next((name for name in _WORSE_ANSWERS if _is_answer(fields.get(name))), None)
    if worse is not None:
        raise Refused(
            "no_preference",
            f"the record has a worse answer in {worse}, unlike the first records of its file; expected records of one "
            "kind. Move such records to a file of their own, or use --format preference with --preference chosen",
        )
    untrained = next((name for name in fields if _is_untrained(name, fields[name])), None)
    if untrained is not None:
        what = f"{untrained} is {shown(fields[untrained])} for the whole record"
        raise Refused("invalid_field", f"{what}; expected it in messages. Leave the record out, or rename the field")
    found = labels_of(fields)
    if len(set(found.values())) > 1:
        names = " and ".join(f"{name} {shown(fields[name])}" for name in found)
        raise Refused("invalid_field", f"the record has {names}; expected labels that agree")
    for name, good in found.items():
        if good is (preference == "rejected"):
            value = fields[name]
            what, hint = str(value).lower(), ""
            if not isinstance(value, bool):
                what, hint = shown(value), f". If {name} says something else, rename it"
            kind = "good, and --preference rejected reads bad answers" if good else "bad"
            raise Refused("rejected", f"{name} is {what}: the answer is labelled as {kind}{hint}")


def _as_label(value: Any, values: Mapping[str, bool]) -> bool | None:
    """A value as a boolean, None if it is not among the `values` that are labels."""
    if isinstance(value, bool | int | float):
        value = str(value)
    if not isinstance(value, str) or len(value) > 40:
        return None
    text = value.strip().lower()
    return values.get(text, values.get(re.sub(r"[\s_-]+", "", text)) if not text.startswith("-") else None)


def labels_message_as_bad(name: str, value: Any) -> bool:
    """Whether a field of a single message calls it bad. Numbers can be classes, so only -1 among them does.

    >>> labels_message_as_bad("feedback", {"rating": "thumbsDown"}), labels_message_as_bad("label", 0)
    (True, False)
    """
    known, value = _field("rating" if name == "annotation" else name), _inner(value)
    if known is None or known[0] is _SURE or (type(value) in (int, float) and value != -1):
        return False
    return _as_label(value, known[0]) is (not known[1])


def may_label_message(name: str) -> bool:
    """Whether `labels_message_as_bad` can be true of a field."""
    return name == "annotation" or ((known := _field(name)) is not None and known[0] is not _SURE)


def _inner(value: Any) -> Any:
    return next((value[name] for name in _INNER if name in value), None) if isinstance(value, dict) else value


def _is_untrained(name: str, value: Any) -> bool:
    if name in _WEIGHTS:
        return value is not None and not isinstance(value, bool) and value in (0, "0", "0.0")
    return name in _TRAINED and (value is False or (isinstance(value, str) and value.strip().lower() == "false"))


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | list | dict) and bool(value) and _as_label(value, _FLAG) is None
