"""Which keys and values stay when a cache is full, and how those that stay move together.

The first tokens (attention sinks, which every later token leans on) and the most recent ones always stay; the policies
differ in what they keep of the middle:

- `sirllm`: the tokens of the highest entropy, -log p of the token when it came (Yao et al., SirLLM, 2024)
- `streaming`: none but the most recent (Xiao et al., StreamingLLM, 2024)
- `random`, `interval`: as many by chance, or evenly spaced: what the other two must beat

What stays is a cache of its own, so its positions count anew from 0 and its keys are turned to them (`KeyRotation`).

Shape legend: B rows, H heads, D width of a head, K entries of the cache, n entries that stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ismdata.errors import UnsupportedModelError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Tokens at the beginning that never leave.
SINKS = 4

#: Kinds of rotary positions whose angles do not depend on how long the sequence is.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


def _highest(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    """Of equal entropies the later token stays."""
    return np.argsort(entropies, kind="stable")[len(entropies) - count :]


def _latest(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    return np.arange(len(entropies) - count, len(entropies))


def _by_chance(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    chosen: IntArray = generator.choice(len(entropies), count, replace=False)
    return chosen


def _evenly(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    return np.arange(count) * len(entropies) // max(count, 1)


#: What stays of the middle: (its entropies, how many stay, random numbers) -> indices, in any order.
POLICIES: dict[str, Callable[[FloatArray, int, np.random.Generator], IntArray]] = {
    "sirllm": _highest,
    "streaming": _latest,
    "random": _by_chance,
    "interval": _evenly,
}


def kept(
    policy: str, entropies: FloatArray, count: int, *, recent: int, generator: np.random.Generator, sinks: int = SINKS
) -> IntArray:
    """The entries that stay, int64[count], ascending: `sinks`, the last `recent`, and what `policy` takes of the rest.

    entropies: float64[K], one of each cached token. Where `recent` are too many, the latest of them stay.

    >>> kept("sirllm", np.array([0, 0, 5, 1, 7, 2, 0, 0.0]), 5, recent=2, sinks=1, generator=np.random.default_rng())
    array([0, 2, 4, 6, 7])
    """
    size = len(entropies)
    if count >= size:
        return np.arange(size)
    sinks = min(sinks, count)
    recent = min(recent, count - sinks)
    middle = entropies[sinks : size - recent]
    chosen = sinks + np.sort(POLICIES[policy](middle, count - sinks - recent, generator))
    stay: IntArray = np.concatenate([np.arange(sinks), chosen, np.arange(size - recent, size)])
    return stay


def compact(cache: DynamicCache, indices: IntArray, rotation: KeyRotation) -> None:
    """Keep the entries `indices`, int64[n], ascending, in place, their keys turned to the positions 0 … n - 1."""
    for layer in cast(Any, cache).layers:
        at = torch.from_numpy(indices).to(layer.keys.device)
        layer.keys = rotation.turn(layer.keys.index_select(-2, at), at, torch.arange(len(at), device=at.device))
        layer.values = layer.values.index_select(-2, at)


def crop(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` entries, in place: what it held before the others came."""
    for layer in cast(Any, cache).layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


@dataclass(frozen=True, kw_only=True)
class KeyRotation:
    """Turns the keys of a rotary model from the positions they were computed at to others.

    A rotary key is the plain key turned by an angle for each pair of dimensions, position times frequency, so turning
    it on by the difference of two angles gives what the model would have computed at the other position. The angles
    are taken from the model's own module, its scaling included.
    """

    angles: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> KeyRotation:
        """Of an attached model. Raises UnsupportedModelError, with the reason, where its keys cannot be turned.

        Tried out on the model itself: keys computed at some positions and turned must be those computed at others.
        """
        name = type(model).__name__
        config = model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type")
        angles = getattr(model.get_decoder(), "rotary_emb", None)  # type: ignore[no-untyped-call]
        if not isinstance(angles, nn.Module) or kind is None:
            raise _unsupported(name, "its positions are not one rotary embedding for all layers")
        if kind not in _STATIC_ROTARY:
            raise _unsupported(
                name, f"its rotary positions are of kind {kind!r}, whose angles change with the length of the sequence"
            )
        partial = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        if partial not in (None, 1, 1.0):
            raise _unsupported(name, f"its rotary positions turn a part of each head only ({partial})")
        needed = [
            parameter.name
            for parameter in inspect.signature(angles.forward).parameters.values()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(needed) != 2:
            raise _unsupported(name, f"its rotary embedding asks for {', '.join(needed)}; expected one position each")
        rotation = cls(angles=angles)
        if not rotation._holds_for(model):
            raise _unsupported(name, "its keys, turned to other positions, are not those that it computes there")
        return rotation

    def turn(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """keys: [B, H, n, D], computed at the positions `old`, int64[n]; returned as they would be at `new`, int64[n].

        Computed in float32 at least.
        """
        precise = keys if keys.dtype == torch.float64 else keys.float()
        cos_old, sin_old = self._at(old, precise)
        cos_new, sin_new = self._at(new, precise)
        length = cos_old.square() + sin_old.square()  # 1, or the square of the model's attention scaling
        cos = (cos_new * cos_old + sin_new * sin_old) / length
        sin = (sin_new * cos_old - cos_new * sin_old) / length
        first, second = precise.chunk(2, dim=-1)
        return (precise * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)

    @torch.no_grad()
    def _at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [1, n, D] each."""
        cos, sin = self.angles(like, positions[None])
        return cos, sin

    @torch.no_grad()
    def _holds_for(self, model: PreTrainedModel) -> bool:
        """Whether all tokens moved on by the same distance, which changes nothing else, are turned keys and no more."""
        vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        tokens = torch.arange(1, 9, device=model.device)[None] % vocabulary
        kv_end = torch.arange(1, 9, dtype=torch.int32, device=model.device)[None]

        def layers(positions: Tensor) -> list[Any]:
            cache = DynamicCache(config=model.config)
            model(
                input_ids=tokens,
                position_ids=positions[None],
                doc_start=torch.zeros_like(kv_end),
                kv_end=kv_end,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return list(cast(Any, cache).layers)

        here = torch.arange(8, device=model.device)
        there = here + 19
        tolerance = max(64 * torch.finfo(model.dtype).eps, 1e-4)
        return all(
            left.keys.shape[-1] == self._at(here, left.keys)[0].shape[-1]
            and float((self.turn(left.keys, here, there) - right.keys).abs().max())
            <= tolerance * float(right.keys.abs().max())
            for left, right in zip(layers(here), layers(there), strict=True)
        )


def _unsupported(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: a cache with gaps needs keys that can be turned to other positions, and {reason}. "
        "Use --when-full stop or drop-oldest"
    )
