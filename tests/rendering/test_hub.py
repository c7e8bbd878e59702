"""Names on the hub: asked for once, and what was downloaded is used where there is no network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from ismdata.attention.models.presets import PRESETS
from ismdata.choices import Preset, words
from ismdata.errors import DataError
from ismdata.rendering import check_model_name, check_tokenizer_name, hub


class Hub:
    """Answers as the hub does, or does not answer; counts how often it is asked."""

    def __init__(self, answer: Exception | None, cached: tuple[str, ...] = ()) -> None:
        self.answer, self.cached, self.asked = answer, cached, 0

    def model_info(self, name: str, timeout: float) -> SimpleNamespace:
        huggingface_hub.utils.validate_repo_id(name)
        assert timeout <= 5
        self.asked += 1
        if self.answer is not None:
            raise self.answer
        return SimpleNamespace(id=name)

    def try_to_load_from_cache(self, name: str, file: str) -> str | None:
        huggingface_hub.utils.validate_repo_id(name)
        return f"/cache/{name}/{file}" if file in self.cached else None


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def use(answer: Exception | None, cached: tuple[str, ...] = ()) -> Hub:
        found = Hub(answer, cached)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found.try_to_load_from_cache)
        return found

    monkeypatch.chdir(tmp_path)
    hub._ask_hub.cache_clear()
    yield use
    hub._ask_hub.cache_clear()


UNREACHABLE = ConnectionError("no route\nto host")


def not_found() -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return errors.RepositoryNotFoundError("404", response=response)  # type: ignore[arg-type]


def test_the_presets_are_those_of_the_models() -> None:
    assert words(Preset) == tuple(PRESETS)


def test_presets_and_paths_ask_nobody(use, tmp_path: Path) -> None:
    asked = use(UNREACHABLE)
    (tmp_path / "here").mkdir()
    assert not any(map(check_model_name, [*PRESETS, "here", str(tmp_path)]))
    assert not check_tokenizer_name("here")
    assert asked.asked == 0


def test_a_name_on_the_hub_is_asked_for_once(use) -> None:
    asked = use(None)
    assert not check_model_name("org/model")
    assert not check_tokenizer_name("org/model")
    assert asked.asked == 1


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_was_downloaded_is_used_without_a_network(use, file: str) -> None:
    use(UNREACHABLE, (file,))
    assert check_model_name("org/model")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tinny", ["hub cannot be asked (no route)", "preset (tiny, small, base", "Did you mean 'tiny'?"]),
        ("smalll", ["Did you mean 'small'?"]),
        ("mmodel", ["Did you mean 'model'?"]),
        ("org/name", ["nor was it downloaded before"]),
        ("a/b/c", ["no name that the hub can have"]),
        ("./model2", ["no name that the hub can have", "Did you mean 'model'?"]),
        ("x[/b] \x1b", ["no name that the hub can have"]),
    ],
)
def test_a_typo_is_said_with_what_was_meant(use, tmp_path: Path, name: str, parts: list[str]) -> None:
    use(UNREACHABLE)
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError) as raised:
        check_model_name(name)
    assert str(raised.value).startswith(f"{name}: no such file or folder, ")
    for part in parts:
        assert part in str(raised.value)


def test_a_name_that_the_hub_lacks(use) -> None:
    use(not_found())
    with pytest.raises(DataError, match=r"hub shows no such model \(if it is private, log in first: `hf auth login`\)"):
        check_tokenizer_name("org/nname")


def test_without_presets_none_is_suggested(use) -> None:
    use(UNREACHABLE)
    with pytest.raises(DataError) as raised:
        check_model_name("tinny", presets=False)
    assert "tiny," not in str(raised.value)
