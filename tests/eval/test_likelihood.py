"""Compare losses with one conversation at a time in float64, and greedy answers with decoding without a cache."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig

from ismdata.attention.attachment import attach
from ismdata.attention.models.glm import IsmdataGlmConfig, IsmdataGlmForCausalLM
from ismdata.convert.pipeline import convert
from ismdata.data.collate import Collator
from ismdata.data.dataset import PackedDataset
from ismdata.errors import DataError, UsageError
from ismdata.eval import likelihood as likelihood_module
from ismdata.eval.answers import find_answers
from ismdata.eval.bootstrap import Bootstrap
from ismdata.eval.generation import generate_answers
from ismdata.eval.likelihood import answer_losses, likelihood, target_losses
from ismdata.generate import greedy
from ismdata.generate.greedy import Prompt, greedy_answers
from ismdata.generate.sampling import EndOfTurn
from ismdata.pack.pipeline import pack
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.oracle import Row
from tests.support.reporters import Recorder
from tests.support.tiny import ANSWER, PROMPT, QUERY, SIZES, VOCABULARY, sample, tiny_model, write_packed

CLOSE = {"rtol": 0, "atol": 1e-9}
MASKS = ("ism", "causal", "prefix")


def talks(count, *, seed=0, untrained=0.2):
    """Random conversations: an opening, then queries and answers; some answers are not trained."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        document = [(PROMPT, int(generator.integers(1, 4)))] if generator.random() < 0.5 else []
        for _ in range(generator.integers(1, 5)):
            document.append((QUERY, int(generator.integers(1, 6))))
            document.append((ANSWER, int(generator.integers(1, 7)), bool(generator.random() >= untrained)))
        yield document


def tokens_of(document, number):
    length = sum(part[1] for part in document)
    return np.random.default_rng(number).integers(3, VOCABULARY, length).tolist()


def packed_folder(folder, documents, *, mask, rows, seq_len=256, weighted=False):
    """Write the documents packed in `rows`, lists of document numbers; conversation ids are the numbers."""
    samples = []
    for row in rows:
        tokens = [token for number in row for token in tokens_of(documents[number], number)]
        weights = np.random.default_rng(len(samples)).random(seq_len).astype(np.float32) if weighted else None
        one = sample([documents[k] for k in row], seq_len=seq_len, mask=mask, tokens=tokens, loss_weight=weights)
        named = dataclasses.replace(one.sequence, conversation_ids=[str(number) for number in row])
        samples.append(dataclasses.replace(one, sequence=named))
    return PackedDataset(write_packed(folder, samples))


def in_rows(count, size, *, seed=None):
    order = list(range(count)) if seed is None else np.random.default_rng(seed).permutation(count).tolist()
    return [order[at : at + size] for at in range(0, count, size)]


def plain_log_probabilities(model, tokens, visible):
    """Log-probabilities of one document under the stock model with a dense mask, float64[tokens, V]."""
    mask = torch.full((1, 1, len(tokens), len(tokens)), -torch.inf, dtype=torch.float64)
    for row, keys in enumerate(visible):
        mask[0, 0, row, keys] = 0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), attention_mask=mask).logits
    return logits[0].log_softmax(-1)


def plain_losses(model, documents, mask):
    """(conversation, turn) -> summed loss and targets, by definition."""
    losses = {}
    for number, document in enumerate(documents):
        tokens = tokens_of(document, number)
        row = Row([[(length, kind, train[0] if train else True) for kind, length, *train in document]], len(tokens))
        log_probabilities = plain_log_probabilities(model, tokens, row.visible(mask))
        loss_mask, turn = row.loss_mask(mask), 0
        for start, end, kind, _ in row.spans:
            turn += kind == ANSWER
            targets = [t for t in range(start, end) if loss_mask[t]]
            if kind == ANSWER and targets:
                loss = -sum(float(log_probabilities[t - 1, tokens[t]]) for t in targets)
                losses[str(number), turn] = (loss, len(targets))
    return losses


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_losses_equal_those_of_each_conversation_alone(tmp_path, mask, batch_size):
    documents = list(talks(20))
    expected = plain_losses(tiny_model(), documents, mask)
    dataset = packed_folder(tmp_path / "p", documents, mask=mask, rows=in_rows(20, 4, seed=1))
    answers = find_answers(dataset.shards)
    reporter = Recorder()
    losses = answer_losses(attach(tiny_model()), dataset, answers, mask=mask, batch_size=batch_size, reporter=reporter)
    keys = list(zip(answers.conversation, answers.turn.tolist(), strict=True))
    assert len(set(keys)) == len(keys)  # each once
    found = {key: (loss, count) for key, loss, count in zip(keys, losses, answers.targets.tolist(), strict=True)}
    assert found.keys() == expected.keys()
    for key, (loss, count) in expected.items():
        assert found[key] == (pytest.approx(loss, abs=1e-8), count)
    assert reporter.steps[-1] == ("evaluate", 5, 5)


def by_answer(dataset, model, *, mask, **options):
    answers = find_answers(dataset.shards)
    losses = answer_losses(model, dataset, answers, mask=mask, **options)
    return answers, dict(zip(zip(answers.conversation, answers.digest, strict=True), losses.tolist(), strict=True))


def test_packing_changes_nothing(tmp_path):
    documents = list(talks(12, seed=3))
    model = attach(tiny_model())
    together = packed_folder(tmp_path / "a", documents, mask="ism", rows=in_rows(12, 6))
    apart = packed_folder(tmp_path / "b", documents, mask="ism", rows=in_rows(12, 1, seed=5), seq_len=128)
    first, first_losses = by_answer(together, model, mask="ism")
    second, second_losses = by_answer(apart, model, mask="ism", batch_size=5)
    assert first.sha256 == second.sha256
    assert first_losses == pytest.approx(second_losses, abs=1e-9)


def test_causal_losses_are_equal_on_both_shards_and_differ_from_ism(tmp_path):
    documents = list(talks(6, seed=4))
    model = attach(tiny_model())
    of_ism, of_causal = (packed_folder(tmp_path / m, documents, mask=m, rows=in_rows(6, 3)) for m in ("ism", "causal"))
    expected = by_answer(of_causal, model, mask="causal")[1]
    assert by_answer(of_ism, model, mask="causal")[1] == pytest.approx(expected, abs=1e-9)
    assert by_answer(of_ism, model, mask="ism")[1] != pytest.approx(expected, abs=1e-3)


def test_one_pass_gives_prefix_shards_their_last_answers_only(tmp_path):
    """The same documents packed for prefix: hashes identify the answers."""
    documents = list(talks(6, seed=4, untrained=0))
    of_ism, of_prefix = (packed_folder(tmp_path / m, documents, mask=m, rows=in_rows(6, 3)) for m in ("ism", "prefix"))
    every, last = (find_answers(dataset.shards) for dataset in (of_ism, of_prefix))
    wanted = {(each, digest) for each, digest in zip(every.conversation, every.digest, strict=True)}
    found = list(zip(last.conversation, last.digest, strict=True))
    assert len(found) == 6 and set(found) < wanted
    assert last.sha256 != every.sha256
    with pytest.raises(UsageError, match="packed for the mask 'prefix'"):
        answer_losses(attach(tiny_model()), of_prefix, last, mask="ism")


def test_weights_are_not_applied(tmp_path):
    documents = list(talks(4, seed=6))
    plain, weighted = (
        packed_folder(tmp_path / str(w), documents, mask="ism", rows=in_rows(4, 2), weighted=w) for w in (False, True)
    )
    model = attach(tiny_model())
    assert by_answer(weighted, model, mask="ism")[1] == by_answer(plain, model, mask="ism")[1]


def test_chunks_of_logits_and_heads_that_scale(monkeypatch):
    """The head is called directly on chunks, but not where the model scales the logits after it."""
    rows = [sample(list(talks(4, seed=k)), seq_len=128, seed=k) for k in (7, 8)]
    nothing = sample([[(QUERY, 5), (ANSWER, 3, False)]])
    batch = Collator()([rows[0], nothing, rows[1]])
    sizes = SIZES | {"attention_multiplier": 0.3}
    scaled = AutoModelForCausalLM.from_config(GraniteConfig(**sizes, logits_scaling=7.0)).double().eval()
    for model in (tiny_model(), scaled):
        attached = attach(model)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad():
            log_probabilities = attached(**inputs).logits[:, :-1].log_softmax(-1)
        target = batch["labels"][:, 1:]
        expected = -log_probabilities.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100]
        torch.testing.assert_close(target_losses(attached, batch), expected, **CLOSE)
        monkeypatch.setattr(likelihood_module, "_CHUNK_LOGITS", 3 * VOCABULARY)
        made = []
        attached.get_output_embeddings().register_forward_hook(
            lambda module, args, logits, made=made: made.append(logits.numel() // VOCABULARY)
        )
        torch.testing.assert_close(target_losses(attached, batch), expected, **CLOSE)
        # Two calls find out whether the head gives the model's logits; one call per chunk follows.
        in_chunks = len(made) == 2 + -(-len(expected) // 3) and max(made[2:]) <= 3
        assert in_chunks == (model is not scaled)
    assert len(target_losses(attached, Collator()([nothing]))) == 0


def test_a_loss_that_is_not_finite_is_reported(tmp_path):
    dataset = packed_folder(tmp_path / "p", list(talks(4)), mask="ism", rows=in_rows(4, 2))
    model = attach(tiny_model())
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(DataError, match=r"row 0: the loss of turn \d of 0 is nan"):
        answer_losses(model, dataset, find_answers(dataset.shards), mask="ism")


def test_likelihood_by_turn(tmp_path):
    documents = list(talks(30, seed=9))
    dataset = packed_folder(tmp_path / "p", documents, mask="ism", rows=in_rows(30, 5))
    answers = find_answers(dataset.shards)
    losses = np.random.default_rng(0).random(len(answers)) * answers.targets
    overall, by_turn = likelihood(answers, losses, Bootstrap(resamples=50))
    assert overall.nll.value == pytest.approx(losses.sum() / answers.targets.sum())
    assert overall.as_json()["perplexity"]["value"] == pytest.approx(np.exp(losses.sum() / answers.targets.sum()))
    assert list(by_turn) == sorted(set(answers.turn.tolist()))
    for turn, found in by_turn.items():
        chosen = answers.turn == turn
        assert found.nll.value == pytest.approx(losses[chosen].sum() / answers.targets[chosen].sum())
        assert found.conversations == found.answers == chosen.sum()
        low, high = found.nll.interval
        assert low <= found.nll.value <= high
    assert sum(found.target_tokens for found in by_turn.values()) == overall.target_tokens == answers.targets.sum()


# ---- generation ----


class Ending:
    next_turn_end_ids = frozenset()

    def __init__(self, *ids):
        self.end_of_turn_ids = list(ids)


def plain_greedy(model, context, visible, *, ending, stops, limit):
    """Greedy decoding with the stock model, without a cache."""
    tokens, visible = list(context), [list(keys) for keys in visible]
    answer = []
    while len(answer) < limit:
        token = int(plain_log_probabilities(model, tokens, visible)[-1].argmax())
        if token in stops and token not in ending:
            break
        answer.append(token)
        tokens.append(token)
        visible.append(list(range(len(tokens))))
        if ending and answer[-len(ending) :] == ending:
            return answer[: -len(ending)]
    for length in range(len(ending) - 1, 0, -1):
        if answer[-length:] == ending[:length]:
            return answer[:-length]
    return answer


@pytest.mark.parametrize("mask", MASKS)
def test_greedy_answers_equal_plain_decoding(tmp_path, monkeypatch, mask):
    documents = list(talks(8, seed=11))
    dataset = packed_folder(tmp_path / "p", documents, mask=mask, rows=in_rows(8, 3, seed=2))
    answers = find_answers(dataset.shards)
    stock, model = tiny_model(seed=3), attach(tiny_model(seed=3))
    options = {"mask": mask, "max_new_tokens": 8}
    first = generate_answers(model, Ending(), dataset, answers, range(len(answers)), **options)
    # Choose the end of turn and the stop token from tokens that the model generates.
    said = next(answer for answer in first if len(set(answer)) > 2)
    ending, stop = said[1:3], next(answer for answer in first if answer != said)[1]
    monkeypatch.setattr(greedy, "_BATCH_TOKENS", 120)
    for ids, stops in ([], set()), (ending, {stop}), (said[:1], {said[0], stop}):
        model.generation_config.eos_token_id = list(stops) or None
        found = generate_answers(model, Ending(*ids), dataset, answers, range(len(answers)), **options)
        for at, answer in enumerate(found):
            number, turn = int(answers.conversation[at]), int(answers.turn[at])
            document = documents[number]
            places = [k for k, part in enumerate(document) if part[0] == ANSWER]
            before = [(part[1], part[0], True) for part in document[: places[turn - 1]]]
            row = Row([[*before, (1, ANSWER, True)]], sum(part[0] for part in before) + 1)
            context = tokens_of(document, number)[: row.seq_len - 1]
            expected = plain_greedy(stock, context, row.visible(mask)[:-1], ending=ids, stops=stops, limit=8)
            assert answer == expected
    assert max(map(len, first)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
def test_greedy_answers_in_the_glm_layout(tmp_path, mask):
    """Each token comes from the logits of one forward over its predecessors, with positions computed here."""
    save_tokenizer(tmp_path / "tokenizer", "[MASK]", "<sop>")
    lines = []
    for number in range(5):
        said = [f"{word} {number}" for word in ("red", "a blue one", "green", "so", "one two", "south")]
        roles = ("user", "assistant") * 3
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)][: 2 + number]
        lines.append(json.dumps({"id": str(number), "messages": messages}) + "\n")
    (tmp_path / "talks.jsonl").write_text("".join(lines), encoding="utf-8")
    convert([str(tmp_path / "talks.jsonl")], tmp_path / "converted")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "chat_template": "chatml", "layout": "glm", "mask": mask}
    pack([tmp_path / "converted"], tmp_path / "packed", seq_len=256, **options)
    dataset = PackedDataset(tmp_path / "packed")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": dataset.shards.index["tokenizer"]["vocab_size"]}
    model = attach(IsmdataGlmForCausalLM(IsmdataGlmConfig(**sizes)).double().eval())
    answers = find_answers(dataset.shards)
    assert len(answers) > 5
    found = generate_answers(model, Ending(), dataset, answers, range(len(answers)), mask=mask, max_new_tokens=5)
    for at, answer in enumerate(found):
        assert len(answer) == 5
        sequence = dataset[int(answers.row[at])].sequence
        begin, start = int(answers.document[at]), int(answers.start[at])
        batch = Collator(mask)([dataset[int(answers.row[at])]])
        first, second = (batch[name][0, begin:start].tolist() for name in ("position_ids", "position_ids_2"))
        kv_end = (batch["kv_end"][0, begin:start] - begin).tolist()
        tokens = sequence.input_ids[begin:start].tolist()
        assert second[-1] == 1 and first[-1] == first[-2]  # [MASK], [START]
        for count, token in enumerate(answer, 2):
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([tokens]),
                    doc_start=torch.zeros(1, len(tokens), dtype=torch.int32),
                    kv_end=torch.tensor([kv_end], dtype=torch.int32),
                    position_ids=torch.tensor([first]),
                    position_ids_2=torch.tensor([second]),
                ).logits[0, -1]
            assert token == int(logits.argmax())
            tokens.append(token)
            kv_end.append(len(tokens))
            first.append(first[-1])
            second.append(count)


def prompt(length, limit):
    return Prompt(
        input_ids=np.arange(2, length + 2, dtype=np.int32),
        kv_end=np.full(length, length, np.int32),
        position_ids=np.arange(length, dtype=np.int32),
        position_ids_2=np.zeros(length, np.int32),
        limit=limit,
    )


def test_answers_end_at_their_limits():
    model, never = attach(tiny_model()), EndOfTurn(ids=(), stop_ids=frozenset())
    limits = [3, 0, -2, 8, 5]
    prompts = [prompt(length, limit) for length, limit in zip((7, 10, 12, 3, 0), limits, strict=True)]
    reporter = Recorder()
    found = greedy_answers(model, prompts, never, reporter=reporter)
    assert [len(answer) for answer in found] == [3, 0, 0, 8, 0]
    assert reporter.steps == [("generate", 5, 5)]
    assert greedy_answers(model, [], never) == []


def test_an_end_of_turn_is_cut_off_once(monkeypatch):
    """Tokens before the end may equal its beginning, and stay. A partial end of turn is removed."""
    end = EndOfTurn(ids=(7, 8), stop_ids=frozenset({9}))
    for said, expected in ([5, 7, 7, 8], [5, 7]), ([7, 9], []), ([7, 7, 9], [7]), ([8, 7, 7, 6, 7], [8, 7, 7, 6]):
        steps = iter(said)
        monkeypatch.setattr(greedy, "_forward", lambda *all, steps=steps, **named: torch.eye(61)[[next(steps)]])
        assert greedy_answers(attach(tiny_model()), [prompt(4, 5)], end) == [expected]


def test_generation_ends_with_the_positions(tmp_path):
    documents = [[(QUERY, 7), (ANSWER, 2)], [(QUERY, 10), (ANSWER, 2)], [(ANSWER, 3)]]
    dataset = packed_folder(tmp_path / "p", documents, mask="ism", rows=[[0, 1, 2]])
    answers, model = find_answers(dataset.shards), attach(tiny_model())
    model.config.max_position_embeddings = 10
    found = generate_answers(model, Ending(), dataset, answers, [1, 0, 2], mask="ism", max_new_tokens=8)
    assert [len(answer) for answer in found] == [0, 3, 0]
    with pytest.raises(UsageError, match="--max-new-tokens is 0"):
        generate_answers(model, Ending(), dataset, answers, [0], mask="ism", max_new_tokens=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", MASKS)
def test_a_gpu_gives_what_the_cpu_gives(tmp_path, mask):
    dataset = packed_folder(tmp_path / "p", list(talks(12, seed=13)), mask=mask, rows=in_rows(12, 4))
    answers = find_answers(dataset.shards)
    found, every = [], range(len(answers))
    for device in ("cpu", "cuda"):
        model = attach(tiny_model().to(device))
        losses = answer_losses(model, dataset, answers, mask=mask)
        options = {"mask": mask, "max_new_tokens": 8}
        found.append((losses, generate_answers(model, Ending(7), dataset, answers, every, **options)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-9)
    assert found[0][1] == found[1][1]
