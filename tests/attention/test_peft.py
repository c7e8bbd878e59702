"""peft around an attached model: adapters of weights work as around the stock model; tokens of its own are refused."""

from __future__ import annotations

import copy

import pytest
import torch

from ismdata import masks
from ismdata.attention.attachment import attach, detach
from ismdata.data.collate import Collator
from ismdata.errors import UnsupportedModelError, UsageError
from ismdata.generate.session import Session
from tests.laws.test_laws_cache import TextEncoder
from tests.support.tiny import ANSWER, QUERY, sample, tiny_model

#: What peft says about its own adapters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:Sparse invariant checks:UserWarning")

peft = pytest.importorskip("peft")
DOCUMENTS = [[(QUERY, 5), (ANSWER, 4), (QUERY, 3), (ANSWER, 6)], [(QUERY, 7), (ANSWER, 9)]]
TOKENS = 34
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
#: Adapters of weights, with what their configuration needs here.
ADAPTERS = {
    "LORA": PROJECTIONS,
    "BOFT": {**PROJECTIONS, "boft_block_size": 4},
    "BEFT": PROJECTIONS,
    "C3A": {**PROJECTIONS, "block_size": 8},
    "DEFT": PROJECTIONS,
    "DELORA": PROJECTIONS,
    "FOURIERFT": {**PROJECTIONS, "n_frequency": 10},
    "FROD": PROJECTIONS,
    "GLORA": PROJECTIONS,
    "GRALORA": PROJECTIONS,
    "HIRA": PROJECTIONS,
    "HRA": {**PROJECTIONS, "r": 2},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": PROJECTIONS,
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": PROJECTIONS,
    "LOKR": PROJECTIONS,
    "MISS": {**PROJECTIONS, "r": 4},
    "OFT": {**PROJECTIONS, "oft_block_size": 8, "r": 0},
    "OSF": PROJECTIONS,
    "PEANUT": PROJECTIONS,
    "POLY": PROJECTIONS,
    "PSOFT": {**PROJECTIONS, "r": 4},
    "PVERA": {"target_modules": ["q_proj"], "r": 4},
    "RANDLORA": {"target_modules": ["q_proj"], "r": 4},
    "ROAD": {**PROJECTIONS, "group_size": 8},
    "SHIRA": {**PROJECTIONS, "r": 2},
    "SUPERTUNING": PROJECTIONS,
    "TINYLORA": PROJECTIONS,
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5]},
    "UNILORA": PROJECTIONS,
    "VBLORA": {**PROJECTIONS, "vector_length": 4, "num_vectors": 8, "r": 2},
    "VERA": {"target_modules": ["q_proj"], "r": 4},
    "WAVEFT": {**PROJECTIONS, "n_frequency": 8},
}
#: Those that put tokens before a row.
VIRTUAL_TOKENS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
}
#: Those that put keys before a row.
VIRTUAL_KEYS = {"PREFIX_TUNING": {"num_virtual_tokens": 3}, "CARTRIDGE": {"num_virtual_tokens": 3}}
#: Those that call the model's `forward` past its hooks.
PAST_HOOKS = {
    "ADALORA": {**PROJECTIONS, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "SHADOW": {},
}
#: Those that need more than a model to be made: a set of adapters, scikit-learn.
NOT_TRIED = {"XLORA", "ADAMSS"}


def config_of(kind, **options):
    if kind not in peft.PeftType.__members__:
        pytest.skip(f"this release of peft has no {kind}")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](task_type="CAUSAL_LM", **options)


def wrapped(kind, **options):
    """An attached model inside peft's wrapper, with random adapters."""
    torch.manual_seed(0)
    model = peft.get_peft_model(attach(tiny_model(dtype=torch.float32), mask="ism"), config_of(kind, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch_of(kind=""):
    tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    return {**Collator()([sample(DOCUMENTS, mask="ism")]), **tasks}


def test_every_type_of_peft_is_known():
    known = {*ADAPTERS, *VIRTUAL_TOKENS, *VIRTUAL_KEYS, *PAST_HOOKS, *NOT_TRIED}
    assert set(peft.PeftType.__members__) <= known | {"BONE"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_weights_give_the_logits_of_the_stock_model(kind):
    """The oracle: the same adapters around the stock model, under eager attention and an explicit mask."""
    model, batch = wrapped(kind, **ADAPTERS[kind]), batch_of(kind)
    with torch.no_grad():
        output = model(**batch)
        plain = attach(tiny_model(dtype=torch.float32))(**batch_of())
    oracle = copy.deepcopy(model)
    detach(oracle.get_base_model())
    oracle.get_base_model().set_attn_implementation("eager")
    sees = torch.from_numpy(masks.dense(batch.pop("doc_start").numpy(), batch.pop("kv_end").numpy()))[:, None]
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "position_ids", "task_ids")}
    with torch.no_grad():
        expected = oracle(**inputs, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(output.logits[:, :TOKENS], expected[:, :TOKENS], rtol=0, atol=1e-4)
    assert (output.logits - plain.logits).abs().max() > 1e-2  # the adapters do something
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("kind", VIRTUAL_TOKENS)
def test_virtual_tokens_are_refused(kind):
    model = wrapped(kind, **VIRTUAL_TOKENS[kind])
    with pytest.raises(UsageError, match=r"3 more than the batch has intervals for. Virtual tokens of peft.*LoRA"):
        model(**batch_of(kind))
    assert_generate_is_refused(model, kind)


@pytest.mark.parametrize("kind", VIRTUAL_KEYS)
def test_virtual_keys_are_refused(kind):
    model = wrapped(kind, **VIRTUAL_KEYS[kind])
    with pytest.raises(UsageError, match=r"the cache has 3 keys, which doc_start and kv_end do not count.*LoRA"):
        model(**batch_of(kind))
    one_context = {**batch_of(kind), "kv_end": torch.full((1, 128), 128, dtype=torch.int32)}
    with pytest.raises(UsageError, match="the cache has 3 keys"):
        model(**one_context)
    assert_generate_is_refused(model, kind)


def assert_generate_is_refused(model, kind):
    ids = torch.arange(2, 8)[None]
    tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if kind == "MULTITASK_PROMPT_TUNING" else {}
    for mask in ("ism", "causal"):
        model.base_model.config.ismdata_mask = mask
        for given in ({}, {"kv_end": torch.full((1, 6), 6)}, {"use_cache": False}):
            with pytest.raises((UsageError, ValueError)):
                model.generate(input_ids=ids, max_new_tokens=2, **given, **tasks)


@pytest.mark.parametrize("kind", PAST_HOOKS)
def test_wrappers_that_call_forward_past_the_hooks_are_refused(kind):
    with pytest.raises(UnsupportedModelError, match=r"got no interval_mask.*or its `forward` \(peft's AdaLoRA"):
        wrapped(kind, **PAST_HOOKS[kind])(**batch_of())


def test_activated_lora_is_refused():
    model = wrapped("LORA", **PROJECTIONS, alora_invocation_tokens=[5])
    with pytest.raises(UnsupportedModelError, match=r"from the last invocation in a row on, whichever document"):
        model(**batch_of())


@pytest.mark.parametrize("kind", ["LORA", *VIRTUAL_TOKENS, *VIRTUAL_KEYS])
def test_attaching_after_peft(kind):
    """The wrapper is refused with the order that works. Its inside can be attached, and is held to the same checks."""
    options = PROJECTIONS if kind == "LORA" else {**VIRTUAL_TOKENS, **VIRTUAL_KEYS}[kind]
    model = peft.get_peft_model(tiny_model(dtype=torch.float32), config_of(kind, **options)).eval()
    with pytest.raises(UnsupportedModelError, match="Attach the model first and wrap it afterwards"):
        attach(model)
    attach(model.get_base_model(), mask="ism")
    if kind == "LORA":
        assert torch.isfinite(model(**batch_of()).loss)
        return
    with pytest.raises(UsageError, match=r"of peft|that peft puts"):
        model(**batch_of(kind))


@pytest.mark.parametrize("kind", [*VIRTUAL_TOKENS, *VIRTUAL_KEYS])
def test_a_session_refuses_virtual_tokens_at_its_start(kind):
    model = wrapped(kind, **{**VIRTUAL_TOKENS, **VIRTUAL_KEYS}[kind])
    with pytest.raises(UnsupportedModelError, match=f"{kind} of peft puts virtual tokens before a row"):
        Session(model, TextEncoder(), mask="ism")


def test_a_session_inside_peft():
    """With LoRA it gives the answers of the merged model, also after an undo."""
    model = wrapped("LORA", **PROJECTIONS)
    merged = copy.deepcopy(model).merge_and_unload()
    sessions = [Session(each, TextEncoder(), max_new_tokens=5) for each in (model, merged)]
    for session in sessions:
        session.reply("one")
        session.reply("two")
        session.undo()
        session.reply("three")
    assert sessions[0].fed == sessions[1].fed


def test_generate_with_lora():
    model = wrapped("LORA", **PROJECTIONS)
    ids = torch.arange(2, 8)[None]
    ends = torch.full_like(ids, 6)
    with pytest.raises(UsageError, match="under the mask ism"):
        model.generate(input_ids=ids, max_new_tokens=2)
    made = model.generate(input_ids=ids, kv_end=ends, max_new_tokens=6, do_sample=False)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged.generate(ids, kv_end=ends, max_new_tokens=6, do_sample=False), made)
    tokens = ids
    for _ in range(6):
        kv_end = torch.arange(1, tokens.shape[1] + 1)[None].clamp(min=6)
        with torch.no_grad():
            logits = model(input_ids=tokens, doc_start=torch.zeros_like(kv_end), kv_end=kv_end).logits
        tokens = torch.cat([tokens, logits[0, -1].argmax()[None, None]], dim=1)
    assert torch.equal(made, tokens)
