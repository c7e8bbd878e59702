"""The words that options accept, each set defined once for the command line, the Python functions and the stored files.

A set is a `Literal`, so that type checkers and Typer read it; `words(Mask)` gives its values at run time.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ismdata.errors import UsageError


def words(choice: Any) -> tuple[str, ...]:
    """The values of a `Literal`, in order.

    >>> words(Mask)
    ('ism', 'causal', 'prefix')
    """
    return get_args(choice)


Mask = Literal["ism", "causal", "prefix"]

MASKS: tuple[str, ...] = words(Mask)

#: How tokens are arranged around answers: as rendered, or as in GLM, with `[MASK]` and `[START]` and two positions.
Layout = Literal["plain", "glm"]

LAYOUTS: tuple[str, ...] = words(Layout)

#: How a conversation becomes documents: all turns in one, or one document per answer, as the template renders it.
History = Literal["append", "expand"]

#: Which answers are trained, of those that the messages' own flags leave: all of them, the last one of each
#: conversation, or all without their reasoning.
TrainOn = Literal["all", "last", "content"]

#: What happens to documents longer than a sequence.
OverLong = Literal["split", "drop", "truncate", "error"]

#: The tokenizer's implementation. `auto` is gigatoken where it is installed and its ids match the reference's (`hf`).
TokenizerBackend = Literal["auto", "hf", "gigatoken"]

#: Which side of a dialogue between two people is trained; `both` makes one conversation for each side.
Side = Literal["second", "first", "both"]

#: Which answers of preference data are read.
Preference = Literal["chosen", "rejected"]

#: Which paths of a tree of messages are read: each from the root to a leaf, or the best-ranked one.
Paths = Literal["all", "best"]

#: Which repeated conversations are removed.
Dedup = Literal["exact", "near"]

#: The implementation of attention.
AttentionBackend = Literal["auto", "sdpa", "flex", "varlen"]

#: The data type of a model's weights. `auto` is bfloat16 on a GPU and float32 elsewhere.
Precision = Literal["auto", "float32", "bfloat16"]

#: How the learning rate falls after the warm-up.
Schedule = Literal["cosine", "linear", "constant"]

#: What each target's loss is averaged over first.
LossWeighting = Literal["token", "answer", "conversation"]

#: How generated answers are cut into words for BLEU; `auto` decides by the script of the references.
BleuTokenizer = Literal["auto", "13a", "zh", "char"]

#: What a chat does when its context is full. Users are offered the first three; the others are baselines of SirLLM.
WhenFull = Literal["stop", "drop-oldest", "sirllm", "streaming", "random", "interval"]


def check_choice(option: str, value: object, choice: Any) -> None:
    """Check a value against a set of words.

    Args:
        option: What the message calls the value, e.g. `--mask`.
        value: The value to check.
        choice: A `Literal`, or a tuple of words.

    Raises:
        UsageError: If the value is not one of the words.
    """
    known = choice if isinstance(choice, tuple) else words(choice)
    if value not in known:
        raise UsageError(f"{option} is {value!r}; expected one of {', '.join(known)}")


# ---- data ----


# ---- models ----


def check_mask(mask: str, option: str = "mask") -> None:
    """Check a mask's name.

    Raises:
        UsageError: If it is none of `MASKS`.
    """
    check_choice(option, mask, MASKS)
