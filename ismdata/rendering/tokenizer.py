"""A tokenizer as the road needs it: plain text to ids, control tokens apart.

Loading is transformers' `AutoTokenizer`, so a local folder, a hub name and a GGUF file all work. Encoding happens on a
copy of the tokenizer from which the control tokens are taken out, so that no text can become one; the template's own
control tokens are put in by id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ismdata.errors import DataError
from ismdata.rendering.control_tokens import AddedToken, ControlTokens, control_tokens, with_markers
from ismdata.rendering.tokenizer_backends import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Ranges of ids in which control tokens are looked for: two passes over all ids for each.
_CONTROL_RANGES = 3


def load_pretrained(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer at `name`: a local folder, a GGUF file or a hub name. Raises DataError with what to do."""
    path = Path(name)
    try:
        if _is_plain_folder(path):
            # What AutoTokenizer comes to as well, but it imports torch on the way.
            from transformers import PreTrainedTokenizerFast

            return cast("PreTrainedTokenizerFast", PreTrainedTokenizerFast.from_pretrained(name))
        from transformers import AutoTokenizer

        if path.suffix == ".gguf":
            if not path.is_file():
                raise DataError(f"{name}: no such file; expected a GGUF file with its own tokenizer")
            loaded = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        elif path.is_file():
            raise DataError(f"{name}: is a file; expected a folder with tokenizer.json, a .gguf file or a hub name")
        elif not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
            raise DataError(f"{name}: no such folder; expected a saved tokenizer, a .gguf file or a hub name")
        elif path.is_dir() and not (path / "tokenizer.json").is_file() and not any(path.glob("tokenizer*")):
            raise DataError(f"{name}: a folder without tokenizer.json; expected a saved tokenizer")
        else:
            loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        raise DataError(f"{name}: cannot be loaded without another package ({error}). Try: pip install gguf") from error
    except DataError:
        raise
    except Exception as error:  # broken files make the libraries raise anything, bare Exceptions too
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: no tokenizer could be loaded ({first}). "
            "Expected a local folder with tokenizer.json, a .gguf file, or a hub name that this machine can reach"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise DataError(f"{name}: a slow tokenizer ({type(loaded).__name__}); expected one with a tokenizer.json")
    return cast("PreTrainedTokenizerFast", loaded)


def _is_plain_folder(path: Path) -> bool:
    """Whether a folder holds a saved tokenizer that is of no model's own class, and no model, which could demand one.

    Raises OSError, ValueError for files that cannot be read.
    """
    settings = path / "tokenizer_config.json"
    if not settings.is_file() or not (path / "tokenizer.json").is_file() or (path / "config.json").exists():
        return False
    found = json.loads(settings.read_text(encoding="utf-8"))
    return (
        isinstance(found, dict)
        and found.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        and "auto_map" not in found
    )


def added_tokens(pretrained: PreTrainedTokenizerFast) -> list[AddedToken]:
    """The added tokens of a tokenizer with the flags that matter here."""
    return [
        AddedToken(text=token.content, id=id, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip)
        for id, token in pretrained.added_tokens_decoder.items()
    ]


@lru_cache(maxsize=4)
def without_tokens(backend: bytes, removed: frozenset[str], in_vocabulary: frozenset[str], name: str) -> Reference:
    """A serialised tokenizer less some added tokens, twice: for text that opens a document, and for text inside one.

    in_vocabulary: those of them that are in the model's own vocabulary too. All other tokens keep their ids.
    Raises DataError where they cannot.
    """
    from tokenizers import Tokenizer as Backend

    description, model = _rules_and_model(backend)
    kept = []
    for token in description["added_tokens"]:
        if token["content"] in removed:
            if token["content"] in in_vocabulary:
                continue
            # Ids of added tokens follow their order: a token that holds one must stay, under a name no text has.
            token = {**token, "content": f"\U0010ffff{token['id']}\U0010ffff", "special": False}
        kept.append(token)
    description["added_tokens"] = kept
    description["truncation"] = description["padding"] = None
    rules = json.dumps(description)
    text = _joined(rules, model)
    opening = Backend.from_buffer(text)
    for token in kept:
        found = opening.token_to_id(token["content"])
        if found != token["id"]:
            raise DataError(
                f"{name}: added token {token['content']!r} has id {token['id']}, but {found} without the control "
                "tokens; expected consecutive ids. Save the tokenizer again with its added tokens in order"
            )
    # Sentencepiece-like tokenizers put a blank before the first word of a text.
    inner = json.dumps(_without_prepending(description)).replace(
        '"prepend_scheme": "first"', '"prepend_scheme": "never"'
    )
    inner = inner.replace('"prepend_scheme": "always"', '"prepend_scheme": "never"')
    if inner == rules:
        return Reference(opening, opening, text, text)
    inside = _joined(inner, model)
    return Reference(opening, Backend.from_buffer(inside), text, inside)


#: What stands before the model in a serialised tokenizer: no text in it can look so, its quotes would be escaped.
_MODEL = b',"model":'


def _rules_and_model(backend: bytes) -> tuple[dict[str, Any], memoryview]:
    """A serialised tokenizer as its rules, read, and its model, the last and by far the longest part, as it is."""
    at = backend.rfind(_MODEL + b"{")
    if at >= 0 and backend.startswith(b"{"):
        end = len(backend.rstrip()) - 1
        return json.loads(backend[:at] + b"}"), memoryview(backend)[at + len(_MODEL) : end]
    description = json.loads(backend)
    model = json.dumps(description.pop("model"), ensure_ascii=False).encode()
    return description, memoryview(model)


def _joined(rules: str, model: memoryview) -> bytes:
    return b"".join((rules[:-1].encode(), _MODEL, model, b"}"))


def _without_prepending(description: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's description without a `Prepend` normalizer."""
    normalizer = description.get("normalizer")
    if normalizer and normalizer["type"] == "Prepend":
        return {**description, "normalizer": None}
    if normalizer and normalizer["type"] == "Sequence":
        kept = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
        if len(kept) < len(normalizer["normalizers"]):
            return {**description, "normalizer": {**normalizer, "normalizers": kept}}
    return description


class Tokenizer:
    """A loaded tokenizer under one template's control tokens.

    `pad_id` is the tokenizer's pad id, else its eos id. Raises DataError when it has neither.
    """

    def __init__(self, pretrained: PreTrainedTokenizerFast, *, name: str, template: str) -> None:
        self.pretrained = pretrained
        self.name = name
        self.controls = ControlTokens(control_tokens(added_tokens(pretrained), template))
        self.markers = with_markers(self.controls, template)
        self.vocab_size = len(pretrained)
        self.eos_id: int | None = pretrained.eos_token_id
        pad_id = pretrained.pad_token_id if pretrained.pad_token_id is not None else self.eos_id
        if pad_id is None:
            raise DataError(
                f"{name}: the tokenizer has neither a pad nor an eos token; expected one to fill sequences with. "
                "Set tokenizer.pad_token or eos_token and save it again"
            )
        self.pad_id: int = pad_id
        # The unknown token is no sign of a stray control token: text that the vocabulary lacks becomes it.
        self.unknown_id: int | None = pretrained.unk_token_id
        self.control_ids = np.array(
            sorted({token.id for token in self.controls.tokens.values()} - {self.unknown_id}), np.int32
        )

    def find_controls(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """The places of control tokens among ids."""
        near = np.zeros(len(ids), bool)
        for lowest, highest in self._control_ranges:
            near |= (ids >= lowest) & (ids <= highest)
        places = np.flatnonzero(near)
        return places[np.isin(ids[places], self.control_ids)]

    @cached_property
    def _control_ranges(self) -> list[tuple[np.int32, np.int32]]:
        """A few ranges of ids that all control tokens are in, and few others: most often they lie together at the ends
        of the vocabulary.
        """
        if not len(self.control_ids):
            return []
        widest = np.argsort(np.diff(self.control_ids), kind="stable")[-_CONTROL_RANGES + 1 :]
        return [(part[0], part[-1]) for part in np.split(self.control_ids, np.sort(widest) + 1)]

    @cached_property
    def serialized(self) -> bytes:
        """The tokenizer as `tokenizer.json` holds it, in one line."""
        return str(self.pretrained.backend_tokenizer.to_str()).encode()

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """All of it but the model."""
        return _rules_and_model(self.serialized)[0]

    @cached_property
    def prepends(self) -> bool:
        """Whether the tokenizer puts a blank before some texts."""
        first = '"prepend_scheme": "first"' in json.dumps(self._rules.get("pre_tokenizer"))
        return first or self.prepends_after_controls

    @cached_property
    def prepends_after_controls(self) -> bool:
        """Whether the tokenizer puts a blank before text that follows a control token, not only before a whole text."""
        always = '"prepend_scheme": "always"' in json.dumps(self._rules.get("pre_tokenizer"))
        return always or _without_prepending(self._rules) is not self._rules

    @cached_property
    def sha256(self) -> str:
        """Of the tokenizer itself: its vocabulary, rules and named special tokens, wherever it was loaded from."""
        digest = hashlib.sha256(self.serialized)
        digest.update(json.dumps(self.pretrained.special_tokens_map, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def reference(self) -> Reference:
        """The tokenizer without control tokens: for text that opens a document, and for text inside one."""
        removed = frozenset(self.controls.tokens)
        model = self.pretrained.backend_tokenizer.model
        in_vocabulary = frozenset(text for text in removed if model.token_to_id(text) is not None)
        return without_tokens(self.serialized, removed, in_vocabulary, self.name)

    def save(self, folder: Path) -> None:
        """What `save_pretrained` writes. Nobody else may use the tokenizer meanwhile.

        The model, by far the most of it, is taken out and put in as the text that is there already: to write it anew
        takes a fifth of a second for 128,000 tokens, under Python's lock.
        """
        from tokenizers.models import BPE

        backend = self.pretrained.backend_tokenizer
        _, written = _rules_and_model(self.serialized)
        model = backend.model
        backend.model = BPE()
        try:
            self.pretrained.save_pretrained(str(folder))
        finally:
            backend.model = model
        path = folder / "tokenizer.json"
        rules, _ = _rules_and_model(path.read_bytes())
        path.write_bytes(_joined(json.dumps(rules, ensure_ascii=False), written))

    def encode(self, texts: Sequence[str], *, opening: bool = False) -> list[list[int]]:
        """Ids of each text as plain text: no control token comes of it. `opening`: a blank may be put before it."""
        backend = self.reference.opening if opening else self.reference.inside
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(
        self, texts: pa.LargeStringArray, *, opening: bool = False
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All ids end to end, int32, and how many each text has, int64[len(texts)]."""
        return self.reference.encode(texts, opening=opening)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens included, blanks kept as they are."""
        return str(self.pretrained.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def special_tokens(self) -> dict[str, Any]:
        return dict(self.pretrained.special_tokens_map)
