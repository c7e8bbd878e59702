"""A tokenizer that encodes plain text only; control tokens are inserted by id.

transformers' `AutoTokenizer` loads it, so a local folder, a hub name and a GGUF file all work. A copy of the tokenizer
without the control tokens encodes the text, so that no text can become one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ismdata.errors import DataError
from ismdata.rendering.control_tokens import AddedToken, ControlTokens, control_tokens, with_markers
from ismdata.rendering.hub import check_tokenizer_name
from ismdata.rendering.saved_tokenizer import SavedTokenizer, read_saved
from ismdata.rendering.tokenizer_backends import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Ranges of ids in which control tokens are searched for. Each takes two passes over all ids.
_CONTROL_RANGES = 3


def load_pretrained(name: str) -> PreTrainedTokenizerFast | SavedTokenizer:
    """Load a tokenizer.

    Args:
        name: A local folder, a GGUF file or a hub name.

    Returns:
        A fast tokenizer of transformers, or one that `tokenizers` alone could read.

    Raises:
        DataError: If there is none, or it cannot be loaded.
    """
    path = Path(name)
    try:
        if (saved := read_saved(path)) is not None:
            return saved
        if path.suffix == ".gguf":
            if not path.is_file():
                raise DataError(f"{name}: no such file; expected a GGUF file with its own tokenizer")
            loaded = _auto(str(path.parent), gguf_file=path.name)
        elif path.is_file():
            raise DataError(f"{name}: is a file; expected a folder with tokenizer.json, a .gguf file or a hub name")
        elif not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
            raise DataError(f"{name}: no such folder; expected a saved tokenizer, a .gguf file or a hub name")
        elif path.is_dir() and not (path / "tokenizer.json").is_file() and not any(path.glob("tokenizer*")):
            raise DataError(
                f"{name}: a folder without tokenizer.json; expected a saved tokenizer, such as a model folder, or the "
                "folder `tokenizer` inside a packed one"
            )
        else:
            local = check_tokenizer_name(name)
            loaded = _auto(name, local_files_only=local)
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


def _auto(name: str, **options: Any) -> Any:
    """Load a tokenizer with transformers. Importing its class takes a second: torch comes with it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def added_tokens(pretrained: PreTrainedTokenizerFast | SavedTokenizer) -> list[AddedToken]:
    """The added tokens of a tokenizer, with their flags."""
    return [
        AddedToken(text=token.content, id=id, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip)
        for id, token in pretrained.added_tokens_decoder.items()
    ]


@lru_cache(maxsize=4)
def remove_tokens(backend: bytes, removed: frozenset[str], in_vocabulary: frozenset[str], name: str) -> Reference:
    """Remove added tokens from a serialized tokenizer. All other tokens keep their ids.

    Args:
        backend: The serialized tokenizer.
        removed: The texts of the tokens.
        in_vocabulary: Those of them that are in the model's vocabulary too.
        name: What errors call the tokenizer.

    Returns:
        The tokenizers for text that begins a document and for text inside one.

    Raises:
        DataError: If other tokens cannot keep their ids.
    """
    from tokenizers import Tokenizer as Backend

    description, model = _rules_and_model(backend)
    kept = []
    for token in description["added_tokens"]:
        if token["content"] in removed:
            if token["content"] in in_vocabulary:
                continue
            # The ids of added tokens follow their order, so the token stays, under a name that no text contains.
            token = {**token, "content": f"\U0010ffff{token['id']}\U0010ffff", "special": False}
        kept.append(token)
    description["added_tokens"] = kept
    description["truncation"] = description["padding"] = None
    rules = json.dumps(description)
    text = _join(rules, model)
    opening = Backend.from_buffer(text)
    for token in kept:
        found = opening.token_to_id(token["content"])
        if found != token["id"]:
            raise DataError(
                f"{name}: added token {token['content']!r} has id {token['id']}, but {found} without the control "
                "tokens; expected consecutive ids. Save the tokenizer again with its added tokens in order"
            )
    # Tokenizers like SentencePiece put a blank before the first word of a text.
    inner = json.dumps(_without_prepending(description)).replace(
        '"prepend_scheme": "first"', '"prepend_scheme": "never"'
    )
    inner = inner.replace('"prepend_scheme": "always"', '"prepend_scheme": "never"')
    if inner == rules:
        return Reference(opening, opening, text, text)
    inside = _join(inner, model)
    return Reference(opening, Backend.from_buffer(inside), text, inside)


#: What comes before the model in a serialized tokenizer. No text in it looks the same: its quotes would be escaped.
_MODEL = b',"model":'


def _rules_and_model(backend: bytes) -> tuple[dict[str, Any], memoryview]:
    """Split a serialized tokenizer into its rules, parsed, and its model, the last and longest part, as bytes."""
    at = backend.rfind(_MODEL + b"{")
    if at >= 0 and backend.startswith(b"{"):
        end = len(backend.rstrip()) - 1
        return json.loads(backend[:at] + b"}"), memoryview(backend)[at + len(_MODEL) : end]
    description = json.loads(backend)
    model = json.dumps(description.pop("model"), ensure_ascii=False).encode()
    return description, memoryview(model)


def _join(rules: str, model: memoryview) -> bytes:
    """The opposite of `_rules_and_model`."""
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
    """A loaded tokenizer, with the control tokens of one template.

    Attributes:
        controls: The control tokens.
        markers: The same, and the template's markers that are no tokens.
        pad_id: The tokenizer's pad id, or its eos id if it has none.
        unknown_id: The id of the unknown token; None if there is none.
        control_ids: The ids of the control tokens without the unknown token, int32, sorted.

    Args:
        pretrained: The tokenizer.
        name: What errors call it.
        template: The source of the template.

    Raises:
        DataError: If the tokenizer has neither a pad nor an eos token.
    """

    def __init__(self, pretrained: PreTrainedTokenizerFast | SavedTokenizer, *, name: str, template: str) -> None:
        self.pretrained = pretrained
        self.name = name
        self.controls = ControlTokens(control_tokens(added_tokens(pretrained), template))
        self.markers = with_markers(self.controls, template)
        self.vocab_size = len(pretrained)
        self.eos_id: int | None = pretrained.eos_token_id
        pad_id = pretrained.pad_token_id if pretrained.pad_token_id is not None else self.eos_id
        if pad_id is None:
            raise DataError(
                f"{name}: the tokenizer has neither a pad nor an eos token; expected one for padding. "
                "Set tokenizer.pad_token or eos_token and save it again"
            )
        self.pad_id: int = pad_id
        # The unknown token is not counted as a control token: text that the vocabulary lacks becomes it.
        self.unknown_id: int | None = pretrained.unk_token_id
        self.control_ids = np.array(
            sorted({token.id for token in self.controls.tokens.values()} - {self.unknown_id}), np.int32
        )

    def find_controls(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """The indices of control tokens among ids, int64."""
        in_range = np.zeros(len(ids), bool)
        for lowest, highest in self._control_ranges:
            in_range |= (ids >= lowest) & (ids <= highest)
        places = np.flatnonzero(in_range)
        return places[np.isin(ids[places], self.control_ids)]

    @cached_property
    def _control_ranges(self) -> list[tuple[np.int32, np.int32]]:
        """A few ranges of ids that contain all control tokens and few other ids: most are at the vocabulary's ends."""
        if not len(self.control_ids):
            return []
        widest = np.argsort(np.diff(self.control_ids), kind="stable")[-_CONTROL_RANGES + 1 :]
        return [(part[0], part[-1]) for part in np.split(self.control_ids, np.sort(widest) + 1)]

    @cached_property
    def serialized(self) -> bytes:
        """The content of `tokenizer.json`, in one line."""
        return str(self.pretrained.backend_tokenizer.to_str()).encode()

    @cached_property
    def _rules(self) -> dict[str, Any]:
        """The serialized tokenizer without its model."""
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
        """The hash of the tokenizer's vocabulary, rules and named special tokens, wherever it was loaded from."""
        digest = hashlib.sha256(self.serialized)
        digest.update(json.dumps(self.pretrained.special_tokens_map, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def reference(self) -> Reference:
        """The tokenizer without control tokens."""
        removed = frozenset(self.controls.tokens)
        model = self.pretrained.backend_tokenizer.model
        in_vocabulary = frozenset(text for text in removed if model.token_to_id(text) is not None)
        return remove_tokens(self.serialized, removed, in_vocabulary, self.name)

    def save(self, folder: Path) -> None:
        """Save the tokenizer as `save_pretrained` does. No other thread may use it meanwhile.

        The model is taken out meanwhile, and written from its serialized text: serializing 128,000 tokens again takes a
        fifth of a second, with the interpreter lock held.
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
        path.write_bytes(_join(json.dumps(rules, ensure_ascii=False), written))

    def encode(self, texts: Sequence[str], *, opening: bool = False) -> list[list[int]]:
        """The ids of texts, without control tokens. `opening`: they begin documents."""
        backend = self.reference.opening if opening else self.reference.inside
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with control tokens and unchanged blanks."""
        return str(self.pretrained.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The named special tokens (`bos_token` and so on)."""
        return dict(self.pretrained.special_tokens_map)
