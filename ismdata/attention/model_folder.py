"""Loading a model that `ismdata train` saved, with its mask attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.models.loading import refuse_pickles
from ismdata.errors import DataError, UsageError


def load(folder: str | Path, *, backend: str = "auto", mask: str | None = None, **options: Any) -> PreTrainedModel:
    """Load a model that `ismdata train` saved, with its mask attached.

    Args:
        folder: The model folder.
        backend: The attention backend, as for `attach`.
        mask: Overrides the recorded mask.
        options: Passed to `from_pretrained` (dtype, …).

    Returns:
        The attached model.

    Raises:
        DataError: if the folder has no loadable model, or records an unknown mask.
        UsageError: if no mask is recorded and none is given.

    Example:
        model = load("model", dtype=torch.bfloat16)
    """
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; expected a folder that `ismdata train` wrote")
    refuse_pickles(Path(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **options)
    except Exception as error:  # for a broken file the libraries raise anything, from KeyError to SafetensorError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not a loadable model ({first}). Train it again, or name another folder") from error
    recorded = getattr(model.config, "ismdata_mask", None)
    if mask is None and recorded is not None and recorded not in masks.MASKS:
        raise DataError(
            f"{folder}/config.json: ismdata_mask is {recorded!r}; expected one of {', '.join(masks.MASKS)}. Name "
            "the mask that the model was trained under with --mask"
        )
    mask = mask or recorded
    if mask is None:
        raise UsageError(
            f"{folder}: config.json records no ismdata_mask, so the mask that the model was trained under is unknown. "
            "Pass it with --mask; a model that was not trained with ismdata takes --mask causal"
        )
    return attach(model, backend, mask)
