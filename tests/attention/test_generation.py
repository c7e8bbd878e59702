"""`generate` of an attached model: its tokens are those of one dense forward over all of them, or it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig

from ismdata.attention.attachment import attach, detach
from ismdata.attention.generation import PrepareInputs
from ismdata.errors import UsageError
from tests.laws.test_laws_cache import glm_model
from tests.support.decoders import decoder
from tests.support.tiny import SIZES, VOCABULARY, tiny_model

FAMILIES = ["llama", "qwen2", "mistral", "gemma3", "phi3", "gpt_neox", "olmo2"]
NEW = 12


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (1, length), generator=generator)


def ends_of(kinds):
    """kv_end of a prompt, given the kind of each token: `c` context, `a` answer. Written from the definition."""
    ends = []
    for t, kind in enumerate(kinds):
        later = [u for u in range(t, len(kinds) + 1) if u == len(kinds) or kinds[u] != "c"]
        ends.append(later[0] if kind == "c" else t + 1)
    return torch.tensor([ends])


def ends_under(mask, kinds):
    """kv_end under a mask; all tokens are context under `prefix`."""
    if mask == "causal":
        return torch.arange(1, len(kinds) + 1)[None]
    return torch.full((1, len(kinds)), len(kinds)) if mask == "prefix" else ends_of(kinds)


def dense_logits(model, ids, prompt_ends):
    """The logits of one forward over one row without a cache, [T, V]."""
    length = ids.shape[1]
    ends = torch.arange(1, length + 1)[None].clone()
    ends[:, : prompt_ends.shape[1]] = prompt_ends
    with torch.no_grad():
        return model(input_ids=ids, doc_start=torch.zeros_like(ends), kv_end=ends).logits[0]


def greedy_by_forward(model, ids, prompt_ends, new=NEW):
    """The oracle: each token by one forward over the whole row."""
    for _ in range(new):
        ids = torch.cat([ids, dense_logits(model, ids, prompt_ends)[-1].argmax()[None, None]], dim=1)
    return ids


KINDS = "cccccaaaccccccaacccc"  # longer than the window of the sliding families


@pytest.mark.parametrize(
    ("name", "mask"), [*((each, "ism") for each in FAMILIES), ("llama", "causal"), ("mistral", "prefix")]
)
def test_greedy_tokens_are_those_of_dense_forwards(name, mask):
    model = attach(decoder(name), mask=mask)
    ids = prompt(len(KINDS))
    expected = greedy_by_forward(model, ids, ends_under(mask, KINDS))
    given = {} if mask == "causal" else {"kv_end": ends_under(mask, KINDS)}
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, **given), expected)
    for options in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"return_dict_in_generate": True}):
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, **given, **options)
        assert torch.equal(getattr(made, "sequences", made), expected), options


def test_the_mask_matters():
    """The tests above can fail: under another mask the model says something else."""
    model = attach(decoder("llama"), mask="ism")
    ids = prompt(len(KINDS))
    made = {mask: tuple(greedy_by_forward(model, ids, ends_under(mask, KINDS))[0].tolist()) for mask in MASKS}
    assert len(set(made.values())) == 3


MASKS = ("ism", "causal", "prefix")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("mask", MASKS)
def test_a_batch_padded_on_the_left_gives_the_tokens_of_each_prompt_alone(name, mask):
    model = attach(decoder(name), mask=mask)
    longest = len(KINDS)
    prompts, rows, ends, real = [], [], [], []
    for number, length in enumerate((longest, 3, 11)):
        kinds = KINDS[-length:]
        prompts.append((prompt(length, number), ends_under(mask, kinds)))
        padding = longest - length
        rows.append(torch.cat([torch.zeros(1, padding, dtype=torch.long), prompts[-1][0]], dim=1))
        ends.append(torch.cat([torch.arange(1, padding + 1)[None], prompts[-1][1] + padding], dim=1))
        real.append([0] * padding + [1] * length)
    given = {} if mask == "causal" else {"kv_end": torch.cat(ends)}
    batch = {"input_ids": torch.cat(rows), "attention_mask": torch.tensor(real), **given}
    made = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    for row, (ids, prompt_ends) in enumerate(prompts):
        alone = greedy_by_forward(model, ids, prompt_ends)[0]
        assert torch.equal(made[row, longest - ids.shape[1] :], alone)
    if mask == "prefix":  # one number says it for all rows: what lies before a prompt is padding
        batch["kv_end"] = torch.full_like(batch["input_ids"], longest)
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), made)


@pytest.mark.parametrize("mask", MASKS)
def test_the_scores_of_beams_are_those_of_dense_forwards(mask):
    """Each of the beams that transformers returns has the log-probability that one forward over it gives."""
    model = attach(decoder("mistral"), mask=mask)
    ids, ends = prompt(len(KINDS)), ends_under(mask, KINDS)
    given = {} if mask == "causal" else {"kv_end": ends}
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0, "do_sample": False}
    made = model.generate(ids, max_new_tokens=NEW, **given, **beams, return_dict_in_generate=True, output_scores=True)
    assert made.sequences.shape == (3, len(KINDS) + NEW)
    for sequence, score in zip(made.sequences, made.sequences_scores, strict=True):
        logits = dense_logits(model, sequence[None], ends).log_softmax(-1)
        chosen = logits[len(KINDS) - 1 : -1].gather(1, sequence[len(KINDS) :, None])
        torch.testing.assert_close(score.double(), chosen.sum(), rtol=0, atol=1e-4)  # stored as float32


def test_sampling_draws_from_the_logits_of_dense_forwards():
    model = attach(decoder("qwen2"), mask="ism")
    ids, ends = prompt(len(KINDS)), ends_of(KINDS)
    torch.manual_seed(0)
    made = model.generate(
        ids,
        kv_end=ends,
        max_new_tokens=NEW,
        do_sample=True,
        temperature=1.7,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert len({tuple(row.tolist()) for row in made.sequences}) == 3
    for row, sequence in enumerate(made.sequences):
        expected = dense_logits(model, sequence[None], ends)[len(KINDS) - 1 : -1]
        ours = torch.stack([step[row] for step in made.logits])
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)  # transformers stores float32


def test_a_cache_is_continued():
    """The first turn fills the cache; the second passes the whole row, and transformers feeds what is new."""
    model = attach(decoder("llama"), mask="ism")
    first = prompt(5)
    cache = DynamicCache(config=model.config)
    said = model.generate(first, kv_end=ends_of("ccccc"), past_key_values=cache, max_new_tokens=4, do_sample=False)
    ids = torch.cat([said, prompt(6, seed=1)], dim=1)
    kinds = "ccccc" + "aaaa" + "cccccc"
    made = model.generate(ids, kv_end=ends_of(kinds), past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made, greedy_by_forward(model, ids, ends_of(kinds)))


def test_chunks_of_a_prefill():
    """Exact where no context block is split, under `causal` anywhere; else refused."""
    ids = prompt(len(KINDS))
    model = attach(decoder("llama"), mask="causal")
    made = model.generate(ids, max_new_tokens=NEW, prefill_chunk_size=6, do_sample=False)
    assert torch.equal(made, greedy_by_forward(model, ids, ends_under("causal", KINDS)))
    with pytest.raises(UsageError, match=r"this call ends at token 3: a context block must go through .* as a whole"):
        model.generate(ids, kv_end=ends_of(KINDS), max_new_tokens=NEW, prefill_chunk_size=3)


def test_an_assistant_drafts():
    model, assistant = (attach(decoder("llama", seed=seed), mask="ism") for seed in (0, 1))
    ids = prompt(len(KINDS))
    made = model.generate(ids, kv_end=ends_of(KINDS), assistant_model=assistant, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made, greedy_by_forward(model, ids, ends_of(KINDS)))


@pytest.mark.parametrize("mask", ["ism", "prefix"])
def test_tokens_alone_are_refused(mask):
    """With lines to paste: generate with intervals, a session, many answers, and one for a prompt of one context."""
    model = attach(decoder("llama"), mask=mask)
    ids = prompt(6)
    with pytest.raises(UsageError, match=rf"under the mask {mask} .* which of their 6 tokens are a context") as refusal:
        model.generate(ids, max_new_tokens=2)
    message = str(refusal.value)
    for line in (
        "model.generate(**generation_inputs(model, tokenizer, [messages]), max_new_tokens=64)",
        "from ismdata.generate import generation_inputs",
        "kv_end=torch.full_like(input_ids, input_ids.shape[1])",
        "Session(model, tokenizer).reply('…')",
        "answer_many(model, tokenizer, [messages])",
        "from ismdata import Session, answer_many",
    ):
        assert line in message
    made = model.generate(ids, kv_end=torch.full_like(ids, ids.shape[1]), max_new_tokens=3, do_sample=False)
    assert torch.equal(made, greedy_by_forward(model, ids, torch.full((1, 6), 6), new=3))


def test_other_refusals():
    ids = prompt(6)
    with pytest.raises(UsageError, match=r"config records no mask.*attach\(model, mask='ism'\).*Session.*answer_many"):
        attach(decoder("llama")).generate(ids, max_new_tokens=2)
    model = attach(decoder("llama"), mask="causal")
    for options, message in (
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, r"expected padding on the left only.*answer_many"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}, "attention_mask=torch.ones_like"),
        ({"kv_end": torch.full((1, 6), 7)}, r"kv_end goes up to 7, and this call ends at token 6"),
        ({"kv_end": torch.full((1, 6), 5)}, "kv_end ends before its own token"),
        ({"kv_end": torch.full((2, 6), 6)}, r"kv_end is \[2, 6\]; expected one row for each of 1 prompts"),
        ({"cache_implementation": "static"}, r"a static cache .*Leave cache_implementation out.*answer_many"),
    ):
        with pytest.raises(UsageError, match=message):
            model.generate(ids, max_new_tokens=2, **options)
    model.generation_config = GenerationConfig(pad_token_id=int(ids[0, 3]))  # transformers takes it for padding
    with pytest.raises(UsageError, match="transformers made it from the padding tokens"):
        model.generate(ids, max_new_tokens=2)
    glm = attach(glm_model(torch.float64), mask="causal")
    with pytest.raises(UsageError, match=r"two positions per token, which generate does not count.*answer_many"):
        glm.generate(ids, max_new_tokens=2)


def test_a_detached_model_generates_as_before():
    ids = prompt(6)
    model = tiny_model()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    detach(attach(model, mask="ism"))
    assert "prepare_inputs_for_generation" not in vars(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    attach(attach(model, mask="causal"))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_generate_by_themselves(copied):
    model = attach(tiny_model(), mask="causal")
    ids = prompt(6)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    other = copied(model)
    prepare = vars(other)["prepare_inputs_for_generation"]
    assert isinstance(prepare, PrepareInputs)
    assert prepare._model() is other
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_a_model_is_freed_at_once():
    """Without a pass of the garbage collector, which would keep its memory for a while."""
    gc.disable()
    try:
        config = LlamaConfig(**SIZES)
        model = attach(AutoModelForCausalLM.from_config(config).eval(), mask="causal")
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
