"""Rotary angles that depend on the longest document of a batch: refused where documents would share them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from ismdata.attention.attachment import attach
from ismdata.data.collate import Collator
from ismdata.errors import UsageError
from tests.support.tiny import ANSWER, QUERY, SIZES, sample

STEADY = 40
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CONFIGS = {
    "longrope": lambda: Phi3Config(
        **SIZES,
        max_position_embeddings=256,
        original_max_position_embeddings=STEADY,
        rope_parameters=LONG | {"original_max_position_embeddings": STEADY},
    ),
    "dynamic": lambda: LlamaConfig(**SIZES, max_position_embeddings=STEADY, rope_parameters=DYNAMIC),
    "yarn": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 2.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": STEADY,
        },
    ),
}


def attached(kind):
    torch.manual_seed(0)
    return attach(AutoModelForCausalLM.from_config(CONFIGS[kind]()).double().eval())


def batch_of(*documents, mask="causal"):
    batch = Collator()([sample(list(documents), mask=mask)])
    batch.pop("labels")
    return batch


SHORT, LONGER = [(QUERY, 5), (ANSWER, 9)], [(QUERY, 30), (ANSWER, 30)]


@pytest.mark.parametrize("mask", ["causal", "ism"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_long_document_beside_others_is_refused(kind, mask):
    model = attached(kind)
    with pytest.raises(UsageError, match=r"2 documents, the longest of 60 tokens.*Pack with --seq-len 40 or less"):
        model(**batch_of(SHORT, LONGER, mask=mask))
    model(**batch_of(SHORT, SHORT, mask=mask))
    alone = batch_of(LONGER, mask=mask)
    stock = {"input_ids": alone["input_ids"][:, :60], "doc_start": alone["doc_start"][:, :60]}
    expected = model(**stock, kv_end=alone["kv_end"][:, :60]).logits
    torch.testing.assert_close(model(**alone).logits[:, :60], expected, rtol=0, atol=1e-9)


def test_angles_that_do_not_depend_on_the_batch_are_not_refused():
    model = attached("yarn")
    packed = model(**batch_of(SHORT, LONGER)).logits[0, :14]
    torch.testing.assert_close(packed, model(**batch_of(SHORT)).logits[0, :14], rtol=0, atol=1e-9)


def test_they_would_differ():
    """Why it is refused: the first document alone, with the angles of a longer one."""
    model = attached("longrope")
    batch = batch_of(SHORT)
    own = model(**batch).logits[0, :14]
    longer = batch["position_ids"].clone()
    longer[0, -1] = 2 * STEADY  # of padding
    assert (model(**{**batch, "position_ids": longer}).logits[0, :14] - own).abs().max() > 1e-3
