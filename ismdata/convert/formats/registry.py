"""The corpus formats by name. To add one, write a file with a `CorpusFormat` object and add a line to `FORMATS`."""

from __future__ import annotations

from typing import Any

from ismdata.convert.corpus_format import CorpusFormat
from ismdata.convert.formats.agent_sessions import CLAUDE_CODE, CODEX
from ismdata.convert.formats.alpaca import ALPACA
from ismdata.convert.formats.api_log import API_LOG
from ismdata.convert.formats.character_chats import SILLYTAVERN, TEXT_GENERATION_WEBUI
from ismdata.convert.formats.chatgpt import CHATGPT_EXPORT
from ismdata.convert.formats.dailydialog import DAILYDIALOG
from ismdata.convert.formats.described import DESCRIBED
from ismdata.convert.formats.dialogue_rows import DIALOGUE_ROWS
from ismdata.convert.formats.langchain import LANGCHAIN
from ismdata.convert.formats.lists import LISTS
from ismdata.convert.formats.local_apps import LM_STUDIO, OPEN_WEBUI
from ismdata.convert.formats.messages import CLAUDE_EXPORT, GEMINI, KDCONV, OPENAI, SHAREGPT
from ismdata.convert.formats.moss import MOSS
from ismdata.convert.formats.pairs import PAIRS
from ismdata.convert.formats.people_chats import DISCORD, GOOGLE_CHAT, MESSENGER, SLACK, TELEGRAM
from ismdata.convert.formats.personachat import CONVAI, PERSONACHAT
from ismdata.convert.formats.preference import KTO, PREFERENCE
from ismdata.convert.formats.prompt_completion import PROMPT_COMPLETION
from ismdata.convert.formats.question_lists import QUESTION_LISTS
from ismdata.convert.formats.separated import SEPARATED
from ismdata.convert.formats.threads import THREADS
from ismdata.convert.formats.trees import NESTED_TREES, TREE_ROWS
from ismdata.convert.formats.tsv_pairs import TSV_PAIRS
from ismdata.convert.formats.utterances import UTTERANCES
from ismdata.convert.formats.whatsapp import WHATSAPP

#: The formats by their names for `--format`, in the order in which detection tries them.
FORMATS: dict[str, CorpusFormat] = {
    # First, because their lists of messages look like those of other formats.
    "telegram": TELEGRAM,
    "slack": SLACK,
    "discord": DISCORD,
    "messenger": MESSENGER,
    "google_chat": GOOGLE_CHAT,
    "sillytavern": SILLYTAVERN,
    "text_generation_webui": TEXT_GENERATION_WEBUI,
    "open_webui": OPEN_WEBUI,
    "lm_studio": LM_STUDIO,
    "claude_code": CLAUDE_CODE,
    "codex": CODEX,
    "langchain": LANGCHAIN,
    "api_log": API_LOG,
    "described": DESCRIBED,
    "oasst": TREE_ROWS,
    "oasst_trees": NESTED_TREES,
    # Before `messages`: their records have such a list too, and more fields that matter.
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
    # After `dialogue_rows`: beside the id of a dialogue, parents only say where it has branches.
    "threads": THREADS,
    "separated": SEPARATED,
    # Last, because records of other formats can contain such single texts too.
    "prompt_completion": PROMPT_COMPLETION,
    "whatsapp": WHATSAPP,
    "personachat": PERSONACHAT,
    "tsv_pairs": TSV_PAIRS,
}


def detect(record: Any) -> str | None:
    """The name of the first format that a record matches, or None.

    >>> detect({"conversations": [{"from": "human", "value": "Hello!"}]})
    'sharegpt'
    """
    return next((name for name, corpus_format in FORMATS.items() if corpus_format.matches(record)), None)
