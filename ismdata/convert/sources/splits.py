"""The names of splits: which split the name of a file, a folder or a list means, if any.

A split is found by one of these words in a name: `train`, `training`; `validation`, `valid`, `val`, `dev`, `eval`;
`test`. Three kinds of names count:

- exact: the word alone, or with words that say nothing else: `train.jsonl`, `dev-00000-of-00002.parquet`,
  `test_set.json`, `validation/part1.jsonl`. Of `train_sft` and `test_gen` the purpose is kept.
- series: names that differ only in the word: `talks_test_de.jsonl` beside `talks_train_de.jsonl`.
- last: the word comes last (`film_dev.json`), and some name of the set means `train`.

Others such as `test_case_chat.jsonl` are doubtful: they are reported, not guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from ismdata.convert.sources.file_names import stem_of

Item = TypeVar("Item")

TRAIN, VALIDATION, TEST = "train", "validation", "test"
#: Splits for measuring: a conversation that is in one of these and in another split stays in this one.
HELD_OUT = (VALIDATION, TEST)

_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "devel", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
#: What a split is for, kept as a part of its name: `train_sft` and `train_gen` are two splits.
_PURPOSES = frozenset({"sft", "gen", "prefs", "dpo", "rm", "rl", "kto", "ppo", "orpo", "grpo"})
#: Words that may stand beside the word of a split without meaning another thing.
_PLAIN = re.compile(
    "data(set)?|set|split|file|part|shard|of|full|all|final|small|mini|large|clean(ed)?|filtered|raw|processed|sample|"
    "random|topic|freq|rare|seen|unseen|self|none|both|other|original|revised|no|cands|matched|mismatched|public|private|"
    "dialogs?|dialogues?|conv(ersation)?s?|talks?|chats?|messages|utterances|en|de|fr|es|it|pt|ru|zh|ja|ko|ar|hi"
)
_NUMBER = re.compile(r"v?\d+(?:\.\d+)*|[0-9a-f]{8,}")
_UNSAFE = re.compile(r"[^\w.-]+")
#: Names that the index of a folder of splits, or an unfinished output, uses itself.
_RESERVED = frozenset({"index.json", "quarantine.jsonl", "journal.jsonl", "scratch"})


class _Reading(NamedTuple):
    """What one name says. `kind` is exact, last or other; `frame` is the name with `*` for the word."""

    split: str
    kind: str
    frame: tuple[str, ...]


def _read(name: str) -> _Reading | None:
    """What a name without folders and endings says, None if it has no word of a split or several."""
    tokens = [token for token in re.split(r"[\W_]+", name.lower()) if token]
    words = [_WORDS.get(token.rstrip("0123456789")) for token in tokens]
    found = [at for at, word in enumerate(words) if word is not None]
    if len(found) != 1:
        return None
    at = found[0]
    word = words[at]
    assert word is not None
    rest = [token for token in tokens[:at] + tokens[at + 1 :] if not _NUMBER.fullmatch(token)]
    purposes = [token for token in rest if token in _PURPOSES]
    split = "_".join([word, *purposes])
    frame = (*tokens[:at], "*", *tokens[at + 1 :])
    if all(token in _PURPOSES or _PLAIN.fullmatch(token) for token in rest):
        return _Reading(split, "exact", frame)
    after = [token for token in tokens[at + 1 :] if not (_NUMBER.fullmatch(token) or _PLAIN.fullmatch(token))]
    return _Reading(word, "last" if not after else "other", frame)


def split_of_name(name: str) -> str | None:
    """The split that one name means by itself, such as a key of a JSON object.

    >>> split_of_name("Valid"), split_of_name("train_sft"), split_of_name("tests_passed")
    ('validation', 'train_sft', None)
    """
    reading = _read(name)
    return reading.split if reading is not None and reading.kind == "exact" else None


def declared_splits(names: Iterable[str]) -> dict[str, str]:
    """The split of each name of a set that are splits by declaration, such as the keys of a `DatasetDict`.

    Usual names are unified, others are kept if a folder can have them. No two have one name.

    >>> declared_splits(["train", "dev", "helpful/base"])
    {'train': 'train', 'dev': 'validation', 'helpful/base': 'helpful_base'}
    """
    names = list(names)
    usual = {name: _WORDS.get(name.lower(), name) for name in names}
    taken: set[str] = set()
    splits = {}
    for name in names:
        alone = sum(one == usual[name] for one in usual.values()) == 1
        safe = _UNSAFE.sub("_", usual[name] if alone else name).lstrip(".") or "split"
        safe = f"{safe}_" if safe in _RESERVED else safe
        numbered = (safe if number == 1 else f"{safe}_{number}" for number in range(1, len(names) + 2))
        splits[name] = next(one for one in numbered if one not in taken)
        taken.add(splits[name])
    return splits


class FileSplits(NamedTuple):
    """The splits of a set of files, in their order; None for a file of no split.

    `doubtful` has the numbers of files whose names may mean a split or not, and the split.
    """

    splits: list[str | None]
    doubtful: list[tuple[int, str]]


def splits_of_files(places: Sequence[Sequence[str]]) -> FileSplits:
    """The splits that the names of files mean, given their folders and their names, from the outermost folder on.

    The file's name decides, or else the innermost folder with the name of a split.

    >>> splits_of_files([["train.jsonl"], ["dev", "a.jsonl"], ["notes.jsonl"]])
    FileSplits(splits=['train', 'validation', None], doubtful=[])
    """
    readings = [_read(stem_of(place[-1])) if place else None for place in places]
    series: defaultdict[tuple[tuple[str, ...], ...], set[str]] = defaultdict(set)
    for place, reading in zip(places, readings, strict=True):
        if reading is not None:
            series[(tuple(place[:-1]), reading.frame)].add(reading.split)
    splits: list[str | None] = []
    for place, reading in zip(places, readings, strict=True):
        sure = reading is not None and (reading.kind == "exact" or len(series[(tuple(place[:-1]), reading.frame)]) > 1)
        folders = (split_of_name(stem_of(folder)) for folder in reversed(place[:-1]))
        splits.append(reading.split if sure and reading is not None else next(filter(None, folders), None))
    last = [
        at for at, reading in enumerate(readings) if reading is not None and reading.kind == "last" and not splits[at]
    ]
    trained = {split for split in splits if split} | {reading.split for at in last if (reading := readings[at])}
    if any(is_train(split) for split in trained):
        for at in last:
            splits[at] = reading.split if (reading := readings[at]) else None
    doubtful = [(at, reading.split) for at, reading in enumerate(readings) if reading is not None and not splits[at]]
    return FileSplits(splits, doubtful)


def in_order(items: Iterable[Item], name: Callable[[Item], str]) -> list[Item]:
    """Items sorted by their splits: train, validation, test, then others; within these in their order.

    >>> in_order(["test", "code", "train_sft"], str)
    ['train_sft', 'test', 'code']
    """
    ranks = (TRAIN, VALIDATION, TEST)

    def rank(item: Item) -> int:
        word = name(item).split("_")[0]
        return ranks.index(word) if word in ranks else len(ranks)

    return sorted(items, key=rank)


def is_train(split: str) -> bool:
    """Whether a split is one to train on by its name: `train`, `train_sft`."""
    return split.split("_")[0] == TRAIN


def is_held_out(split: str) -> bool:
    """Whether a split is one to measure with by its name: `validation`, `test_sft`."""
    return split.split("_")[0] in HELD_OUT


def is_named(split: str, names: Iterable[str]) -> bool:
    """Whether one of these names means the split.

    >>> is_named("validation", ["dev"]), is_named("train_sft", ["train"])
    (True, False)
    """
    return any(split in (name, _WORDS.get(name.lower()), split_of_name(name)) for name in names)
