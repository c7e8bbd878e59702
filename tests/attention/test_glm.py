"""The decoder with two rotary positions: its rotation, laws 1 to 4, saving, training, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from ismdata import masks
from ismdata.attention import model_folder
from ismdata.attention.attachment import attach
from ismdata.attention.models.glm import GlmRotaryEmbedding, IsmdataGlmConfig, IsmdataGlmForCausalLM
from ismdata.convert.pipeline import convert
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.errors import UsageError
from ismdata.masks import IGNORE_INDEX
from ismdata.masks.glm_positions import block_positions, positions, token_positions
from ismdata.masks.intervals import ANSWER, PROMPT, QUERY
from ismdata.pack.pipeline import pack
from ismdata.train.order import padding_sample
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.tiny import SIZES, checkpoint_activations, sample, tiny_model
from tests.support.training_shards import run

CLOSE = {"rtol": 0, "atol": 1e-9}
THREE_ANSWERS = [(PROMPT, 2), (QUERY, 3), (ANSWER, 4), (QUERY, 3), (ANSWER, 1), (QUERY, 5), (ANSWER, 6)]
TWO_ANSWERS = [(QUERY, 4), (ANSWER, 3), (QUERY, 1), (ANSWER, 2)]


def tiny_glm(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return IsmdataGlmForCausalLM(IsmdataGlmConfig(**SIZES)).to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return attach(tiny_glm())


def with_tokens(document):
    """Spans of (kind, length, train) with [MASK] and [START] before each answer; random tokens stand for them here."""
    marked = []
    for kind, length, *trained in document:
        if kind == ANSWER:
            marked += [(QUERY, 1), (ANSWER, 1, False)]
        marked.append((kind, length, *(trained or [kind == ANSWER])))
    return marked


def glm_sample(documents, **options):
    """A packed row of documents without the two tokens, put in here."""
    row = sample([with_tokens(document) for document in documents], **options)
    sequence = row.sequence
    first, second = positions(sequence.seq_lens, sequence.spans, seq_len=len(sequence.input_ids))
    return replace(row, sequence=replace(sequence, position_ids=first, position_ids_2=second))


def logits_of(model, row):
    batch = Collator()([row])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[0]


def gradients_and_loss(model, rows):
    """The summed loss over the targets of all rows, and its gradients, in float64."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        batch = Collator()([row])
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    total.backward()
    return total.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# -- the rotation ------------------------------------------------------------------------------------------------------


def test_each_position_rotates_half_of_the_dimensions():
    """Against pairs of dimensions as complex numbers, rotated one at a time."""
    config = IsmdataGlmConfig(**SIZES | {"hidden_size": 64, "num_attention_heads": 4}, head_dim=16)
    first, second = torch.tensor([[1, 2, 5, 5, 5]]), torch.tensor([[0, 0, 0, 1, 2]])
    cos, sin = GlmRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), first, second)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 16, dtype=torch.float64, generator=generator)
    turned = vectors * cos[0] + torch.cat((-vectors[:, 8:], vectors[:, :8]), dim=-1) * sin[0]
    for token in range(5):
        for pair in range(8):  # dimensions `pair` and `pair + 8`
            position = first[0, token] if pair < 4 else second[0, token]
            angle = float(position) * 10000 ** (-(pair % 4) / 4)
            number = complex(vectors[token, pair], vectors[token, pair + 8])
            number *= complex(torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle)))
            assert complex(turned[token, pair], turned[token, pair + 8]) == pytest.approx(number, abs=1e-5)


def test_each_position_alone_changes_the_logits(model):
    batch = Collator()([glm_sample([TWO_ANSWERS])])
    batch.pop("labels")
    with torch.no_grad():
        base = model(**batch).logits
        for name in ("position_ids", "position_ids_2"):
            moved = batch | {name: batch[name] + torch.arange(128) % 3}
            assert (model(**moved).logits - base).abs().max() > 1e-3
            shifted = batch | {name: batch[name] + 5}  # rotary positions are relative
            torch.testing.assert_close(model(**shifted).logits, base, rtol=0, atol=1e-4)


def test_a_head_width_that_is_no_multiple_of_4_is_refused():
    with pytest.raises(ValueError, match="head_dim is 6"):
        IsmdataGlmConfig(**SIZES, head_dim=6)
    with pytest.raises(ValueError, match="rope_type linear"):
        IsmdataGlmConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})


def test_a_constant_position_1_is_no_document_border():
    """Also without ismdata's attention: transformers must not infer a document border from a repeated position."""
    model = tiny_glm()
    batch = {name: tensor[:, :11] for name, tensor in Collator("causal")([glm_sample([TWO_ANSWERS])]).items()}
    stock = model(
        **{name: batch[name] for name in ("input_ids", "position_ids", "position_ids_2")}, use_cache=False
    ).logits
    ours = attach(model)(**{name: t for name, t in batch.items() if name not in ("labels", "block_table")}).logits
    torch.testing.assert_close(ours, stock, **CLOSE)


# -- the laws ----------------------------------------------------------------------------------------------------------


def k_passes(document, mask):
    """The one pass, and the K passes, each on the document cut after one answer, with the rows that predict it."""
    whole = glm_sample([document], mask=mask, seed=7)
    answers = [at for at, (kind, *_) in enumerate(document) if kind == ANSWER]
    cuts = []
    for answer in answers:
        cut = [(kind, length, at == answer) for at, (kind, length) in enumerate(document[: answer + 1])]
        end = sum(length for _, length, *_ in with_tokens(cut))
        tokens = whole.sequence.input_ids[:end].tolist() + [0] * (128 - end)
        row = glm_sample([cut], mask=mask)
        row.sequence.input_ids[:] = tokens
        cuts.append((row, slice(end - document[answer][1] - 1, end - 1)))
    return whole, cuts


@pytest.mark.parametrize("mask", ["ism", "causal"])
def test_law_1_one_pass_equals_k_passes(model, mask):
    whole, cuts = k_passes(THREE_ANSWERS, mask)
    together = logits_of(model, whole)
    for cut, rows in cuts:
        torch.testing.assert_close(together[rows], logits_of(model, cut)[rows], **CLOSE)
    loss, found = gradients_and_loss(model, [whole])
    apart, expected = gradients_and_loss(model, [cut for cut, _ in cuts])
    torch.testing.assert_close(loss, apart, **CLOSE)
    for name, gradient in found.items():
        # The norms compute in float32 whatever the model's dtype, in the backward pass too.
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-6 * float(expected[name].abs().max()))


@pytest.mark.parametrize("mask", masks.MASKS)
def test_law_2_packing_changes_nothing(model, mask):
    together = glm_sample([TWO_ANSWERS, THREE_ANSWERS, TWO_ANSWERS], mask=mask, seed=3)
    logits = logits_of(model, together)
    start = 0
    for document, length in zip(
        [TWO_ANSWERS, THREE_ANSWERS, TWO_ANSWERS], together.sequence.seq_lens.tolist(), strict=True
    ):
        alone = glm_sample([document], mask=mask)
        alone.sequence.input_ids[:length] = together.sequence.input_ids[start : start + length]
        torch.testing.assert_close(logits[start : start + length], logits_of(model, alone)[:length], **CLOSE)
        start += length
    assert logits.isfinite().all()


def feed(model, ids, cache, where, *, bidirectional):
    """Tokens after what the cache holds, at two positions, as a session feeds them."""
    past = cache.get_seq_length()
    end = past + len(ids)
    kv_end = torch.full((1, len(ids)), end) if bidirectional else torch.arange(past + 1, end + 1)[None]
    first, second = (torch.tensor([part]) for part in where)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]),
            doc_start=torch.zeros_like(kv_end),
            kv_end=kv_end,
            position_ids=first,
            position_ids_2=second,
            past_key_values=cache,
            use_cache=True,
        ).logits[0]


@pytest.mark.parametrize("mask", masks.MASKS)
def test_law_3_the_cache_changes_nothing(model, mask):
    """Context blocks in one prefill, [START] and answers token by token; under prefix all before the last answer."""
    document = [(QUERY, 8), (ANSWER, 5)] if mask == "prefix" else THREE_ANSWERS
    row = glm_sample([document], mask=mask, seed=5)
    expected = logits_of(model, row)
    ids = row.sequence.input_ids.tolist()
    cache, at, start = DynamicCache(config=model.config), 0, 0
    for kind, length in document:
        if kind != ANSWER:
            follows = document[document.index((kind, length)) + 1][0] == ANSWER
            if not follows:  # the prompt joins the first query's block
                start = length
                continue
            block = ids[at : at + start + length + 1]
            where = block_positions([(False, block)], past=at)
            if mask == "prefix":  # [START] is before the last answer as well
                block = ids[at : at + length + 2]
                where = block_positions([(False, block[:-1]), (True, block[-1:])], past=at)
            logits = feed(model, block, cache, where, bidirectional=mask != "causal")
            torch.testing.assert_close(logits[-1], expected[at + len(block) - 1], **CLOSE)
            at += len(block)
            start = 0
            continue
        opened = at if mask != "prefix" else at - 1
        for _ in range(length + (mask != "prefix")):
            where = token_positions(at, 1, start=opened)
            logits = feed(model, ids[at : at + 1], cache, where, bidirectional=False)
            torch.testing.assert_close(logits[-1], expected[at], **CLOSE)
            at += 1
    assert at == int(row.sequence.seq_lens[0])


@pytest.mark.parametrize("mask", masks.MASKS)
def test_law_4_a_token_changes_exactly_the_rows_that_see_it(model, mask):
    length = 20
    row = glm_sample([TWO_ANSWERS, [(QUERY, 2), (ANSWER, 1)]], mask=mask)
    batch = {name: tensor[:, :length] for name, tensor in Collator()([row]).items() if name != "block_table"}
    batch.pop("labels")
    base = batch.pop("input_ids")
    perturbed = base.repeat(length, 1)
    perturbed[range(length), range(length)] = (base[0] + 17) % 61
    with torch.no_grad():
        before = model(input_ids=base, **batch).logits
        after = model(input_ids=perturbed, **{name: tensor.expand(length, -1) for name, tensor in batch.items()}).logits
    changed = (after - before).abs().amax(-1).T > 1e-9
    sees = masks.dense(batch["doc_start"][0].numpy(), batch["kv_end"][0].numpy())
    assert changed.tolist() == sees.tolist()


# -- in transformers ---------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    model = attach(tiny_glm(torch.float32), mask="ism")
    row = glm_sample([THREE_ANSWERS])
    expected = logits_of(model, row)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "ismdata_glm"
    loaded = model_folder.load(tmp_path / "model")
    assert isinstance(loaded, IsmdataGlmForCausalLM)
    torch.testing.assert_close(logits_of(loaded, row), expected, rtol=0, atol=0)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), IsmdataGlmForCausalLM)


def test_gradient_checkpointing_changes_nothing():
    model = attach(tiny_glm())
    model.train()
    rows = [glm_sample([THREE_ANSWERS, TWO_ANSWERS])]
    loss, expected = gradients_and_loss(model, rows)
    checkpoint_activations(model)
    checkpointed, found = gradients_and_loss(model, rows)
    torch.testing.assert_close(checkpointed, loss, **CLOSE)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_positions_that_the_model_does_not_take_are_refused(model):
    glm, plain = Collator()([glm_sample([TWO_ANSWERS])]), Collator()([sample([TWO_ANSWERS])])
    with pytest.raises(UsageError, match=r"IsmdataGlmForCausalLM got no position_ids_2.*--layout glm"):
        model(**plain)
    with pytest.raises(UsageError, match="got no position_ids_2"):
        model(**{name: tensor for name, tensor in glm.items() if not name.startswith("position_ids")})
    with pytest.raises(UsageError, match="LlamaForCausalLM got position_ids_2, which it would ignore"):
        attach(tiny_model())(**glm)
    with pytest.raises(UsageError, match="one of position_ids and position_ids_2"):
        tiny_glm()(input_ids=glm["input_ids"], position_ids=glm["position_ids"])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Made-up conversations whose answers follow from their questions, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("talks")
    colours = ["red", "blue", "green", "white"]
    lines = [
        {
            "id": f"t-{k}",
            "messages": [
                {"role": "user", "content": f"What is {colours[k % 4]}?"},
                {"role": "assistant", "content": f"{colours[k % 4]} it is."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ],
        }
        for k in range(8)
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    convert([str(folder / "talks.jsonl")], folder / "converted")
    save_tokenizer(folder / "tokenizer", "[MASK]", "<sop>")
    return folder


def packed_talks(talks, output, **options):
    pack([talks / "converted"], output, tokenizer=str(talks / "tokenizer"), chat_template="chatml", **options)
    return output


def test_padding_has_two_positions(talks, tmp_path):
    packed = packed_talks(talks, tmp_path / "packed", seq_len=128, layout="glm")
    dataset = PackedDataset(packed)
    batch = Collator()([dataset[0], padding_sample(dataset)])
    assert batch["position_ids_2"].shape == batch["input_ids"].shape == (2, 128)
    assert not batch["position_ids_2"][1].any()
    assert (batch["labels"][1] == IGNORE_INDEX).all()


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_training_lowers_the_loss_and_counts_tokens_without_padding(mask, talks, tmp_path):
    packed = packed_talks(talks, tmp_path / "packed", seq_len=128, layout="glm", mask=mask)
    totals = json.loads((packed / "index.json").read_text())["totals"]
    assert totals["padding_tokens"] > 0
    options = {"epochs": 3, "batch_size": 2, "learning_rate": 5e-3, "warmup": 2, "log_every": 2}
    report = run(packed, tmp_path / "model", model="glm-tiny", steps=None, **options)
    assert report.last_loss < report.first_loss / 2
    assert (report.tokens, report.target_tokens) == (3 * totals["tokens"], 3 * totals["target_tokens"])
    assert isinstance(model_folder.load(tmp_path / "model"), IsmdataGlmForCausalLM)


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ("plain", "glm-tiny", "--model glm-tiny has two positions per token, and the shards have one.*--layout glm"),
        ("glm", "tiny", "--model tiny would ignore the second.*glm-tiny"),
    ],
    ids=["glm-model", "glm-shards"],
)
def test_shards_of_another_layout_than_the_model_are_refused_before_the_first_step(
    layout, model, message, talks, tmp_path
):
    packed = packed_talks(talks, tmp_path / "packed", seq_len=256, layout=layout)
    with pytest.raises(UsageError, match=message):
        run(packed, tmp_path / "model", model=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]
