"""What families.py holds an attached model to, none of which goes through ismdata's own masks.

1. The mask from its definition (`sees`): loops over documents and spans.
2. The stock model under eager attention, each mask that it builds replaced by the explicit one, as additive 4-D
   tensors: logits, loss and all gradients, under the three masks. Windows narrow the explicit masks of the layers for
   which the model builds a sliding mask.
3. The stock model on each document alone, without any mask or positions: the packed rows under `causal`.
4. Laws 1 to 4: one pass equals passes over cut conversations, packing changes nothing, a cache changes nothing, and
   which token changes which row.
5. Dropout: with the same seed in training mode, the same loss and gradients; dropout of attention weights is applied
   where the stock model applies it, or refused.

Shape legend: B rows of a batch, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

CONTEXT, ANSWER = "context", "answer"
MASKS = ("causal", "ism", "prefix")
IGNORE = -100

#: Documents of two rows, as (kind, tokens): longer and shorter than the windows, several answers, padding at the end.
ROWS = [
    [
        [(CONTEXT, 15), (ANSWER, 14), (CONTEXT, 12), (ANSWER, 3)],
        [(CONTEXT, 16), (ANSWER, 5), (CONTEXT, 1), (ANSWER, 21)],
    ],
    [
        [(CONTEXT, 2), (ANSWER, 1), (CONTEXT, 20), (ANSWER, 9)],
        [(CONTEXT, 30), (ANSWER, 30)],
        [(CONTEXT, 3), (ANSWER, 4)],
    ],
]
SEQ_LEN = 128

#: The largest difference, relative to the largest value: stock eager attention has its softmax in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}

Documents = list[list[tuple[str, int]]]


class Differs(Exception):
    """A check that failed: what differs, and by how much."""


class Batch(NamedTuple):
    """Packed rows: what the model takes, and the mask that it should compute."""

    inputs: dict[str, Tensor]
    labels: Tensor  # int64[B, T]
    sees: Tensor  # bool[B, T, T]
    documents: list[tuple[int, int, int, list[tuple[str, int]]]]  # row, first token, end, spans


def batch_of(mask: str, vocabulary: int, rows: list[Documents] = ROWS, seq_len: int = SEQ_LEN) -> Batch:
    """Rows of random tokens, every part of the batch written out from the definitions in docs/masks.md."""
    count = len(rows)
    tokens = torch.randint(2, vocabulary, (count, seq_len), generator=torch.Generator().manual_seed(1))
    labels = torch.full((count, seq_len), IGNORE)
    positions = torch.zeros(count, seq_len, dtype=torch.long)
    doc_start = torch.arange(seq_len, dtype=torch.int32).repeat(count, 1)
    kv_end = doc_start + 1
    documents = []
    for row, each in enumerate(rows):
        at = 0
        for spans in each:
            begin, length = at, sum(size for _, size in spans)
            end = begin + length
            last_answer = end - spans[-1][1]
            documents.append((row, begin, end, spans))
            for kind, size in spans:
                for t in range(at, at + size):
                    positions[row, t] = t - begin
                    doc_start[row, t] = begin
                    if mask == "ism" and kind == CONTEXT:
                        kv_end[row, t] = at + size
                    if mask == "prefix" and t < last_answer:
                        kv_end[row, t] = last_answer
                    if kind == ANSWER and (mask != "prefix" or t >= last_answer):
                        labels[row, t] = tokens[row, t]
                at += size
        tokens[row, at:] = 0
    key = torch.arange(seq_len)
    sees = (key >= doc_start[..., None]) & (key < kv_end[..., None])
    inputs = {"input_ids": tokens, "position_ids": positions, "doc_start": doc_start, "kv_end": kv_end}
    return Batch(inputs, labels, sees, documents)


def windowed(sees: Tensor, window: int | None) -> Tensor:
    """The last `window` keys up to each row, and what is ahead of it."""
    if window is None:
        return sees
    row = torch.arange(sees.shape[-1])
    return sees & (row[:, None] - row < window)


# --- the stock model under an explicit mask


class Oracle:
    """A copy of the stock model under eager attention, whose masks are the explicit ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        #: The windows of the masks that the model asked for, None for none.
        self.windows: set[int | None] = set()

    def logits(self, batch: Batch) -> Tensor:
        """The logits of a batch, with gradients."""
        with self._explicit(batch.sees):
            return self.model(
                input_ids=batch.inputs["input_ids"], position_ids=batch.inputs["position_ids"], use_cache=False
            ).logits

    @contextmanager
    def _explicit(self, sees: Tensor) -> Iterator[None]:
        """Replace the functions that build masks, in the modules that define the model's classes."""
        dtype = self.model.dtype

        def additive(window: int | None) -> Tensor:
            self.windows.add(window)
            visible = windowed(sees, window)[:, None]
            return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

        def causal(config: Any, *args: Any, **options: Any) -> Tensor:
            return additive(None)

        def sliding(config: Any, *args: Any, **options: Any) -> Tensor:
            return additive(getattr(config, "sliding_window", None))

        def of_kinds(config: Any, *args: Any, **options: Any) -> Any:
            text = config.get_text_config()
            makers = {"full_attention": causal, "sliding_attention": sliding}
            kinds = set(getattr(text, "layer_types", None) or ())
            return {kind: makers.get(kind, unknown)(text) for kind in kinds} or causal(text)

        def unknown(*args: Any, **options: Any) -> Tensor:
            """A mask of another kind, which some models make and no layer uses: it would show."""
            return torch.full((len(sees), 1, *sees.shape[1:]), torch.nan, dtype=dtype)

        replaced = {
            "create_causal_mask": causal,
            "create_sliding_window_causal_mask": sliding,
            "create_chunked_causal_mask": unknown,
            "create_bidirectional_mask": unknown,
            "create_masks_for_generate": of_kinds,
        }
        modules = {sys.modules[type(each).__module__] for each in self.model.modules()}
        saved = [
            (module, name, getattr(module, name)) for module in modules for name in replaced if hasattr(module, name)
        ]
        for module, name, _ in saved:
            setattr(module, name, replaced[name])
        try:
            yield
        finally:
            for module, name, function in saved:
                setattr(module, name, function)


def windows_of(oracle: Oracle) -> list[int | None]:
    """The window of each layer: its kind's, or the one that the model asked a mask for."""
    config = oracle.model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window if window in oracle.windows and None not in oracle.windows else None] * config.num_hidden_layers


def _agree(what: str, found: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    scale = float(expected.detach().abs().max()) if scale is None else scale
    difference = float((found - expected).detach().abs().max())
    if not difference <= tolerance * scale:
        raise Differs(f"{what}: largest difference {difference:.2g} of {scale:.2g}")


def _gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def vocabulary_of(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr, arg-type]


def check_explicit(model: PreTrainedModel, oracle: Oracle, mask: str, *, trains: bool) -> None:
    """Logits, loss and, if the backend trains here, all gradients against the stock model under the explicit mask.

    Raises:
        Differs: if one of them does.
    """
    batch = batch_of(mask, vocabulary_of(model))
    tolerance = TOLERANCE[model.dtype]
    expected = oracle.logits(batch)
    output = model(**batch.inputs, labels=batch.labels)
    held = batch.labels.new_ones(expected.shape[:2], dtype=torch.bool)
    for row, begin, end, _ in batch.documents:
        held[row, begin:end] = False
    held = ~held  # padding is no document: nothing reads what it gives
    _agree(f"{mask}: logits", output.logits[held], expected[held], tolerance)
    loss = _mean_loss(expected, batch.labels)
    _agree(f"{mask}: loss", output.loss, loss, tolerance)
    if not trains:
        return
    found, wanted = _gradients(model, output.loss), _gradients(oracle.model, loss)
    largest = max(float(each.abs().max()) for each in wanted.values())
    for name, gradient in wanted.items():
        # Some gradients are zero but for rounding: adding a constant to all keys changes no softmax.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        _agree(f"{mask}: gradient of {name}", found[name], gradient, 10 * tolerance, scale)


def check_documents_alone(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Packed documents under `causal` against the stock model on each alone, without mask and positions.

    Raises:
        Differs: if the logits do.
    """
    batch = batch_of("causal", vocabulary_of(model))
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        for row, begin, end, _ in batch.documents:
            alone = stock(input_ids=batch.inputs["input_ids"][row, None, begin:end], use_cache=False).logits[0]
            _agree("a document alone", logits[row, begin:end], alone, TOLERANCE[model.dtype])


def check_laws(model: PreTrainedModel, windows: list[int | None]) -> None:
    """Laws 1, 2 and 4 of the attached model.

    Args:
        model: The attached model.
        windows: Of each layer.

    Raises:
        Differs: if one is broken.
    """
    tolerance = TOLERANCE[model.dtype] / 10
    for mask in MASKS:
        batch = batch_of(mask, vocabulary_of(model))
        with torch.no_grad():
            packed = model(**batch.inputs).logits
            for row, begin, end, spans in batch.documents:
                tokens = batch.inputs["input_ids"][row, begin:end]
                alone = _alone(model, mask, tokens, spans)
                _agree(f"law 2, {mask}", packed[row, begin:end], alone, tolerance)
                if mask == "prefix" or len(spans) < 4:
                    continue
                cut = spans[:2]
                length = sum(size for _, size in cut)
                first = _alone(model, mask, tokens[:length], cut)
                _agree(f"law 1, {mask}", packed[row, begin : begin + length], first, tolerance)
    _check_perturbation(model, windows)


def _alone(model: PreTrainedModel, mask: str, tokens: Tensor, spans: list[tuple[str, int]]) -> Tensor:
    batch = batch_of(mask, vocabulary_of(model), [[spans]], len(tokens))
    batch.inputs["input_ids"][0] = tokens
    return model(**batch.inputs).logits[0]


#: The documents of law 4: contexts beyond the window, two documents.
_LAW_4 = [[(CONTEXT, 5), (ANSWER, 4), (CONTEXT, 6), (ANSWER, 14)], [(CONTEXT, 12), (ANSWER, 3)]]


def _check_perturbation(model: PreTrainedModel, windows: list[int | None]) -> None:
    """Law 4: a changed embedding changes the rows that can see it through the layers, and no others."""
    used = sum(size for spans in _LAW_4 for _, size in spans)
    for mask in MASKS:
        batch = batch_of(mask, vocabulary_of(model), [_LAW_4], used)
        sees = batch.sees[0]
        reaches = torch.eye(len(sees), dtype=torch.float64)
        for window in windows:
            reaches = ((windowed(sees, window).double() @ reaches + reaches) > 0).double()
        tokens = batch.inputs["input_ids"]
        changed = tokens.repeat(used + 1, 1)
        place = torch.arange(used)
        vocabulary = vocabulary_of(model)
        changed[place + 1, place] = 2 + (tokens[0, :used] - 2 + vocabulary // 2) % (vocabulary - 2)
        with torch.no_grad():
            logits = torch.cat(
                [
                    model(
                        **{name: each.expand(len(part), -1) for name, each in batch.inputs.items()}
                        | {"input_ids": part}
                    ).logits[:, :used]
                    for part in changed.split(16)
                ]
            )
        change = (logits[1:] - logits[0]).abs().amax(-1).T  # [rows, changed tokens]
        may = reaches[:used, :used] > 0
        # Routers of experts compute in float32 in any case, so that a batch's other rows change its rounding.
        scale = float(logits[0].abs().max())
        leak = (change > 1e-5 * scale) & ~may
        if bool(leak.any()):
            row, token = (int(each) for each in leak.nonzero()[0])
            raise Differs(f"law 4, {mask}: token {token} changes row {row} by {float(change[row, token]):.2g}")
        unseen = (change <= 1e-7 * scale) & may
        if float(unseen[may].double().mean()) > 0.05:
            row, token = (int(each) for each in unseen.nonzero()[0])
            raise Differs(f"law 4, {mask}: token {token} does not change row {row}")


def check_cache(model: PreTrainedModel, feed: Callable[..., Tensor]) -> None:
    """Law 3: turn by turn through a cache against one pass.

    Args:
        model: The attached model.
        feed: `ismdata.generate.feeding.feed`.

    Raises:
        Differs: if the logits do.
    """
    for mask in ("causal", "ism"):
        batch = batch_of(mask, vocabulary_of(model))
        with torch.no_grad():
            packed = model(**batch.inputs).logits
        row, begin, end, spans = batch.documents[0]
        tokens = batch.inputs["input_ids"][row, begin:end].tolist()
        cache, at = DynamicCache(config=model.config), 0
        for kind, size in spans:
            context = kind == CONTEXT
            parts = [size] if context else [1] * size
            for part in parts:
                logits = feed(model, tokens[at : at + part], cache, bidirectional=context and mask == "ism")
                at += part
                _agree(f"law 3, {mask}", logits, packed[row, begin + at - 1], TOLERANCE[model.dtype])


def check_dropout(model: PreTrainedModel, oracle: Oracle) -> None:
    """In training mode, with the same seed, the same loss and gradients as the stock model.

    Args:
        model: The attached model, with dropout anywhere but in its attention weights.
        oracle: Of the same model.

    Raises:
        Differs: if they do.
    """
    batch = batch_of("ism", vocabulary_of(model))
    sides = []
    for each, run in (
        (oracle.model, lambda: _mean_loss(oracle.logits(batch), batch.labels)),
        (model, lambda: model(**batch.inputs, labels=batch.labels).loss),
    ):
        each.train()
        torch.manual_seed(5)
        loss = run()
        sides.append((loss, _gradients(each, loss)))
        each.eval()
    (expected, wanted), (found, gradients) = sides
    _agree("training mode: loss", found, expected, TOLERANCE[model.dtype])
    largest = max(float(each.abs().max()) for each in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        _agree(f"training mode: gradient of {name}", gradients[name], gradient, 10 * TOLERANCE[model.dtype], scale)


def is_random(model: PreTrainedModel, run: Callable[[], Tensor]) -> bool:
    """Whether two calls in training mode, with different seeds, differ."""
    model.train()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            results.append(run())
    model.eval()
    return not torch.equal(*results)
