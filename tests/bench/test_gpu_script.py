"""benchmarks/gpu.py on a CPU with little data: each section runs, and failures are recorded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ismdata import masks
from ismdata.attention.backends.registry import BACKENDS
from ismdata.bench.attention.cases import YARDSTICK, random_inputs
from ismdata.bench.attention.workload import random_documents
from tests.bench.test_bench_attention import CPU as CPU
from tests.bench.test_bench_attention import HEADS as HEADS
from tests.bench.test_bench_attention import exact as exact
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # measures

# ---- the script for a GPU ----


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    return module


def call_of(gpu: ModuleType, folder: Path, said: list[str]) -> object:
    return gpu.Call(device=CPU, output=folder, small=True, say=said.append)


def test_sections_are_guarded_and_written_one_by_one(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def good(call: object) -> dict[str, object]:
        return gpu.verdict({"figure": 3}, [])

    def breaks(call: object) -> dict[str, object]:
        assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["good"]["findings"]["figure"] == 3
        raise ValueError("not this")

    def wrong(call: object) -> dict[str, object]:
        return gpu.verdict({"aims": ["an aim"]}, ["a law"])

    clock = iter([0.0, 0, 1, 1, 2, 2, 3, 9, 9])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu, "SECTIONS", {"good": good, "breaks": breaks, "wrong": wrong, "late": good})
    said: list[str] = []
    results = gpu.run(call_of(gpu, tmp_path, said), seconds=5)
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")) == results
    assert [section["ok"] for section in results.values()] == [True, False, False, False]
    assert any("Traceback" in line and "not this" in line for line in said)
    lines = gpu.summary(results)
    assert [line.split()[:2] for line in lines if not line.startswith(" ")] == [
        ["good", "ok"],
        ["breaks", "FAILED"],
        ["wrong", "FAILED"],
        ["late", "skipped"],
    ]
    assert [line.strip() for line in lines if line.startswith(" ")] == ["ValueError: not this", "an aim", "a law"]


def test_errors_are_measured_against_the_definition(gpu: ModuleType) -> None:
    workload = random_documents(64, rows=2, seed=0)
    inputs = random_inputs(workload, HEADS, CPU, torch.float64)
    for mask in masks.MASKS:
        for found, wanted in zip(gpu.exact(inputs, workload, mask), exact(inputs, workload, mask), strict=True):
            torch.testing.assert_close(found, wanted)
    found = gpu.errors((torch.tensor([3.0, 4.5]), torch.tensor([0.0])), (torch.tensor([3.0, 4.0]), torch.tensor([2.0])))
    assert found == {"output": pytest.approx(0.1), "query": 1.0}


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend `sdpa` that forgets what stands before the last 8 rows of a document's start, as a wrong kernel may."""
    dense = BACKENDS["sdpa"]

    def prepare(intervals: object) -> object:
        return dense.prepare(replace(intervals, doc_start=(intervals.doc_start - 8).clamp(min=0)))  # type: ignore[attr-defined, type-var]

    monkeypatch.setitem(BACKENDS, "sdpa", replace(dense, prepare=prepare))
    for name in ("flex", "varlen"):
        monkeypatch.delitem(BACKENDS, name)


@pytest.mark.usefixtures("deaf")
def test_a_wrong_kernel_is_found(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    call = call_of(gpu, tmp_path, said)
    found = gpu.correctness(call)
    assert len(found["wrong"]) > 9
    assert all("WRONG" in line for line in said)
    monkeypatch.setattr(gpu, "attach", lambda model, backend: model)
    model = attention_attached(gpu, call)
    assert gpu.law_2(model, "ism", call, "sdpa") > 1e-3
    assert gpu.law_4(model, "ism", call, "sdpa")[0] > 1e-3


def attention_attached(gpu: ModuleType, call: object) -> object:
    """A tiny model that was attached although its canary would refuse it."""
    from ismdata.attention import attachment as attention_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "check_attached", lambda *arguments: ())
        return attention_module.attach(gpu.tiny_model(call).eval(), "sdpa")


def test_right_kernels_pass(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BACKENDS, "flex")
    said: list[str] = []
    call = call_of(gpu, tmp_path, said)
    assert gpu.synchronisations(call)["wrong"] == []
    assert gpu.environment(call)["missing"] == {YARDSTICK: None, "sdpa": None, "varlen": None}
    assert gpu.laws(call)["wrong"] == []


def test_the_script_needs_no_more_than_the_core() -> None:
    """On the machine with the GPU there is neither `datasets` nor `typer`, and ismdata is not installed."""
    code = (
        "import sys, runpy\n"
        "for name in ('datasets', 'typer', 'trl', 'gigatoken', 'datasketch'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='gpu')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
