"""Names on the Hugging Face hub: asked for once, briefly, so that a typo is no minute of waiting."""

from __future__ import annotations

import functools
from pathlib import Path

from ismdata.choices import Preset, words
from ismdata.errors import DataError
from ismdata.suggestions import did_you_mean

#: Seconds to wait for an answer of the hub.
_SECONDS = 5

#: Files of which a model or a tokenizer in the cache has at least one.
_CACHED = ("config.json", "tokenizer_config.json", "tokenizer.json")


_EXPECTED_TOKENIZER = "a folder with tokenizer.json, a .gguf file or a hub name"
_EXPECTED_MODEL = "a model folder, a .gguf file or a hub name"


def check_model_name(name: str, *, presets: bool = True) -> bool:
    """Check that a model that is neither a preset nor a path here is one that the hub, or its cache, has.

    Args:
        name: A preset, a model folder, a GGUF file or a hub name.
        presets: Whether a preset is possible.

    Returns:
        Whether only what was downloaded before can be used: pass it on as `local_files_only`.

    Raises:
        DataError: If it is none of these.
    """
    known = words(Preset)
    if name in known:
        return False
    if presets:
        return _is_cached_only(name, f"a preset ({', '.join(known)}), {_EXPECTED_MODEL}", known)
    return _is_cached_only(name, _EXPECTED_MODEL, ())


def check_tokenizer_name(name: str) -> bool:
    """Check that a tokenizer that is no path here is one that the hub, or its cache, has.

    Args:
        name: A folder, a GGUF file or a hub name.

    Returns:
        Whether only what was downloaded before can be used: pass it on as `local_files_only`.

    Raises:
        DataError: If it is none of these.
    """
    return _is_cached_only(name, _EXPECTED_TOKENIZER, ())


def _is_cached_only(name: str, expected: str, known: tuple[str, ...]) -> bool:
    """Whether a name on the hub can only be had from the cache. Raises DataError if it cannot be had at all.

    transformers asks for each file up to six times, with pauses, until it gives up: 50 seconds without a network.
    """
    path = Path(name)
    if path.exists():
        return False
    found, why = _ask_hub(name)
    if found is not None:
        return found
    beside = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(
        f"{name}: no such file or folder, {why}; expected {expected}.{did_you_mean(name, [*known, *beside])}"
    )


@functools.cache
def _ask_hub(name: str) -> tuple[bool | None, str]:
    """Whether a model of the hub can only be had from the cache, None if not at all; then why."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        cached = any(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in _CACHED)
        huggingface_hub.HfApi().model_info(name, timeout=_SECONDS)
    except errors.HFValidationError:
        return None, "and no name that the hub can have"
    except errors.RepositoryNotFoundError:
        return None, "and the hub shows no such model (if it is private, log in first: `hf auth login`)"
    except errors.HfHubHTTPError:
        return False, ""  # the hub answers; what else is wrong, transformers says
    except Exception as error:  # the network: each version of the library has its own exceptions
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).partition("\n")[0]
        return (True, "") if cached else (None, f"and the hub cannot be asked ({offline}) nor was it downloaded before")
    return False, ""
