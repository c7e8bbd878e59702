"""The chunked loss against a plain one: all logits, torch's cross-entropy, a loop over targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ismdata.masks import IGNORE_INDEX
from ismdata.train import chunked_loss
from ismdata.train.chunked_loss import target_loss
from tests.support.logits import Widest

VOCABULARY, WIDTH = 101, 16


def head(generator, *, dtype=torch.float64, bias=True):
    """Weight and bias of a head."""
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return weight, offset if bias else None


def batch(generator, *, rows, tokens, share, dtype=torch.float64):
    """Hidden states, and labels of which `share` are targets."""
    hidden = torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    return hidden, labels.masked_fill(torch.rand(rows, tokens, generator=generator) >= share, IGNORE_INDEX)


def plain(hidden, weight, bias, labels, loss_weight=None):
    """The loss with all logits, and the correct predictions counted one by one."""
    logits = nn.functional.linear(hidden, weight, bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total, correct = wide.new_zeros(()), 0
    for row in range(len(labels)):
        for place in range(1, labels.shape[1]):
            token = int(labels[row, place])
            if token == IGNORE_INDEX:
                continue
            share = 1.0 if loss_weight is None else loss_weight[row, place].to(wide)
            total = total + share * nn.functional.cross_entropy(wide[row, place - 1], labels[row, place])
            correct += int(wide[row, place - 1].argmax()) == token
    return total + 0 * hidden.sum().to(wide) + 0 * weight.sum().to(wide), correct


@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    with_bias=st.booleans(),
    with_weights=st.booleans(),
    chunk=st.sampled_from([1, 3, 8, 1000]),
    seed=st.integers(0, 1000),
)
def test_value_gradients_and_predictions_are_those_of_all_logits(
    rows, tokens, share, with_bias, with_weights, chunk, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = head(generator, bias=with_bias)
    hidden, labels = batch(generator, rows=rows, tokens=tokens, share=share)
    loss_weight = torch.rand(labels.shape, generator=generator) if with_weights else None
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    expected, correct = plain(hidden, weight, bias, labels, loss_weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "_CHUNK_LOGITS", VOCABULARY * chunk)
        found = target_loss(hidden, weight, bias, labels, loss_weight)
        gradients = torch.autograd.grad(3 * found.total, inputs)
    torch.testing.assert_close(found.total, expected)
    assert int(found.correct) == correct
    for one, other in zip(gradients, torch.autograd.grad(3 * expected, inputs, allow_unused=True), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_only_what_is_trained_has_a_gradient(trained, chunk, monkeypatch):
    """A frozen head, as under LoRA, or frozen hidden states."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_LOGITS", VOCABULARY * chunk)
    generator = torch.Generator().manual_seed(0)
    weight, bias = head(generator)
    hidden, labels = batch(generator, rows=2, tokens=20, share=0.5)
    expected = torch.autograd.grad(plain(hidden, weight, bias, labels)[0], (hidden, weight))
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    bias.requires_grad_(trained[1])
    target_loss(hidden, weight, bias, labels).total.backward()
    for one, gradient, needed in zip((hidden, weight), expected, trained, strict=True):
        assert (one.grad is not None) == needed
        if needed:
            torch.testing.assert_close(one.grad, gradient)


def test_many_small_losses_in_bfloat16_are_summed_in_float32():
    """A thousand losses of about 5, whose sum in bfloat16 would be wrong by several percent."""
    generator = torch.Generator().manual_seed(0)
    weight, _ = head(generator, dtype=torch.bfloat16)
    hidden, labels = batch(generator, rows=1, tokens=1001, share=1.0, dtype=torch.bfloat16)
    logits = hidden[0, :-1].double() @ weight.double().T
    expected = nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    found = target_loss(hidden, weight, None, labels).total
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("chunk", [8, 1000])
def test_under_autocast_float32_weights_get_float32_gradients(chunk, monkeypatch):
    """Summed over chunks in float32: in bfloat16 many chunks would be further from the exact gradient than one."""
    monkeypatch.setattr(chunked_loss, "_CHUNK_LOGITS", VOCABULARY * chunk)
    generator = torch.Generator().manual_seed(0)
    weight, bias = head(generator, dtype=torch.float32)
    hidden, labels = batch(generator, rows=2, tokens=200, share=0.7, dtype=torch.float32)
    exact = plain(hidden.double(), weight.double(), bias.double(), labels)[0]
    expected = torch.autograd.grad(exact, (hidden, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = target_loss(hidden, weight, bias, labels).total
        found.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=2e-3)
    for one, gradient in zip((hidden, weight, bias), expected, strict=True):
        assert one.grad.dtype == torch.float32
        assert float((one.grad - gradient).norm() / gradient.norm()) < 0.02


def test_equal_logits_count_as_argmax_counts_them():
    hidden, labels = torch.zeros(1, 5, WIDTH), torch.tensor([[7, 0, 1, 0, 2]])
    found = target_loss(hidden, torch.zeros(VOCABULARY, WIDTH), None, labels)
    first = int(torch.zeros(VOCABULARY).argmax())
    assert int(found.correct) == int((labels[0, 1:] == first).sum())


def test_without_gradients_the_numbers_are_the_same():
    generator = torch.Generator().manual_seed(0)
    weight, bias = head(generator)
    hidden, labels = batch(generator, rows=1, tokens=40, share=0.5)
    expected = target_loss(hidden, weight, bias, labels)
    with torch.no_grad():
        found = target_loss(hidden, weight, bias, labels)
    assert not found.total.requires_grad
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.correct, expected.correct)


def test_no_tensor_is_wider_than_a_chunk_or_the_head(monkeypatch):
    monkeypatch.setattr(chunked_loss, "_CHUNK_LOGITS", VOCABULARY * 8)
    generator = torch.Generator().manual_seed(0)
    weight, bias = head(generator)
    hidden, labels = batch(generator, rows=2, tokens=30, share=1.0)
    with Widest() as seen:
        target_loss(hidden, weight, bias, labels).total.backward()
    assert seen.elements == max(weight.numel(), VOCABULARY * 8, hidden.numel())


def test_a_second_backward_pass_is_an_error():
    generator = torch.Generator().manual_seed(0)
    weight, bias = head(generator)
    hidden, labels = batch(generator, rows=1, tokens=4, share=1.0)
    total = target_loss(hidden, weight, bias, labels).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        total.backward()


def test_a_target_outside_the_vocabulary_is_an_error():
    with pytest.raises(IndexError):
        target_loss(torch.zeros(1, 2, WIDTH), torch.zeros(VOCABULARY, WIDTH), None, torch.tensor([[0, VOCABULARY]]))
