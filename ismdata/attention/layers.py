"""The layers of an attached model: whether each takes its attention from the backend, with what, and still does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ismdata.attention.backends.base import KEYWORD, Backend
from ismdata.errors import UnsupportedModelError, UsageError

#: An attention function as transformers calls it.
Attention = Callable[..., tuple[Tensor, Tensor | None]]

#: Attribute under which an attached model keeps its `Attachment` (attachment.py).
ATTACHMENT = "ismdata_attachment"

#: A configuration and the attention that it names.
Implementation = tuple[PreTrainedConfig, str | None]

#: Keywords of attention functions that a backend computes, and keywords of forward that change no attention. `base.py`
#: refuses sinks and biases with their reason.
_KNOWN_OPTIONS = {
    *(KEYWORD, "scaling", "dropout", "sliding_window", "softcap", "s_aux", "position_bias"),
    *("position_ids", "cache_position", "use_cache", "logits_to_keep", "is_causal", "deterministic"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}


class Call(NamedTuple):
    """What a layer passed to the attention function."""

    module: nn.Module
    options: dict[str, Any]


class AttachedLayer(NamedTuple):
    """An attention module, and how often one forward pass calls the backend from it (DiffLlama: twice)."""

    module: nn.Module
    calls: int


@contextmanager
def recorded(backend: Backend, attention: Attention | None = None) -> Iterator[list[Call]]:
    """List the calls of a backend's attention function while the context is open.

    Args:
        backend: The backend.
        attention: Replaces the function meanwhile.
    """
    calls: list[Call] = []
    function = attention or backend.attention

    def recording(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        calls.append(Call(module, {name: value for name, value in kwargs.items() if name != KEYWORD}))
        return function(module, *args, **kwargs)

    AttentionInterface.register(backend.name, recording)
    try:
        yield calls
    finally:
        AttentionInterface.register(backend.name, backend.attention)


@contextmanager
def recorded_windows() -> Iterator[set[int]]:
    """Collect the windows of the masks that a model makes for eager attention while the context is open."""
    windows: set[int] = set()
    make = AttentionMaskInterface()["eager"]  # type: ignore[no-untyped-call]

    def recording(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("local_size") is not None:
            windows.add(kwargs["local_size"])
        return make(*args, **kwargs)

    AttentionMaskInterface.register("eager", recording)
    try:
        yield windows
    finally:
        AttentionMaskInterface.register("eager", make)


def check_windows(model: PreTrainedModel, calls: Sequence[Call], windows: set[int]) -> None:
    """Check that windows which the stock model has in its masks reach the attention function.

    Args:
        model: The attached model.
        calls: Those of one forward pass.
        windows: What `recorded_windows` collected.

    Raises:
        UnsupportedModelError: if they do not.
    """
    config = model.config.get_text_config()
    if getattr(config, "layer_types", None):  # then `check_calls` counts, and masks may be made that no layer uses
        return
    positions = getattr(config, "max_position_embeddings", None) or float("inf")
    narrow = sorted(window for window in windows if window < positions)
    if narrow and not any(call.options.get("sliding_window") is not None for call in calls):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a sliding window of {narrow[0]} tokens, which its layers do not pass to the "
            "attention function: they would see too much. Set sliding_window to None in its config if no document is "
            "longer, or use another model"
        )


def check_calls(
    model: PreTrainedModel, calls: Sequence[Call], attached: Sequence[AttachedLayer] = ()
) -> list[AttachedLayer]:
    """Check that each layer called the attention function, with options that a backend knows, and with its window.

    Args:
        model: The attached model.
        calls: Those of one forward pass.
        attached: What an earlier call of this function returned: as often as then. Empty: at least once.

    Returns:
        The layers.

    Raises:
        UnsupportedModelError: if a layer did not.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    modules = {id(call.module): call.module for call in calls}
    times = Counter(id(call.module) for call in calls)
    expected = sum(layer.calls for layer in attached)
    layers = config.num_hidden_layers
    every = len(times) == layers
    if not every and len(calls) == layers:  # HRM counts each pass through its modules
        kinds = {type(module) for module in modules.values()}
        every = all(id(module) in times for module in model.modules() if type(module) in kinds)
    if not every or (attached and len(calls) != expected):
        raise UnsupportedModelError(
            f"{name} has {layers} layers, and {len(times)} called the attention function, "
            f"{len(calls)} times in all; expected {f'{expected} times' if attached else 'each layer'}. Some of its "
            "layers do not use the mask. Use another model"
        )
    unknown = sorted({option for call in calls for option, value in call.options.items() if _is_unknown(option, value)})
    if unknown:
        raise UnsupportedModelError(
            f"{type(calls[0].module).__name__} passes {', '.join(unknown)} to its attention function, which no backend "
            "computes. Use another model"
        )
    sliding = (getattr(config, "layer_types", None) or []).count("sliding_attention")
    passed = len({id(call.module) for call in calls if call.options.get("sliding_window") is not None})
    if sliding > passed:
        raise UnsupportedModelError(
            f"{name} has {sliding} sliding layers, of which {passed} pass their window to the attention function; the "
            "others would see too much. Use another model"
        )
    return [AttachedLayer(modules[key], count) for key, count in times.items()]


def _is_unknown(option: str, value: Any) -> bool:
    return option not in _KNOWN_OPTIONS and value is not None and value is not False


def implementations(model: PreTrainedModel) -> list[Implementation]:
    """Each configuration in a model with the attention that it names, the outer ones before the inner ones.

    Args:
        model: Any model.

    Returns:
        What `restore_implementations` takes.
    """
    found: dict[int, PreTrainedConfig] = {}

    def add(config: object) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return [(config, config._attn_implementation) for config in found.values()]


def restore_implementations(saved: Sequence[Implementation]) -> None:
    """Undo later changes of the attention that configurations name.

    Args:
        saved: What `implementations` returned.
    """
    for config, implementation in saved:
        config._attn_implementation = implementation


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Make all layers of a model take the attention of this name from transformers' AttentionInterface.

    Args:
        model: The model.
        name: The name.
    """
    model.set_attn_implementation(name)
    kind = type(model.config.get_text_config())
    for config, implementation in implementations(model):
        if type(config) is kind and implementation != name:  # a layer's own copy (`per_layer_config`)
            config._attn_implementation = name


def check_implementation(model: PreTrainedModel, layers: Sequence[AttachedLayer], backend_name: str, name: str) -> None:
    """Check that every layer still takes its attention from the backend.

    Args:
        model: The attached model.
        layers: Its layers.
        backend_name: The backend as users call it, for the message.
        name: The backend's name in transformers' AttentionInterface.

    Raises:
        UsageError: if one does not.
    """
    checked = None
    for number, layer in enumerate(layers):
        config = getattr(layer.module, "config", model.config)
        if config is checked:  # mostly one for all layers; reading a configuration's properties is slow
            continue
        checked = config
        if config._attn_implementation != name:
            raise UsageError(
                f"{type(model).__name__} was attached with the backend {backend_name}, and the attention "
                f"implementation of its layer {number} has been changed to {config._attn_implementation!r} since "
                "(set_attn_implementation, or another model with the same config): documents would see each other. "
                f"Call ismdata.attach(model, {backend_name!r}) again, or ismdata.attention.detach(model) for the "
                "model's own attention"
            )
