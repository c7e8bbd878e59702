"""Load a model that ismdata train saved, with its mask attached; refuse pickled weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.models.loading import refuse_pickles
from ismdata.errors import DataError, UsageError


def load(folder: str | Path, *, backend: str = "auto", mask: str | None = None, **options: Any) -> PreTrainedModel:
    """A model that `ismdata train` saved, with its mask attached. `options` go to `from_pretrained` (dtype, …).

    `mask` overrides the recorded one. Raises DataError when the folder holds no loadable model, and UsageError when no
    mask is recorded and none is given.
    """
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; expected a folder that `ismdata train` wrote")
    refuse_pickles(Path(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **options)
    except Exception as error:  # broken files make the libraries raise anything, from KeyError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not a loadable model ({first}). Train it again, or name another folder") from error
    recorded = getattr(model.config, "ismdata_mask", None)
    if mask is None and recorded is not None and recorded not in masks.MASKS:
        raise DataError(
            f"{folder}/config.json: ismdata_mask is {recorded!r}; expected one of {', '.join(masks.MASKS)}. Name "
            "the one it was trained under: --mask"
        )
    mask = mask or recorded
    if mask is None:
        raise UsageError(
            f"{folder}: config.json records no ismdata_mask, so it is unknown under which mask the model was trained. "
            "Name one: --mask causal for a model that was not trained with ismdata"
        )
    return attach(model, backend, mask)
