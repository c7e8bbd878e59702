"""`ismdata bench attention` and benchmarks/gpu.py on little: documents, arithmetic, what fails, what is left behind."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ismdata import masks
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.models.presets import preset_config
from ismdata.bench import timing
from ismdata.bench.attention import cases, yardstick
from ismdata.bench.attention import run as attention
from ismdata.bench.attention import training_steps as steps
from ismdata.bench.attention.cases import YARDSTICK, Heads, case, random_inputs
from ismdata.bench.attention.report import AttentionRow, StepRow, attention_table, picture, rate
from ismdata.bench.attention.workload import lay_out, random_documents, sharegpt_like
from ismdata.bench.timing import Lap, Outcome, Stopwatch, attempt, peak_bytes
from ismdata.cli.main import app
from tests.support.oracle import Row

pytestmark = pytest.mark.slow  # measures

CPU = torch.device("cpu")
HEADS = Heads(heads=4, kv_heads=2, width=16)


# ---- documents ----


def test_documents_are_as_long_as_sharegpts() -> None:
    """Quantiles of what is drawn, against the same of the corpus that was fitted: within a third."""
    workload = sharegpt_like(1 << 20, rows=2)
    lengths = np.concatenate(workload.seq_lens)
    for quantile, seen in ((50, 1300), (75, 2800), (90, 6000), (95, 9400)):
        assert np.percentile(lengths, quantile) == pytest.approx(seen, rel=1 / 3), quantile
    kinds = np.concatenate(workload.spans)
    sizes = {kind: (kinds[kinds[:, 2] == kind, 1] - kinds[kinds[:, 2] == kind, 0]) for kind in (1, 2)}
    assert np.median(sizes[masks.QUERY]) == pytest.approx(6 + 22, rel=0.2)
    assert np.median(sizes[masks.ANSWER]) == pytest.approx(217, rel=0.2)


@pytest.mark.parametrize("seq_len", [128, 1024])
def test_rows_are_full_and_the_same_each_time(seq_len: int) -> None:
    workload = sharegpt_like(seq_len, rows=3)
    assert workload.tokens == 3 * seq_len
    assert [sum(lens) for lens in workload.seq_lens] == [seq_len] * 3
    assert workload.pieces() == [length for lens in workload.seq_lens for length in lens]
    again, other = sharegpt_like(seq_len, rows=3), sharegpt_like(seq_len, rows=3, seed=1)
    assert again.seq_lens == workload.seq_lens
    assert all(np.array_equal(one, two) for one, two in zip(again.spans, workload.spans, strict=True))
    assert other.seq_lens != workload.seq_lens or any(map(np.any, map(np.not_equal, other.spans, workload.spans)))


@given(seed=st.integers(0, 2**32), seq_len=st.sampled_from([1, 7, 64]), mask=st.sampled_from(masks.MASKS))
@settings(max_examples=60)
def test_visible_pairs_are_counted_exactly(seed: int, seq_len: int, mask: str) -> None:
    """Against the oracle that asks of each token which it sees."""
    workload = random_documents(seq_len, rows=2, seed=seed)
    pairs = 0
    for lens, spans in zip(workload.seq_lens, workload.spans, strict=True):
        documents = []
        at = 0
        for length in lens:
            inside = spans[(spans[:, 0] >= at) & (spans[:, 1] <= at + length)]
            documents.append([(end - start, kind, 1) for start, end, kind, _ in inside.tolist()])
            at += length
        pairs += sum(map(len, Row(documents, seq_len).visible(mask)))
    assert workload.visible_pairs(mask) == pairs
    assert sum(workload.pieces()) == workload.tokens


def test_laying_out_pads_and_cuts() -> None:
    workload = lay_out([[[(1, 3), (2, 2)]], [[(1, 3), (2, 2)], [(1, 4), (2, 9)]]], 8)
    assert workload.seq_lens == ((5,), (5, 3))
    assert [spans.tolist() for spans in workload.spans] == [
        [[0, 3, 1, 0], [3, 5, 2, 1]],
        [[0, 3, 1, 0], [3, 5, 2, 1], [5, 8, 1, 0]],
    ]
    assert workload.pieces() == [5, 1, 1, 1, 5, 3]


# ---- time and memory ----


def test_the_peak_counts_what_tensors_hold_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB
        del first
        third = torch.empty(3000, 1000)  # 16 MB: 4 + 12
        del third
        return second

    held = torch.empty(1 << 20)
    assert peak_bytes(work, CPU) == 16_000_000
    del held
    assert peak_bytes(lambda: None, CPU) == 0


def test_what_was_there_before_is_no_part_of_the_peak() -> None:
    events = [
        {"ts": 3.0, "args": {"Addr": 9, "Bytes": -50}},  # taken before the record began
        {"ts": 1.0, "args": {"Addr": 1, "Bytes": 10}},
        {"ts": 4.0, "args": {"Addr": 2, "Bytes": 20}},
        {"ts": 2.0, "args": {"Addr": 1, "Bytes": -10}},
        {"ts": 5.0, "args": {"Addr": 1, "Bytes": 5}},
    ]
    assert timing._peak(events) == 25


def test_laps_are_means_over_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0, 100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: now[1])
    done: list[str] = []

    def work(name: str, *seconds: float) -> None:
        now[0] += seconds[done.count(name)]
        now[1] += 10
        done.append(name)

    laps = Stopwatch(CPU).laps(lambda: work("a", 1, 2), lambda: work("b", 5, 10), repeat=2)
    assert done == ["a", "b", "a", "b"]
    assert [lap.seconds for lap in laps] == [1.5, 7.5]
    assert [lap.processor for lap in laps] == [10, 10]


def test_what_goes_wrong_becomes_a_reason() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert attempt(lambda: None, CPU) == Outcome()
    memory = attempt(lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nmore")), CPU)
    assert memory == Outcome(reason="out of memory: CUDA out of memory. Tried 9 GiB.")
    memory = attempt(lambda: torch.empty(1 << 50), CPU)
    assert memory.reason.startswith("out of memory: ")
    assert not memory.unexpected
    other = attempt(lambda: fail(ValueError("no\nsuch")), CPU)
    assert (other.reason, other.unexpected) == ("failed: ValueError: no", True)
    assert "in fail" in other.trace


# ---- what is measured ----


def exact(inputs: cases.Inputs, workload: object, mask: str) -> tuple[torch.Tensor, ...]:
    """By the definition, one row of one head at a time."""
    doc_start, kv_end = workload.intervals(mask)  # type: ignore[attr-defined]
    query, key, value = inputs.leaves
    groups = query.shape[2] // key.shape[2]
    rows = []
    for sample in range(query.shape[0]):
        for row in range(query.shape[1]):
            seen = slice(int(doc_start[sample, row]), int(kv_end[sample, row]))
            for head in range(query.shape[2]):
                scores = key[sample, seen, head // groups] @ query[sample, row, head] / query.shape[3] ** 0.5
                rows.append(scores.softmax(0) @ value[sample, seen, head // groups])
    output = torch.stack(rows).view(query.shape)
    return output.detach(), *torch.autograd.grad(output, inputs.leaves, inputs.grad)


@pytest.mark.parametrize("name", [YARDSTICK, *BACKENDS])
def test_every_case_computes_attention(name: str) -> None:
    """Output and gradients of what the bench times, so that it times the right thing."""
    workload = lay_out([[[(0, 2), (1, 9), (2, 8), (1, 11), (2, 7)], [(1, 20), (2, 9)]]], 128)
    dtype = torch.float32 if name == "flex" else torch.float64
    inputs = random_inputs(workload, Heads(heads=2, kv_heads=1, width=16), CPU, dtype)
    for mask in masks.MASKS if name != YARDSTICK else ("causal",):
        made = case(name, mask, workload, inputs)
        assert made.pairs == workload.visible_pairs(mask)
        found = made.once()
        assert len(found) == (4 if made.forward_only is None else 1)
        for each, wanted in zip(found, exact(inputs, workload, mask), strict=False):
            torch.testing.assert_close(each, wanted)


def test_the_yardstick_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardstick.importlib.util, "find_spec", lambda name: None)
    assert "torch.nn.attention.varlen" in str(yardstick.missing(torch.device("cuda")))
    assert yardstick.missing(CPU) is None


def test_rates_and_ratios() -> None:
    workload = lay_out([[[(1, 4), (2, 4)]]], 8)
    base = attention._Run(backend=YARDSTICK, mask="causal", forward=[Lap(seconds=1.0)], backward=[Lap(seconds=2.0)])
    laps = [Lap(seconds=seconds, processor=seconds / 2) for seconds in (2.0, 9.0, 1.0)]
    run = attention._Run(backend="sdpa", mask="ism", forward=laps, backward=laps, first=[Lap(seconds=2.5)])
    row = attention._row(run, workload, HEADS, base=base)
    pairs = 4 * 4 + 5 + 6 + 7 + 8
    assert row.pairs == pairs
    assert row.forward_tflops == pytest.approx(4 * 16 * 4 * pairs / 2.0 / 1e12)
    assert row.backward_tflops == pytest.approx(2.5 * 4 * 16 * 4 * pairs / 2.0 / 1e12)
    assert row.tflops == pytest.approx(3.5 * 4 * 16 * 4 * pairs / 4.0 / 1e12)
    assert (row.forward, row.backward, row.once, row.ratio, row.forward_ratio) == (2.0, 2.0, 0.5, 4 / 3, 2.0)
    assert row.processor == 2.0
    alone = attention._Run(backend="flex", mask="ism", forward=laps)
    row = attention._row(alone, workload, HEADS, base=base)
    assert (row.forward, row.backward, row.ratio, row.forward_ratio, row.tflops) == (2.0, None, None, 2.0, None)


def test_the_step_trains_and_compares_masks() -> None:
    config = preset_config("tiny", vocab_size=64, seq_len=128)
    rows = steps.model_steps("tiny", config, sharegpt_like(128, rows=1), CPU, backends=["sdpa", "flex"], rounds=2)
    assert [(row.backend, row.mask) for row in rows] == [
        (backend, mask) for backend in ("sdpa", "flex") for mask in ("causal", "ism", "prefix")
    ]
    for row in rows:
        if row.backend == "flex":
            assert "backward" in row.note
            assert row.seconds is None
        else:
            assert (row.note, len(row.details["laps"])) == ("", 2)
            assert row.peak_bytes > 0  # type: ignore[operator]
            assert row.tokens_per_second == pytest.approx(128 / row.seconds)  # type: ignore[operator]
            assert (row.ratio == 1) == (row.mask == "causal")
        assert not row.failed


def test_a_step_changes_the_weights() -> None:
    torch.manual_seed(0)
    trainer = steps._Trainer(preset_config("tiny", vocab_size=64, seq_len=128), CPU)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    from ismdata.attention.attachment import attach

    attach(trainer.model, "sdpa")
    trainer.step(steps._batch(sharegpt_like(128, rows=1), "ism", 64, "sdpa", CPU))
    assert all((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))


# ---- the command ----


def bench(*words: str) -> object:
    return CliRunner().invoke(app, ["bench", "attention", "--device", "cpu", "--rounds", "1", *words])


def test_one_command_measures_and_leaves_two_files(tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = bench("-o", str(output), "--seq-len", "128,256", "--only", "attention", "--json")
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.svg"]
    results = json.loads((output / "bench.json").read_text(encoding="utf-8"))
    assert json.loads(result.stdout) == results  # type: ignore[attr-defined]
    rows = [AttentionRow(**row) for row in results["attention"]]
    assert results["steps"] == results["losses"] == []
    cells = [(YARDSTICK, "causal"), *((backend, mask) for backend in BACKENDS for mask in masks.MASKS)]
    assert [(row.seq_len, row.rows, row.backend, row.mask) for row in rows] == [
        (seq_len, 256 // seq_len, *cell) for seq_len in (128, 256) for cell in cells
    ]
    for row in rows:
        assert row.pairs == sharegpt_like(row.seq_len, rows=row.rows).visible_pairs(row.mask)
        assert row.forward > 0  # type: ignore[operator]
        assert row.peak_bytes > 0  # type: ignore[operator]
        assert (row.backward is None) == (row.backend == "flex")
        assert not row.failed
    svg = ElementTree.parse(output / "bench.svg").getroot()
    texts = [each.text or "" for each in svg if each.tag.endswith("text")]
    assert sum(text == "varlen, ism" for text in texts) == 2
    assert any("document by document" in text for text in texts)
    assert result.stderr.count("T 128 × 2 · ") == len(cells)  # type: ignore[attr-defined] # each row as it comes


def test_what_fails_or_is_missing_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("kernel launch failed\nat 0x0")

    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], compute=broken))
    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], missing=lambda device: "no kernels here"))
    result = bench("-o", str(tmp_path / "out"), "--seq-len", "128", "--only", "attention")
    assert result.exit_code == 1  # type: ignore[attr-defined]
    rows = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))["attention"]
    by_backend = {row["backend"]: row for row in rows}
    assert by_backend["flex"]["note"] == "failed: RuntimeError: kernel launch failed"
    assert by_backend["flex"]["failed"]
    assert "broken" in by_backend["flex"]["details"]["trace"]
    assert (by_backend["varlen"]["note"], by_backend["varlen"]["failed"]) == ("no kernels here", False)
    assert by_backend["sdpa"]["ratio"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "speed"], "expected one of attention, step, loss, sdpa"),
        (["--rounds", "0"], "expected 1 or more"),
        (["--seq-len", "2048,1000"], "expected multiples of 128 separated by commas"),
        (["--seq-len", "2048;4096"], "expected multiples of 128 separated by commas"),
        (["--seq-len", "0"], "expected multiples of 128 separated by commas"),
        (["--device", "tpu"], "expected one of auto, cpu, cuda"),
    ],
)
def test_calls_that_cannot_be(words: list[str], said: str, tmp_path: Path) -> None:
    result = bench("-o", str(tmp_path / "out"), *words)
    assert result.exit_code == 2  # type: ignore[attr-defined]
    assert said in result.stderr  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    result = bench("-o", str(tmp_path / "out"), "--device", "cuda")
    assert result.exit_code == 2  # type: ignore[attr-defined]
    assert "torch finds no CUDA device" in result.stderr  # type: ignore[attr-defined]


def test_lengths_in_words() -> None:
    assert attention.parse_seq_lens(" 256, 128,256", CPU) == (256, 128)
    assert attention.parse_seq_lens(None, CPU) == attention.SEQ_LENS["cpu"]
    assert attention.parse_seq_lens(None, torch.device("cuda")) == (2048, 8192, 32768)


# ---- what is shown ----


def results_of(*rows: AttentionRow | StepRow) -> dict[str, object]:
    return {
        "machine": {"processor": "a < b", "cores": 2, "memory_bytes": 2**30, "python": "3", "versions": {"torch": "2"}},
        "device": {"name": "GPU"},
        "options": {"heads": vars(HEADS), "dtype": "bfloat16", "yardstick": "plain & causal"},
        "attention": [row.as_json() for row in rows if isinstance(row, AttentionRow)],
        "steps": [row.as_json() for row in rows if isinstance(row, StepRow)],
        "losses": [],
    }


SHAPE = {"mask": "ism", "seq_len": 8192, "rows": 4}
ROWS = [
    AttentionRow(backend=YARDSTICK, pairs=1, forward=1.0, backward=2.0, tflops=300.0, ratio=1.0, **SHAPE),
    AttentionRow(backend="varlen", pairs=1, forward=1.0, backward=3.0, tflops=150.0, ratio=4 / 3, **SHAPE),
    AttentionRow(backend="flex", pairs=1, forward=1.0, forward_tflops=75.0, forward_ratio=1.0, note="x < y", **SHAPE),
    AttentionRow(backend="sdpa", pairs=1, note="out of memory: 9 GiB", **SHAPE),
    StepRow(model="1b", backend="varlen", seconds=0.2, tokens_per_second=4e4, ratio=1.03, **SHAPE),
]


def test_bars_are_drawn_to_scale() -> None:
    root = ElementTree.fromstring(picture(results_of(*ROWS)))
    bars = [each for each in root if each.attrib.get("height") == "16"]
    longest = float(bars[0].attrib["width"])
    assert [float(bar.attrib["width"]) / longest for bar in bars] == pytest.approx([1, 0.5, 0.25, 1], abs=1e-3)
    assert [bar.attrib["opacity"] for bar in bars] == ["1", "1", "0.45", "1"]
    (line,) = (each for each in root if each.tag.endswith("line"))
    assert float(line.attrib["x1"]) == pytest.approx(float(bars[0].attrib["x"]) + longest)
    texts = [each.text for each in root if each.tag.endswith("text")]
    assert "out of memory: 9 GiB" in texts
    assert any("1.33 × the yardstick’s time" in str(text) for text in texts)
    assert any("1.03 × causal" in str(text) for text in texts)


def test_the_table_is_its_json() -> None:
    results = results_of(*ROWS)
    view = attention_table(results)
    assert view.as_json() == results
    assert [len(row.cells()) for row in ROWS[:2]] == [12, 12]
    first, second = view.drawing.renderables  # type: ignore[union-attr]
    assert (first.row_count, second.row_count) == (4, 1)
    assert (len(first.columns), len(second.columns)) == (12, 10)
    assert ROWS[2].line() == "T 8,192 × 4 · flex · ism · forward 1,000 ms · forward 75.0 TFLOP/s · yardstick " + (
        "1.0000 × forward · x < y"
    )
    assert [rate(value) for value in (None, 484.0, 4.0, 0.031)] == ["", "484 TFLOP/s", "4.00 TFLOP/s", "31.0 GFLOP/s"]
