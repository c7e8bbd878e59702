"""The training loss against a plain one: one document at a time, all logits, a loop over targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma3TextConfig, GraniteConfig, LlamaConfig

from ismdata.attention.attachment import attach
from ismdata.data.collate import Collator
from ismdata.errors import UsageError
from ismdata.masks import IGNORE_INDEX
from ismdata.masks.intervals import ANSWER as ANSWER_KIND
from ismdata.train import chunked_loss
from ismdata.train.collate import TrainingCollator
from ismdata.train.loss import compute_loss_at_targets, count_correct, take_counts, target_weights
from tests.support.logits import Widest
from tests.support.tiny import ANSWER, ARCHITECTURES, CONFIGS, PROMPT, QUERY, sample, tiny_model, write_packed
from tests.support.training_shards import curve, run, word_tokenizer

WEIGHTINGS = ("token", "answer", "conversation")

#: Documents of very different lengths and numbers of targets: one without targets, one with an untrained answer.
DOCUMENTS = [
    [(QUERY, 3), (ANSWER, 5), (QUERY, 2), (ANSWER, 1)],
    [(QUERY, 20), (ANSWER, 30)],
    [(PROMPT, 2), (QUERY, 4), (ANSWER, 7, False), (QUERY, 3), (ANSWER, 2)],
    [(QUERY, 9), (ANSWER, 4, False)],
    [(ANSWER, 3), (QUERY, 5), (ANSWER, 40), (QUERY, 1), (ANSWER, 2)],
    [(QUERY, 2), (ANSWER, 60)],
    [(QUERY, 50), (ANSWER, 1)],
    [(QUERY, 6), (ANSWER, 6), (QUERY, 6), (ANSWER, 6), (QUERY, 6), (ANSWER, 6)],
]


def slow_weights(sequence, weighting):
    """The weight of each target, and the number of items, by loops."""
    groups = []
    at = 0
    for length in sequence.seq_lens:
        inside = [span for span in sequence.spans if at <= span[0] < at + length]
        if weighting == "conversation":
            groups.append(list(range(at, at + length)))
        elif weighting == "answer":
            groups += [list(range(span[0], span[1])) for span in inside if span[2] == ANSWER_KIND]
        else:
            groups += [[token] for token in range(at, at + length)]
        at += length
    weight, items = {}, 0
    for group in groups:
        targets = [token for token in group if sequence.loss_mask[token]]
        items += bool(targets)
        for token in targets:
            own = 1.0 if sequence.loss_weight is None else float(sequence.loss_weight[token])
            weight[token] = own / len(targets)
    return weight, items


#: A model as it is before training: logits near zero.
NEW = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.005,
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_against_loops(weighting, weighted):
    draw = np.random.default_rng(0)
    for _ in range(30):
        chosen = [DOCUMENTS[number] for number in draw.permutation(len(DOCUMENTS))[: draw.integers(0, 5)]]
        own = draw.random(384).astype(np.float32) if weighted else None
        sequence = sample(chosen, seq_len=384, loss_weight=own).sequence
        expected, items = slow_weights(sequence, weighting)
        found, found_items = target_weights(sequence, weighting)
        assert found_items == items
        for token in np.flatnonzero(sequence.loss_mask):
            assert (1.0 if found is None else found[token]) == pytest.approx(expected[token], rel=1e-6)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(UsageError, match="expected one of token, answer, conversation"):
        target_weights(sample([]).sequence, "turn")


def batch_of(*rows, weighting="token", **options):
    batch = TrainingCollator("ism", weighting)([sample(list(row), seq_len=384, **options) for row in rows])
    return batch, take_counts(batch).tolist()


def predicted(logits, labels):
    """The targets that have the largest logit, by a loop."""
    places = [(row, place) for row, place in (labels[:, 1:] != IGNORE_INDEX).nonzero().tolist()]
    return sum(int(logits[row, place].argmax()) == int(labels[row, place + 1]) for row, place in places)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_model_without_its_logits(architecture):
    model = attach(tiny_model(architecture))
    batch, _ = batch_of(DOCUMENTS[:4], DOCUMENTS[4:6], weighting="answer")
    plain = model(**batch)
    gradients = torch.autograd.grad(plain.loss, list(model.parameters()))
    assert compute_loss_at_targets(model)
    lean = model(**batch)
    assert lean.logits is None
    correct = count_correct(model, None, batch["labels"])
    assert correct == count_correct(model, plain.logits, batch["labels"]) == predicted(plain.logits, batch["labels"])
    assert lean.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)  # the model's own is in float32
    for one, other in zip(torch.autograd.grad(lean.loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    without_labels = {name: tensor for name, tensor in batch.items() if name not in ("labels", "loss_weight")}
    torch.testing.assert_close(model(**without_labels).logits, plain.logits)


def test_no_tensor_is_as_wide_as_the_logits(monkeypatch):
    config = CONFIGS["llama"]()
    config.vocab_size = 5000
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config))
    batch, _ = batch_of(DOCUMENTS)
    monkeypatch.setattr(chunked_loss, "_CHUNK_LOGITS", 5000 * 16)
    widest = {}
    for lean in (False, True):
        if lean:
            assert compute_loss_at_targets(model)
        with Widest() as seen:
            model(**batch).loss.backward()
        widest[lean] = seen.elements
    assert widest[False] >= 384 * 5000
    assert widest[True] <= 5000 * 32  # the head's own weights


@pytest.mark.parametrize(
    "config",
    [
        lambda: GraniteConfig(**NEW, logits_scaling=4.0),
        lambda: CohereConfig(**NEW, logit_scale=0.1),
        lambda: Gemma3TextConfig(**NEW, head_dim=8, final_logit_softcapping=30.0),
    ],
    ids=["scaled", "multiplied", "capped"],
)
def test_a_new_model_that_changes_its_logits_is_left_unchanged(config):
    """Its logits are so small that its loss tells nothing: log V, with and without the change."""
    model = attach(AutoModelForCausalLM.from_config(config()))
    assert not compute_loss_at_targets(model)
    assert compute_loss_at_targets(attach(AutoModelForCausalLM.from_config(LlamaConfig(**NEW))))


def test_a_model_that_changes_its_logits_is_left_unchanged():
    """Logits are capped after the head; the hidden states would be capped instead."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
        attn_logit_softcapping=None,
        final_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config))
    batch, _ = batch_of(DOCUMENTS[:4])
    before = model(**batch)
    assert not compute_loss_at_targets(model)
    after = model(**batch)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)
    assert count_correct(model, after.logits, batch["labels"]) == predicted(before.logits, batch["labels"])


def unpacked(model, weighting):
    """The loss, the norm of its gradient and the accuracy, with one document per batch and all logits."""
    total, items, correct, targets = 0.0, 0, 0, 0
    for number, document in enumerate(DOCUMENTS):
        row = sample([document], seq_len=128, seed=number)
        weight, count = slow_weights(row.sequence, weighting)
        items += count
        batch = Collator("ism")([row])
        labels = batch.pop("labels")[0]
        log_probabilities = model(**batch).logits[0].log_softmax(-1)
        for token, share in weight.items():
            assert labels[token] != IGNORE_INDEX
            total = total - share * log_probabilities[token - 1, labels[token]]
            correct += int(log_probabilities[token - 1].argmax() == labels[token])
        targets += len(weight)
    mean = total / items
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    return mean.item(), torch.stack([gradient.norm() for gradient in gradients]).norm().item(), correct / targets


def packing(name):
    """The same documents: one per row, several per row, or all in two rows."""
    cuts = {"alone": range(1, 9), "some": (2, 3, 6, 8), "tight": (4, 8)}[name]
    rows, first = [], 0
    for last in cuts:
        seeds = range(first, last)
        tokens = [sample([DOCUMENTS[seed]], seed=seed).sequence for seed in seeds]
        flat = np.concatenate([each.input_ids[: each.seq_lens.sum()] for each in tokens]).tolist()
        rows.append(sample(DOCUMENTS[first:last], seq_len=256, tokens=[*flat, *[0] * (256 - len(flat))][: len(flat)]))
        first = last
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "batch", "accumulation", "weighting"),
    [
        ("alone", 8, 1, "token"),
        ("alone", 2, 4, "token"),
        ("some", 4, 1, "token"),
        ("some", 1, 4, "token"),
        ("tight", 2, 1, "token"),
        ("tight", 1, 4, "token"),  # two micro-batches are all padding
        ("some", 1, 4, "answer"),
        ("alone", 8, 1, "answer"),
        ("tight", 1, 4, "conversation"),
        ("alone", 2, 4, "conversation"),
    ],
)
def test_the_loss_of_a_step_is_that_of_the_documents_unpacked(packed, batch, accumulation, weighting, model, tmp_path):
    """Whatever the packing and the accumulation; test_distributed.py has two processes."""
    folder = write_packed(tmp_path / "packed", packing(packed))
    word_tokenizer(folder / "tokenizer")
    run(
        folder,
        tmp_path / "out",
        model=model,
        steps=None,
        batch_size=batch,
        accumulation=accumulation,
        loss_weighting=weighting,
        max_grad_norm=0.0,
    )
    loss, norm, accuracy = unpacked(attach(tiny_model()), weighting)
    (line,) = curve(tmp_path / "out")
    assert float(line["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(line["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(line["token_accuracy"]) == pytest.approx(accuracy)
