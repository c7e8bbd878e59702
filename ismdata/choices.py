"""The values that options accept, defined once for the command line, the Python functions and the stored files.

A set of values is a `Literal`, which type checkers and Typer read. `words(Mask)` returns its values at run time.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ismdata.errors import UsageError
from ismdata.suggestions import did_you_mean


def words(choice: Any) -> tuple[str, ...]:
    """The values of a `Literal`, in order.

    Args:
        choice: A `Literal`.

    Returns:
        Its values.

    >>> words(Mask)
    ('ism', 'causal', 'prefix')
    """
    return get_args(choice)


#: Models to train from scratch (attention/models/presets.py has their shapes).
Preset = Literal["tiny", "small", "base", "glm-tiny", "glm-small"]

#: What each token sees (docs/masks.md).
Mask = Literal["ism", "causal", "prefix"]

MASKS: tuple[str, ...] = words(Mask)

#: The colour of each mask in all pictures.
MASK_COLOURS = {"ism": "#2563a8", "causal": "#c58a2b", "prefix": "#8a5aa8"}

#: How answers are marked: `plain` is the text as rendered; `glm` adds the tokens `[MASK]` and `[START]` and a second
#: position (docs/glm.md).
Layout = Literal["plain", "glm"]

LAYOUTS: tuple[str, ...] = words(Layout)

#: How a conversation becomes documents: `append` puts all turns into one, `expand` makes one per answer
#: (docs/templates.md).
History = Literal["append", "expand"]

#: Which answers are trained, out of those that the messages' own flags allow: all, the last one of each conversation,
#: or all without their reasoning.
TrainOn = Literal["all", "last", "content"]

#: What happens to documents longer than a sequence.
OverLong = Literal["split", "drop", "truncate", "error"]

#: The implementation of the tokenizer. `auto` is gigatoken if it is installed and its ids match the reference's (`hf`).
TokenizerBackend = Literal["auto", "hf", "gigatoken"]

#: Which side of a dialogue between two people is trained. `both` makes one conversation per side.
Side = Literal["second", "first", "both"]

#: Which answers of preference data are read.
Preference = Literal["chosen", "rejected"]

#: Which paths through a tree of messages are read: every path from the root to a leaf, or the best-ranked one.
Paths = Literal["all", "best"]

#: Which repeated conversations are removed: exact copies, or near copies as well.
Dedup = Literal["exact", "near"]

#: The implementation of attention. `auto` chooses by device.
AttentionBackend = Literal["auto", "sdpa", "flex", "varlen"]

#: The data type of a model's weights. `auto` is bfloat16 on a GPU and float32 elsewhere.
Precision = Literal["auto", "float32", "bfloat16"]

#: How the learning rate decreases after the warm-up.
Schedule = Literal["cosine", "linear", "constant"]

#: What counts the same in the mean loss: each target, each answer or each conversation.
LossWeighting = Literal["token", "answer", "conversation"]

#: How BLEU splits answers into words. `auto` decides by the script of the references.
BleuTokenizer = Literal["auto", "13a", "zh", "char"]

#: What a chat does when its context is full. The command line offers the first three; the others are baselines of the
#: SirLLM paper.
WhenFull = Literal["stop", "drop-oldest", "sirllm", "streaming", "random", "interval"]


def check_choice(option: str, value: object, choice: Any) -> None:
    """Check that a value is one of a set.

    Args:
        option: What the message calls the value, e.g. `--mask`.
        value: The value.
        choice: A `Literal`, or a tuple of values.

    Raises:
        UsageError: If the value is not in the set.
    """
    known = choice if isinstance(choice, tuple) else words(choice)
    if value not in known:
        hint = did_you_mean(str(value), known)
        raise UsageError(f"{option} is {value!r}; expected one of {', '.join(known)}{hint and '.' + hint}")


def check_mask(mask: str, option: str = "mask") -> None:
    """Check the name of a mask.

    Args:
        mask: The name.
        option: What the message calls it.

    Raises:
        UsageError: If it is not in `MASKS`.
    """
    check_choice(option, mask, MASKS)
