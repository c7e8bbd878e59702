"""Choose the entries that a full KV cache keeps, and move their keys to the positions that they get.

The first tokens (attention sinks, which all later tokens attend to) and the most recent tokens always stay. The
policies differ in what they keep of the middle:

- `sirllm`: the tokens of the highest entropy, -log p of the token given its predecessors (Yao et al., SirLLM, 2024)
- `streaming`: only the most recent tokens (Xiao et al., StreamingLLM, 2024)
- `random`, `interval`: as many tokens at random, or evenly spaced: baselines for the other two

After an eviction the remaining entries are renumbered from 0, and their keys are rotated to the new positions
(`KeyRotation`).

Shape legend: B rows, H heads, D head size, K entries of the cache, n entries that stay.
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
from ismdata.generate.whole_cache import whole_cache

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Number of tokens at the beginning that are never evicted.
SINKS = 4

#: Kinds of rotary embeddings whose angles do not depend on the length of the sequence.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn")


def _highest(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    """The highest entropies; of equal ones the later token stays."""
    return np.argsort(entropies, kind="stable")[len(entropies) - count :]


def _latest(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    return np.arange(len(entropies) - count, len(entropies))


def _random(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    chosen: IntArray = generator.choice(len(entropies), count, replace=False)
    return chosen


def _evenly_spaced(entropies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    return np.arange(count) * len(entropies) // max(count, 1)


#: Policies: (entropies of the middle, number of entries to keep, random numbers) -> their indices, in any order.
POLICIES: dict[str, Callable[[FloatArray, int, np.random.Generator], IntArray]] = {
    "sirllm": _highest,
    "streaming": _latest,
    "random": _random,
    "interval": _evenly_spaced,
}


def select_entries(
    policy: str, entropies: FloatArray, count: int, *, recent: int, generator: np.random.Generator, sinks: int = SINKS
) -> IntArray:
    """Choose the entries that stay: the sinks, the most recent ones, and what the policy keeps of the middle.

    Args:
        policy: A key of `POLICIES`.
        entropies: The entropy of each cached token, float64[K].
        count: Number of entries to keep.
        recent: Number of entries at the end that stay; the latest of them, if there are more than fit.
        generator: Random numbers for the policy `random`.
        sinks: Number of entries at the beginning that stay.

    Returns:
        Indices in ascending order, int64[min(count, K)].

    Example:
        >>> entropies = np.array([0, 0, 5, 1, 7, 2, 0, 0.0])
        >>> select_entries("sirllm", entropies, 5, recent=2, sinks=1, generator=np.random.default_rng())
        array([0, 2, 4, 6, 7])
    """
    size = len(entropies)
    if count >= size:
        return np.arange(size)
    sinks = min(sinks, count)
    recent = min(recent, count - sinks)
    middle = entropies[sinks : size - recent]
    chosen = sinks + np.sort(POLICIES[policy](middle, count - sinks - recent, generator))
    kept: IntArray = np.concatenate([np.arange(sinks), chosen, np.arange(size - recent, size)])
    return kept


def keep_entries(cache: DynamicCache, indices: IntArray, rotation: KeyRotation) -> None:
    """Keep the entries at `indices`, int64[n] ascending, in place, with keys rotated to the positions 0 … n - 1."""
    for layer in _with_keys(cache):
        old = torch.from_numpy(indices).to(layer.keys.device)
        new = torch.arange(len(old), device=old.device)
        layer.keys = rotation.rotate(layer.keys.index_select(-2, old), old, new)
        layer.values = layer.values.index_select(-2, old)


def crop_entries(cache: DynamicCache, length: int) -> None:
    """Keep the first `length` entries, in place."""
    for layer in _with_keys(cache):
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _with_keys(cache: DynamicCache) -> list[Any]:
    """The layers of a cache that hold keys of their own."""
    return [layer for layer in cast(Any, cache).layers if layer.keys is not None]


@dataclass(frozen=True, kw_only=True)
class KeyRotation:
    """Rotates the keys of a model with rotary embeddings from one position to another.

    A rotary key is the plain key with each pair of dimensions rotated by position times frequency. So a rotation by
    the difference of two angles gives the key that the model would compute at the other position.

    Attributes:
        embedding: The model's own rotary embedding, so that its scaling is included.
    """

    embedding: nn.Module

    @classmethod
    def of(cls, model: PreTrainedModel) -> KeyRotation:
        """Make the rotation for a model, and test it on the model's own keys.

        Args:
            model: An attached model.

        Returns:
            The rotation.

        Raises:
            UnsupportedModelError: If the model's keys cannot be rotated, with the reason.
        """
        name = type(model).__name__
        config = model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type")
        embedding = getattr(model.get_decoder(), "rotary_emb", None)  # type: ignore[no-untyped-call]
        if not isinstance(embedding, nn.Module) or kind is None:
            raise _unsupported(name, "it has no single rotary embedding for all layers")
        if kind not in _STATIC_ROTARY:
            raise _unsupported(
                name, f"its rotary embedding is of kind {kind!r}, whose angles change with the length of the sequence"
            )
        partial = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        if partial not in (None, 1, 1.0):
            raise _unsupported(name, f"its rotary embedding covers only a part of each head ({partial})")
        needed = [
            parameter.name
            for parameter in inspect.signature(embedding.forward).parameters.values()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(needed) != 2:
            raise _unsupported(
                name, f"its rotary embedding takes {', '.join(needed)}; expected a tensor and one position per token"
            )
        rotation = cls(embedding=embedding)
        if not rotation._gives_cos_and_sin(model):
            raise _unsupported(name, "its rotary embedding gives complex numbers; expected cosines and sines")
        if not rotation._is_exact(model):
            raise _unsupported(name, "its rotated keys differ from the keys that it computes at the new positions")
        return rotation

    def rotate(self, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Rotate keys, in float32 or better.

        Args:
            keys: Keys computed at the positions `old`, [B, H, n, D].
            old: Positions, int64[n].
            new: Positions, int64[n].

        Returns:
            The keys at the positions `new`, [B, H, n, D], in the dtype of `keys`.
        """
        precise = keys if keys.dtype == torch.float64 else keys.float()
        cos_old, sin_old = self._cos_sin(old, precise)
        cos_new, sin_new = self._cos_sin(new, precise)
        length = cos_old.square() + sin_old.square()  # 1, or the square of the model's attention scaling
        cos = (cos_new * cos_old + sin_new * sin_old) / length
        sin = (sin_new * cos_old - cos_new * sin_old) / length
        first, second = precise.chunk(2, dim=-1)
        return (precise * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)

    @torch.no_grad()
    def _cos_sin(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles at positions, [1, n, D] each."""
        cos, sin = self.embedding(like, positions[None])
        return cos, sin

    @torch.no_grad()
    def _gives_cos_and_sin(self, model: PreTrainedModel) -> bool:
        """Whether the embedding returns two tensors; DeepSeek-V2's returns one of complex numbers."""
        positions = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        found = self.embedding(torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device), positions)
        return isinstance(found, tuple) and len(found) == 2

    @torch.no_grad()
    def _is_exact(self, model: PreTrainedModel) -> bool:
        """Whether rotated keys equal computed ones, tried on 8 tokens that are shifted by 19 positions."""
        vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        tokens = torch.arange(1, 9, device=model.device)[None] % vocabulary
        kv_end = torch.arange(1, 9, dtype=torch.int32, device=model.device)[None]

        def layers(positions: Tensor) -> list[Any]:
            cache = whole_cache(model)
            model(
                input_ids=tokens,
                position_ids=positions[None],
                doc_start=torch.zeros_like(kv_end),
                kv_end=kv_end,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return _with_keys(cache)

        old = torch.arange(8, device=model.device)
        new = old + 19
        tolerance = max(64 * torch.finfo(model.dtype).eps, 1e-4)
        return all(
            computed.keys.shape[-1] == self._cos_sin(old, computed.keys)[0].shape[-1]
            and float((self.rotate(computed.keys, old, new) - expected.keys).abs().max())
            <= tolerance * float(expected.keys.abs().max())
            for computed, expected in zip(layers(old), layers(new), strict=True)
        )


def _unsupported(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: evicting single tokens needs keys that can be rotated to other positions, but {reason}. "
        "Use --when-full stop or drop-oldest"
    )
