"""A folder with a saved tokenizer, read with `tokenizers` alone.

Importing transformers takes 0.4 s, and `pack` and `inspect` need it for the tokenizer alone. Where the general class of
transformers saved the folder, `tokenizer.json` says everything; such a folder is read here. Any other is left to
transformers, which changes some tokenizers while it loads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

#: The files of a tokenizer. transformers reads the last two only if the settings have no `added_tokens_decoder`.
_TOKENIZER, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NAMED_TOKENS, _ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"

#: The named tokens in transformers' order.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

#: Settings that change nothing in the tokenizer. One that is not known here leaves the folder to transformers.
_HARMLESS = {
    *("added_tokens_decoder", "backend", "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens"),
    *("is_local", "local_files_only", "model_input_names", "model_max_length", "padding_side", "tokenizer_class"),
    *("truncation_side", *_NAMES),
    # What classes of single models left in the settings. The general class stores it, and does nothing with it.
    *("errors", "legacy", "sp_model_kwargs", "spaces_between_special_tokens", "use_default_system_prompt"),
}

#: What transformers writes as `model_max_length` if there is no limit.
_NO_LIMIT = int(1e30)


class SavedTokenizer:
    """A saved tokenizer, with the attributes of transformers' class that ismdata uses.

    Attributes:
        backend_tokenizer: The tokenizer itself.
        special_tokens_map: The named tokens (`bos_token` and so on) that it has.
        chat_template: The Jinja source; None if there is none.

    Args:
        backend: The tokenizer itself.
        settings: The content of `tokenizer_config.json`.
        chat_template: The Jinja source; None if there is none.
    """

    is_fast = True

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any], chat_template: str | None) -> None:
        self.backend_tokenizer = backend
        self.special_tokens_map = {name: settings[name] for name in _NAMES if settings.get(name) is not None}
        self.chat_template: Any = chat_template
        self._settings = settings

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
        """The ids of texts, control tokens parsed."""
        encoded = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by their ids."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    @property
    def eos_token_id(self) -> int | None:
        """The id of the named token; None if there is none."""
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the named token; None if there is none."""
        return self._id_of("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of the named token; None if there is none."""
        return self._id_of("unk_token")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of ids; blanks are never changed."""
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = False, **_: Any) -> list[str]:
        """The texts of lists of ids; blanks are never changed."""
        return self.backend_tokenizer.decode_batch([list(each) for each in ids], skip_special_tokens)

    def save_pretrained(self, save_directory: str) -> None:
        """Write the files that transformers writes."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = {
            "backend": "tokenizers",
            "model_max_length": _NO_LIMIT,
            **self._settings,
            "is_local": True,
            "local_files_only": False,
            "tokenizer_class": "TokenizersBackend",
        }
        for name in ("added_tokens_decoder", "chat_template"):
            written.pop(name, None)
        if self.chat_template is not None:
            (folder / _TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        text = json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / _SETTINGS).write_text(text + "\n", encoding="utf-8")
        self.backend_tokenizer.save(str(folder / _TOKENIZER))


def read_saved(folder: Path) -> SavedTokenizer | None:
    """Read a folder with a saved tokenizer.

    Args:
        folder: The folder.

    Returns:
        The tokenizer; None if transformers must load it, or there is none.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not JSON.
        Exception: If `tokenizers` cannot read `tokenizer.json`.
    """
    from tokenizers import Tokenizer

    settings = _settings_of(folder)
    if settings is None:
        return None
    backend = Tokenizer.from_file(str(folder / _TOKENIZER))
    if backend.truncation is not None or backend.padding is not None:
        return None
    if backend.post_processor is None:
        # transformers sets one that adds nothing. The hash of the tokenizer contains it.
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if not all(name in added and added[name].special for name in map(settings.get, _NAMES) if name is not None):
        return None
    if not all(token in added for token in settings.get("extra_special_tokens") or ()):
        return None
    listed = settings.get("added_tokens_decoder")
    if listed is not None and listed != _as_settings(backend):
        return None
    template = folder / _TEMPLATE
    source = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    return SavedTokenizer(backend, settings, source)


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder that `tokenizers` alone can read; None for any other."""
    if not (folder / _SETTINGS).is_file() or not (folder / _TOKENIZER).is_file():
        return None
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not settings.keys() <= _HARMLESS:
        return None
    if settings.get("tokenizer_class") not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return None
    if not isinstance(settings.get("extra_special_tokens") or [], list):
        return None
    if not all(isinstance(settings.get(name), str | None) for name in (*_NAMES, "chat_template")):
        return None
    if not all(isinstance(token, str) for token in settings.get("extra_special_tokens") or ()):
        return None
    # The configuration of a model may demand another class. Other vocabularies and templates have a precedence.
    unread = {_NAMED_TOKENS, _ADDED_TOKENS} if "added_tokens_decoder" in settings else set()
    others = {path.name for path in folder.iterdir()} - {_TOKENIZER, _SETTINGS, _TEMPLATE, *unread}
    if any(
        name.startswith(("config.json", "chat_template", "additional_chat", "special_tokens_map")) for name in others
    ):
        return None
    return (
        None
        if any(name.startswith(("added_tokens", "tokenizer", "tiktoken", "tekken")) for name in others)
        else settings
    )


def _as_settings(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """The added tokens as `added_tokens_decoder` lists them."""
    return {str(id): token.__getstate__() for id, token in backend.get_added_tokens_decoder().items()}
