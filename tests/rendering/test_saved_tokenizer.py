"""A plain folder is read as transformers reads it; any other is left to transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ismdata.rendering.saved_tokenizer import SavedTokenizer, read_saved
from ismdata.rendering.tokenizer import Tokenizer, load_pretrained
from tests.support.byte_tokenizer import save_tokenizer

TEXTS = ["", " a  b\n", "<|im_start|>user\nHi<|im_end|>", "ü 日本 🙂\u202e", "<|pad|><x> <x>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer", "<x>")


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return found


def change_settings(folder: Path, **changes: Any) -> None:
    settings = {name: value for name, value in (settings_of(folder) | changes).items() if value is not ...}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def change_rules(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text("utf-8"))
    change(rules)
    path.write_text(json.dumps(rules), encoding="utf-8")


def assert_same(folder: Path, scratch: Path) -> None:
    """Read, used and saved, a folder is what transformers makes of it."""
    ours, theirs = read_saved(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert isinstance(ours, SavedTokenizer)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (len(ours), ours.get_vocab()) == (len(theirs), theirs.get_vocab())
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.added_tokens_decoder.keys() == theirs.added_tokens_decoder.keys()
    assert ours.chat_template == theirs.chat_template
    for name in ("eos_token_id", "pad_token_id", "unk_token_id", "is_fast"):
        assert getattr(ours, name) == getattr(theirs, name)
    for add in (False, True):
        assert ours(TEXTS, add_special_tokens=add)["input_ids"] == theirs(TEXTS, add_special_tokens=add)["input_ids"]
    ids = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    assert ours.batch_decode(ids, **options) == theirs.batch_decode(ids, **options)
    assert [ours.decode(each, **options) for each in ids] == theirs.batch_decode(ids, **options)
    hashes = {Tokenizer(each, name="t", template="").sha256 for each in (ours, theirs)}
    assert len(hashes) == 1
    ours.save_pretrained(str(scratch / "ours"))
    theirs.save_pretrained(str(scratch / "theirs"))
    files = [{path.name: path.read_text("utf-8") for path in (scratch / name).iterdir()} for name in ("ours", "theirs")]
    assert files[0] == files[1]


PLAIN: dict[str, Callable[[Path], Any]] = {
    "as saved": lambda folder: None,
    "template in the settings": lambda folder: change_settings(folder, chat_template="{{ 1 }}"),
    "template in a file": lambda folder: (folder / "chat_template.jinja").write_text("{{ 2 }}\r\n", "utf-8"),
    "both": lambda folder: (
        change_settings(folder, chat_template="{{ 1 }}"),
        (folder / "chat_template.jinja").write_text("{{ 2 }}", "utf-8"),
    ),
    "no limit": lambda folder: change_settings(folder, model_max_length=...),
    "a limit, the other side": lambda folder: change_settings(folder, model_max_length=77, padding_side="left"),
    "what other classes left": lambda folder: change_settings(
        folder,
        errors="replace",
        legacy=True,
        sp_model_kwargs={},
        spaces_between_special_tokens=False,
        use_default_system_prompt=False,
        unk_token=None,
    ),
    "no named tokens but one": lambda folder: change_settings(folder, pad_token=...),
    "saved by version 4": lambda folder: (
        change_settings(
            folder,
            tokenizer_class="PreTrainedTokenizerFast",
            added_tokens_decoder={
                str(token["id"]): {name: value for name, value in token.items() if name != "id"}
                for token in json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
            },
        ),
        (folder / "special_tokens_map.json").write_text('{"eos_token": "<x>"}', "utf-8"),
    ),
    "a normalizer": lambda folder: change_rules(folder, lambda rules: rules.update(normalizer={"type": "NFC"})),
    "a post-processor": lambda folder: change_rules(
        folder,
        lambda rules: rules.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<x>": {"id": "<x>", "ids": [_id_of(rules, "<x>")], "tokens": ["<x>"]}},
            }
        ),
    ),
    "a token that is not special": lambda folder: change_rules(
        folder, lambda rules: _flag(rules, "<x>", special=False)
    ),
    "a token that takes blanks": lambda folder: change_rules(folder, lambda rules: _flag(rules, "<x>", lstrip=True)),
}


def _id_of(rules: dict[str, Any], text: str) -> int:
    return next(int(token["id"]) for token in rules["added_tokens"] if token["content"] == text)


def _flag(rules: dict[str, Any], text: str, **flags: bool) -> None:
    next(token for token in rules["added_tokens"] if token["content"] == text).update(flags)


@pytest.mark.parametrize("case", PLAIN)
def test_a_plain_folder_is_what_transformers_makes_of_it(case: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    PLAIN[case](tmp_path / "folder")
    assert_same(tmp_path / "folder", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "deepseek"])
def test_real_tokenizers_too(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert_same(request.getfixturevalue(name), tmp_path)


OTHER: dict[str, Callable[[Path], Any]] = {
    "another class": lambda folder: change_settings(folder, tokenizer_class="GPT2Tokenizer"),
    "no class": lambda folder: change_settings(folder, tokenizer_class=...),
    "code": lambda folder: change_settings(folder, auto_map={"AutoTokenizer": ["a.B", None]}),
    "an unknown setting": lambda folder: change_settings(folder, split_special_tokens=True),
    "a named token that is missing": lambda folder: change_settings(folder, unk_token="<unk>"),
    "a named token that is not special": lambda folder: change_rules(
        folder, lambda rules: _flag(rules, "<|im_end|>", special=False)
    ),
    "a token with flags": lambda folder: change_settings(folder, eos_token={"content": "<|im_end|>", "lstrip": True}),
    "another extra token": lambda folder: change_settings(folder, extra_special_tokens=["<y>"]),
    "named extra tokens": lambda folder: change_settings(folder, extra_special_tokens={"image_token": "<x>"}),
    "flags that differ": lambda folder: change_settings(folder, added_tokens_decoder={"256": {"content": "<y>"}}),
    "truncation": lambda folder: change_rules(
        folder,
        lambda rules: rules.update(
            truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        ),
    ),
    "several templates": lambda folder: (folder / "additional_chat_templates").mkdir(),
    "a model": lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}', "utf-8"),
    "named tokens elsewhere": lambda folder: (folder / "special_tokens_map.json").write_text("{}", "utf-8"),
    "added tokens elsewhere": lambda folder: (folder / "added_tokens.json").write_text("{}", "utf-8"),
    "another vocabulary": lambda folder: (folder / "tokenizer.model").write_bytes(b""),
    "no settings": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]", "utf-8"),
}


@pytest.mark.parametrize("case", OTHER)
def test_any_other_folder_is_left_to_transformers(case: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "folder")
    OTHER[case](tmp_path / "folder")
    assert read_saved(tmp_path / "folder") is None


def test_what_is_no_folder_is_left_to_transformers(tmp_path: Path) -> None:
    assert read_saved(tmp_path / "nothing") is None
    (tmp_path / "file").touch()
    assert read_saved(tmp_path / "file") is None


def test_a_plain_folder_is_loaded_without_transformers(folder: Path) -> None:
    assert isinstance(load_pretrained(str(folder)), SavedTokenizer)
