"""The corpus formats. To add one: a file with an object that is a `base.Reader`, and a line in `READERS`."""

from __future__ import annotations

from typing import Any

from ismdata.readers.alpaca import ALPACA
from ismdata.readers.base import Reader
from ismdata.readers.chatgpt import CHATGPT_EXPORT
from ismdata.readers.convai import CONVAI
from ismdata.readers.dailydialog import DAILYDIALOG
from ismdata.readers.dialogue_rows import DIALOGUE_ROWS
from ismdata.readers.kto import KTO
from ismdata.readers.lists import LISTS
from ismdata.readers.messages import CLAUDE_EXPORT, GEMINI, KDCONV, OPENAI, SHAREGPT
from ismdata.readers.moss import MOSS
from ismdata.readers.pairs import PAIRS
from ismdata.readers.personachat import PERSONACHAT
from ismdata.readers.preference import PREFERENCE
from ismdata.readers.prompt_completion import PROMPT_COMPLETION
from ismdata.readers.question_lists import QUESTION_LISTS
from ismdata.readers.separated import SEPARATED
from ismdata.readers.trees import NESTED_TREES, TREE_ROWS
from ismdata.readers.tsv_pairs import TSV_PAIRS
from ismdata.readers.utterances import UTTERANCES

#: Format names, as `--format` takes them, in the order in which detection asks.
READERS: dict[str, Reader] = {
    "oasst": TREE_ROWS,
    "oasst_trees": NESTED_TREES,
    # Before `messages`: their records have such a list too, and more to say about it.
    "preference": PREFERENCE,
    "kto": KTO,
    "utterances": UTTERANCES,
    "messages": OPENAI,
    "sharegpt": SHAREGPT,
    "gemini": GEMINI,
    "claude_export": CLAUDE_EXPORT,
    "chatgpt_export": CHATGPT_EXPORT,
    "question_lists": QUESTION_LISTS,
    "convai": CONVAI,
    "alpaca": ALPACA,
    "moss": MOSS,
    "pairs": PAIRS,
    "dailydialog": DAILYDIALOG,
    "kdconv": KDCONV,
    "lists": LISTS,
    "dialogue_rows": DIALOGUE_ROWS,
    "separated": SEPARATED,
    # Single texts can stand beside anything, so they are asked last.
    "prompt_completion": PROMPT_COMPLETION,
    "personachat": PERSONACHAT,
    "tsv_pairs": TSV_PAIRS,
}


def detect(record: Any) -> str | None:
    """The name of the first format that a record looks like, or None.

    >>> detect({"conversations": [{"from": "human", "value": "Hello!"}]})
    'sharegpt'
    """
    return next((name for name, reader in READERS.items() if reader.fits(record)), None)
