"""The key-value cache that generation uses: one that keeps the keys of all tokens in every layer.

The intervals carry the sliding windows (`attention/backends/base.py`), so no layer needs a cache that evicts by
itself. transformers' sliding cache keeps the last `window - 1` keys: after an undo the keys before them are missing,
and in models whose attention does not apply the window of their config (Moshi, PhiMoE) they are missing at once.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import DynamicCache, PreTrainedModel

from ismdata.errors import UnsupportedModelError

#: Kinds of cache layers, by class: those that keep every key, those that have none, and those that are replaced.
_WHOLE = "DynamicLayer"
_WITHOUT_KEYS = "DummyLayer"  # layers without attention, or with the keys of another layer
_SLIDING = "DynamicSlidingWindowLayer"


def whole_cache(model: PreTrainedModel) -> DynamicCache:
    """Make an empty cache that keeps the keys and values of all tokens in every layer.

    Args:
        model: Any decoder.

    Returns:
        The cache.

    Raises:
        UnsupportedModelError: If a layer remembers more than keys and values (a state, an index of keys), which could
            be neither cropped nor evicted.
    """
    cache = DynamicCache(config=model.config)
    layers: list[Any] = cast(Any, cache).layers
    for place, layer in enumerate(layers):
        kind = type(layer).__name__
        if kind == _SLIDING:
            layers[place] = cast(Any, DynamicCache()).layer_class_to_replicate()
        elif kind not in (_WHOLE, _WITHOUT_KEYS):
            raise UnsupportedModelError(
                f"{type(model).__name__}: the cache of layer {place} is a {kind}, which holds more than keys and "
                "values, so a conversation could not be undone or shortened. Use another model"
            )
    return cache
