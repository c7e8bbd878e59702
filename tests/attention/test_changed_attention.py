"""A model whose attention was changed after `attach` says so at its next forward, and never runs under another mask."""

from __future__ import annotations

import copy
import timeit

import pytest
import torch
from transformers import DynamicCache, Gemma3ForConditionalGeneration, PreTrainedModel

from ismdata.attention.attachment import attach, attached_backend, detach
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.canary import check_training
from ismdata.attention.layers import check_implementation, implementations
from ismdata.errors import UsageError
from tests.attention.test_attention import batch_of
from tests.support.tiny import checkpoint_activations, tiny_model

CHANGED = r"attached with the backend (sdpa|varlen).*has been changed to '.*documents would see each other.*attach\("


def set_on_the_model(model):
    model.set_attn_implementation("sdpa")


def set_eager(model):
    model.set_attn_implementation("eager")


def set_by_a_dict(model):
    model.set_attn_implementation({"": "sdpa"})


def set_on_the_config(model):
    model.config._attn_implementation = "sdpa"


def set_on_the_inner_model(model):
    model.model.set_attn_implementation("sdpa")


def set_on_the_inner_config(model):
    model.model.config._attn_implementation = "eager"


def set_on_one_layer(model):
    layer = model.model.layers[1].self_attn
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation = "sdpa"


def attach_another_model_of_the_same_config(model):
    attach(type(model)(model.config).double(), backend="flex")


CHANGES = [
    set_on_the_model,
    set_eager,
    set_by_a_dict,
    set_on_the_config,
    set_on_the_inner_model,
    set_on_the_inner_config,
    set_on_one_layer,
    attach_another_model_of_the_same_config,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_an_error_at_the_next_forward(change):
    model = attach(tiny_model())
    expected = model(**batch_of()).logits
    change(model)
    with pytest.raises(UsageError, match=CHANGED):
        model(**batch_of())
    with pytest.raises(UsageError, match=CHANGED):  # a decoded token, which has no intervals
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(UsageError, match=CHANGED):
        check_training(model)
    assert attached_backend(attach(model)) == "sdpa"
    torch.testing.assert_close(model(**batch_of()).logits, expected, rtol=0, atol=0)


def test_attaching_twice_under_other_backends_and_detaching():
    model = tiny_model()
    expected = attach(model, backend="sdpa")(**batch_of()).logits
    attach(model, backend="varlen")
    torch.testing.assert_close(attach(model, backend="varlen")(**batch_of()).logits, expected)
    set_on_the_model(model)
    with pytest.raises(UsageError, match=CHANGED):
        model(**batch_of())
    detach(model)
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_copies_notice_their_own_changes_only():
    model = attach(tiny_model())
    twin = copy.deepcopy(model)
    set_on_the_model(twin)
    model(**batch_of())
    with pytest.raises(UsageError, match=CHANGED):
        twin(**batch_of())


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    model = attach(tiny_model(dtype=torch.float32)).train()
    checkpoint_activations(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    model(**batch_of()).loss.backward()
    set_on_the_model(model)
    with pytest.raises(UsageError, match=CHANGED):
        model(**batch_of())


def test_inside_wrappers():
    model = attach(tiny_model())
    for wrapper in (torch.nn.DataParallel(model), torch.nn.Sequential(model)):
        inner = wrapper.module if isinstance(wrapper, torch.nn.DataParallel) else wrapper[0]
        assert inner is model
        check_training(wrapper)
    set_on_the_model(model)
    with pytest.raises(UsageError, match=CHANGED):
        torch.nn.DataParallel(model)(**batch_of())
    with pytest.raises(UsageError, match=CHANGED):
        check_training(torch.nn.Sequential(model))


@pytest.mark.slow
def test_a_compiled_model_notices_it():
    torch.compiler.reset()
    model = attach(tiny_model())
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch_of()).logits, model(**batch_of()).logits)
    set_on_the_model(model)
    with pytest.raises(UsageError, match=CHANGED):
        compiled(**batch_of())


def test_a_saved_model_is_loaded_unattached(tmp_path):
    """Its layers compute the stock attention; it is `ismdata.attention.load` that attaches."""
    attach(tiny_model(dtype=torch.float32), mask="ism").save_pretrained(tmp_path)
    loaded = PreTrainedModel.from_pretrained.__func__(type(tiny_model()), tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with pytest.raises(UsageError, match="not attached"):
        attached_backend(loaded)


def test_layers_with_a_configuration_of_their_own_are_attached_and_detached():
    model = tiny_model()
    expected = attach(copy.deepcopy(model))(**batch_of()).logits
    own = model.model.layers[1].self_attn
    own.config = copy.copy(own.config)
    attach(model)
    assert own.config._attn_implementation == BACKENDS["sdpa"].name
    torch.testing.assert_close(model(**batch_of()).logits, expected, rtol=0, atol=0)
    detach(model)
    assert {name for _, name in implementations(model)} == {"sdpa"}


def test_detaching_gives_each_part_its_own_attention_back():
    """A model for images and text, whose parts had different implementations."""
    text = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3ForConditionalGeneration.config_class(
        text_config=text | {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
        vision_config=vision | {"image_size": 28},
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = [name for _, name in implementations(model)]
    assert len(set(before)) == 2
    check_training(attach(model))
    detach(model)
    assert [name for _, name in implementations(model)] == before


def test_the_check_costs_nothing_to_speak_of():
    """Far less than a millisecond for a model of 100 layers: about 8 microseconds on a free core."""
    model = attach(tiny_model())
    layers = vars(model)["ismdata_attachment"].layers * 50
    assert len(layers) == 100
    check = lambda: check_implementation(model, layers, "sdpa", BACKENDS["sdpa"].name)  # noqa: E731
    assert min(timeit.repeat(check, number=10, repeat=10)) / 10 < 1e-3
