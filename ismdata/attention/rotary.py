"""Rotary angles that depend on the longest document of a batch.

transformers chooses the angles of LongRoPE and of dynamic NTK scaling by the largest position in a batch. Beyond the
positions that the model was first trained on, a document's neighbours would change its angles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ismdata.errors import UsageError

_KINDS = {"longrope": "LongRoPE", "dynamic": "dynamic NTK scaling"}


def check_rotary(config: PreTrainedConfig, doc_start: Tensor, kv_end: Tensor) -> None:
    """Refuse a batch in which documents share angles that one of them alone would not have.

    It waits for the device only where a model has such angles and a row is longer than they are steady.

    Args:
        config: The model's.
        doc_start: The intervals of whole rows, int[B, T].
        kv_end: Likewise.

    Raises:
        UsageError: if there is more than one document, and one of them is so long.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    for each in (parameters, *(inner for inner in parameters.values() if isinstance(inner, dict))):
        kind = each.get("rope_type")
        if kind not in _KINDS:
            continue
        steady = each.get("original_max_position_embeddings") or text.max_position_embeddings
        if kv_end.shape[-1] <= steady:
            continue
        longest = int((kv_end - doc_start).max())
        row = torch.arange(doc_start.shape[-1], device=doc_start.device)
        documents = int((doc_start == row - 1).sum())  # each has one second row
        if longest > steady and documents > 1:
            raise UsageError(
                f"the batch has {documents} documents, the longest of {longest} tokens. This model's rotary angles "
                f"({_KINDS[kind]}) depend on the longest one above {steady}: shorter documents would be computed in "
                f"another way than alone. Pack with --seq-len {steady} or less, or one document per batch"
            )
