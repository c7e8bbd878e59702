"""Laws 1, 2 and 4 on tiny random models in float64: one pass, packing, perturbation. Law 3 is in test_laws_cache.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.backends.registry import BACKENDS
from ismdata.data.collate import Collator
from ismdata.masks import IGNORE_INDEX
from tests.support.tiny import ANSWER, ARCHITECTURES, PROMPT, QUERY, sample, tiny_model

THREE_ANSWERS = [(PROMPT, 2), (QUERY, 3), (ANSWER, 4), (QUERY, 1), (QUERY, 2), (ANSWER, 1), (QUERY, 5), (ANSWER, 6)]
CLOSE = {"rtol": 0, "atol": 1e-9}

_MODELS = {}


#: Every architecture with the backend sdpa, and one of them with each other backend.
COMBINATIONS = [(each, "sdpa") for each in ARCHITECTURES] + [("qwen3", each) for each in BACKENDS if each != "sdpa"]


def attached(architecture, backend="sdpa"):
    """One model per architecture and backend: attaching is deterministic, and the tests change no weights."""
    if (architecture, backend) not in _MODELS:
        _MODELS[architecture, backend] = attach(tiny_model(architecture), backend=backend)
    return _MODELS[architecture, backend]


def logits_of(model, each):
    batch = Collator()([each])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[0]


def summed_loss(model, each):
    """The summed loss over targets, in float64 (the models compute theirs in float32)."""
    batch = Collator()([each])
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def cut_after(document, answer):
    """The document through its answer number `answer`; only this answer is trained."""
    at = [index for index, (kind, *_) in enumerate(document) if kind == ANSWER][answer]
    return [(kind, length, index == at) for index, (kind, length, *_) in enumerate(document[: at + 1])]


def runs(mask, document=THREE_ANSWERS):
    """The sample of the one pass, and the samples of the K passes with the rows that predict the last answer."""
    whole = sample([document], mask=mask, seed=7)
    tokens = whole.sequence.input_ids
    cuts = []
    for answer in range(sum(kind == ANSWER for kind, *_ in document)):
        cut = cut_after(document, answer)
        end = sum(length for _, length, _ in cut)
        rows = slice(end - cut[-1][1] - 1, end - 1)
        cuts.append((sample([cut], mask=mask, tokens=tokens[:end].tolist()), rows))
    return whole, cuts


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "backend"), COMBINATIONS)
@pytest.mark.parametrize("mask", ["ism", "causal"])
def test_law_1_one_pass_equals_k_passes(architecture, backend, mask):
    model = attached(architecture, backend)
    whole, cuts = runs(mask)
    together = logits_of(model, whole)
    for cut, rows in cuts:
        torch.testing.assert_close(together[rows], logits_of(model, cut)[rows], **CLOSE)

    if BACKENDS[backend].missing_for_training(model.device) is not None:
        return
    once = summed_loss(model, whole)
    apart = sum(summed_loss(model, cut) for cut, _ in cuts)
    torch.testing.assert_close(once, apart, **CLOSE)
    expected = gradients(model, apart)
    for name, gradient in gradients(model, once).items():
        # The models' norms compute in float32 whatever the model's dtype, backwards too.
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-6 * scale)


def test_law_1_fails_under_prefix():
    model = attached("llama")
    whole, cuts = runs("prefix")
    together = logits_of(model, whole)
    *earlier, (last, last_rows) = cuts
    torch.testing.assert_close(together[last_rows], logits_of(model, last)[last_rows], **CLOSE)
    for cut, rows in earlier:
        assert (together[rows] - logits_of(model, cut)[rows]).abs().amax(-1).min() > 1e-3


def documents(max_length=12):
    span = st.tuples(st.sampled_from([PROMPT, QUERY, ANSWER]), st.integers(1, max_length))
    return st.lists(st.lists(span, min_size=1, max_size=6), min_size=1, max_size=3)


def check_packing(architecture, mask, packed, backend="sdpa"):
    """Compare each document alone, at offset 0 of its own row, with its place in the packed row."""
    model = attached(architecture, backend)
    row = sample(packed, seq_len=256, mask=mask, seed=3)
    together = logits_of(model, row)
    start = 0
    for document, length in zip(packed, row.sequence.seq_lens.tolist(), strict=True):
        tokens = row.sequence.input_ids[start : start + length].tolist()
        alone = logits_of(model, sample([document], mask=mask, tokens=tokens))
        torch.testing.assert_close(together[start : start + length], alone[:length], **CLOSE)
        start += length
    assert together.isfinite().all()  # padding rows too


@pytest.mark.parametrize(("architecture", "backend"), COMBINATIONS)
@pytest.mark.parametrize("mask", masks.MASKS)
def test_law_2_packing_changes_nothing(architecture, backend, mask):
    first = [(PROMPT, 1), (QUERY, 4), (ANSWER, 3)]
    for packed in (
        [first, THREE_ANSWERS],
        [THREE_ANSWERS, first, THREE_ANSWERS],
        [[(ANSWER, 2)], THREE_ANSWERS, first],
    ):
        check_packing(architecture, mask, packed, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(packed=documents(), mask=st.sampled_from(masks.MASKS))
def test_law_2_on_random_documents(packed, mask, backend):
    check_packing("llama", mask, packed, backend)


@pytest.mark.parametrize(("architecture", "backend"), COMBINATIONS)
@pytest.mark.parametrize("mask", masks.MASKS)
def test_law_4_a_token_changes_exactly_the_rows_that_see_it(architecture, backend, mask):
    """Every pair of a packed row with two documents and padding, all perturbations in one batch."""
    model = attached(architecture, backend)
    row = sample([[(QUERY, 3), (ANSWER, 2), (QUERY, 2), (ANSWER, 2)], [(PROMPT, 2), (ANSWER, 3)]], mask=mask)
    batch = Collator()([row])
    batch.pop("labels")
    base = batch.pop("input_ids")
    length = 16  # two tokens of padding are enough to perturb
    perturbed = base.repeat(length, 1)
    perturbed[range(length), range(length)] = (base[0, :length] + 17) % 61
    with torch.no_grad():
        before = model(input_ids=base, **batch).logits
        repeated = {name: tensor.repeat(length, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
        after = model(input_ids=perturbed, **repeated).logits
    changed = (after - before).abs().amax(-1).T > 1e-9  # [row, perturbed token]
    sees = masks.dense(batch["doc_start"][0].numpy(), batch["kv_end"][0].numpy())
    assert changed.tolist() == sees[:, :length].tolist()
