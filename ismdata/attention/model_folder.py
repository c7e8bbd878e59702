"""Loading a model with its mask attached: one that `ismdata train` saved, or any other with the mask named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.models.loading import pretrained
from ismdata.attention.models.presets import PRESETS
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError


def load(
    folder: str | Path,
    *,
    backend: str = "auto",
    mask: str | None = None,
    reporter: Reporter = LOGGED,
    **options: Any,
) -> PreTrainedModel:
    """Load a model that `ismdata train` saved, with its mask attached; or, given a mask, any causal language model.

    Args:
        folder: The model folder, a folder of peft's adapters, a GGUF file or a hub name.
        backend: The attention backend, as for `attach`.
        mask: Overrides the recorded mask.
        reporter: Receives the progress of loading, and a line that names the backend.
        options: Passed to `from_pretrained` (dtype, …).

    Returns:
        The attached model.

    Raises:
        DataError: if there is no loadable model, or it records an unknown mask.
        UsageError: if no mask is recorded and none is given.
        UnsupportedModelError: if the mask cannot work inside the model.

    Example:
        model = load("model", dtype=torch.bfloat16)
    """
    name = str(folder)
    if name in PRESETS and not Path(name).exists():
        raise UsageError(
            f"{name}: is a preset, which has no weights. Train it first: ismdata train PACKED --model {name} -o model"
        )
    model = pretrained(name, reporter=reporter, **{"dtype": "auto"} | options)
    recorded = getattr(model.config, "ismdata_mask", None)
    if mask is None and recorded is not None and recorded not in masks.MASKS:
        raise DataError(
            f"{name}/config.json: ismdata_mask is {recorded!r}; expected one of {', '.join(masks.MASKS)}. Name "
            "the mask that the model was trained under with --mask"
        )
    mask = mask or recorded
    if mask is None:
        raise UsageError(
            f"{name}: its config records no ismdata_mask, so the mask that the model was trained under is unknown. "
            "Pass it with --mask; a model that was not trained with ismdata takes --mask causal"
        )
    return attach(model, backend, mask, reporter=reporter)
