"""Check and time everything that needs a GPU, in one call.

    PYTHONPATH=. python benchmarks/gpu.py -o DIR [--seconds 460]
    PYTHONPATH=. python benchmarks/gpu.py -o DIR --device cpu --small     # the script itself, tried without a GPU

Needs torch, transformers and the core requirements of ismdata, no network. Sections run in the order of SECTIONS. If
one fails, the others still run. DIR/gpu.json is written after each section. Exit code 1 if a section failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.canary import check_training
from ismdata.bench.attention.cases import YARDSTICK, Case, Heads, Inputs, case, missing, random_inputs
from ismdata.bench.attention.run import device_facts, run_attention_bench
from ismdata.bench.attention.training_steps import base_config, model_steps, one_billion_config
from ismdata.bench.attention.workload import Workload, lay_out, random_documents, sharegpt_like
from ismdata.bench.report import machine
from ismdata.bench.timing import attempt, find_device, peak_bytes, release
from ismdata.data.collate import Collator
from ismdata.data.dataset import Sample
from ismdata.display import LogReporter

#: A backend's error may be so many times plain FlashAttention's own, and is nothing to speak of below the second.
ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-5
#: Memory may grow so much when T doubles.
LINEAR = 2.2
#: Logits that must stay may differ by so much of the largest one: so many eps of their dtype, and at least.
STILL, LEAST = 4, 4e-6
VOCABULARY = 512

#: What is aimed at: a layer's forward + backward under ism at T = 8192 over the yardstick's, and a step of 1 B under
#: ism over the causal one.
AIMS, STEP_AIM = {"varlen": 1.15, "flex": 2.5}, 1.05

#: Two documents for the laws.
TALK = [(masks.PROMPT, 9), (masks.QUERY, 40), (masks.ANSWER, 31), (masks.QUERY, 25), (masks.ANSWER, 26)]
OTHER = [(masks.QUERY, 71), (masks.ANSWER, 62)]

Findings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Call:
    """What was asked for. `small`: sizes that a processor takes a minute for."""

    device: torch.device
    output: Path
    small: bool
    say: Callable[[str], None]

    @property
    def dtype(self) -> torch.dtype:
        """What models compute in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def backends(self, *, training: bool = False) -> list[str]:
        """Those that run here, or train here."""
        return [
            name
            for name, backend in BACKENDS.items()
            if backend.missing(self.device) is None and not (training and backend.missing_for_training(self.device))
        ]


class Wrong(Exception):
    """A section found something that is not as it must be."""


def environment(call: Call) -> Findings:
    """The machine, the versions, and why a backend is missing."""
    reasons = {name: missing(name, call.device) for name in (YARDSTICK, *BACKENDS)}
    training = {name: backend.missing_for_training(call.device) for name, backend in BACKENDS.items()}
    return {
        "machine": machine(),
        "device": device_facts(call.device),
        "missing": reasons,
        "missing_for_training": training,
    }


# ---- correctness ----


def exact(inputs: Inputs, workload: Workload, mask: str) -> tuple[Tensor, ...]:
    """Output and gradients by the definition, in float64: softmax over the dense mask."""
    wide = inputs.to(inputs.query.device, torch.float64)
    query, key, value = (each.transpose(1, 2) for each in wide.leaves)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    sees = torch.from_numpy(masks.dense(*workload.intervals(mask))).to(query.device)[:, None]
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~sees, float("-inf"))
    output = (scores.softmax(-1) @ value).transpose(1, 2)
    return output.detach(), *torch.autograd.grad(output, wide.leaves, wide.grad)


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """Norm of the difference over the norm, of the output and of each gradient there is."""
    names = ("output", "query", "key", "value")
    return {
        name: float((each.double() - wanted).norm() / wanted.norm())
        for name, each, wanted in zip(names, found, expected, strict=False)
    }


def correctness(call: Call) -> Findings:
    """Each backend in bfloat16 against float64, beside plain causal FlashAttention on the same inputs."""
    seq_len = 256 if call.small else 1024
    shapes = [Heads(heads=8, kv_heads=2, width=64), Heads(heads=4, kv_heads=1, width=128)]
    shapes.append(Heads(heads=4, kv_heads=4, width=256))
    rows, wrong = [], []
    for number, heads in enumerate(shapes):
        workload = random_documents(seq_len, rows=2, seed=number)
        inputs = random_inputs(workload, heads, call.device, torch.bfloat16, seed=number)
        base = errors(case(YARDSTICK, "causal", workload, inputs).once(), exact(inputs, workload, "causal"))
        for name, mask in product(call.backends(), masks.MASKS):
            found = errors(case(name, mask, workload, inputs).once(), exact(inputs, workload, mask))
            row = {"heads": vars(heads), "backend": name, "mask": mask, "errors": found, "plain": base}
            rows.append(row)
            bad = [part for part, error in found.items() if not error <= ERROR_FACTOR * base[part] + ERROR_FLOOR]
            worst = max(error / base[part] for part, error in found.items())
            call.say(f"  D {heads.width}, {name}, {mask}: {worst:.2f} x plain {'WRONG: ' + str(row) if bad else ''}")
            wrong += [f"{name} {mask} D {heads.width}: {part} {found[part]:.2e} ({base[part]:.2e})" for part in bad]
    return verdict({"rows": rows}, wrong)


def verdict(findings: Findings, wrong: list[str]) -> Findings:
    """The findings, with what is wrong in them."""
    return findings | {"wrong": wrong}


# ---- models ----


def tiny_model(call: Call, *, layers: int = 2) -> PreTrainedModel:
    """A Llama with heads that kernels take, and weights wide enough that a token's change shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(call.device, call.dtype)


def batch_of(workload: Workload, mask: str, call: Call, backend: str) -> dict[str, Tensor]:
    """The Collator's batch with random tokens, on the device."""
    samples = [Sample(sequence=row, mask=mask) for row in workload.sequences(mask, vocab_size=VOCABULARY)]
    batch = Collator(mask, tables=bool(BACKENDS[backend].tables))(samples)
    return {name: tensor.to(call.device) for name, tensor in batch.items()}


def repeated(batch: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """The only row of a batch several times; tables that hold for the whole batch are left for the backend to make."""
    return {
        name: tensor.repeat(times, *[1] * (tensor.dim() - 1))
        for name, tensor in batch.items()
        if not name.startswith("varlen_") and name != "labels"
    }


def laws(call: Call) -> Findings:
    """Law 2 (packing changes nothing) and law 4 (perturbation) inside a model, and the canary of a training."""
    wrong: list[str] = []
    findings: Findings = {}
    for backend in call.backends():
        model = attach(tiny_model(call).eval(), backend)
        for mask in masks.MASKS:
            packing, leak, share = law_2(model, mask, call, backend), *law_4(model, mask, call, backend)
            limit = max(STILL * torch.finfo(call.dtype).eps, LEAST)
            findings[f"{backend} {mask}"] = {"packing": packing, "leak": leak, "seen": share, "limit": limit}
            call.say(
                f"  {backend}, {mask}: packing {packing:.1e}, leak {leak:.1e}, seen {share:.2f}; limit {limit:.1e}"
            )
            if not packing <= limit:
                wrong.append(f"law 2, {backend}, {mask}: logits differ by {packing:.2e} of the largest")
            if not leak <= limit or not share > 0.5:
                wrong.append(f"law 4, {backend}, {mask}: leak {leak:.2e}, seen {share:.2f}")
        if backend in call.backends(training=True):
            outcome = attempt(partial(canary, model, call), call.device)
            wrong += [f"canary, {backend}: {outcome.reason}"] if outcome.reason else []
    return verdict(findings, wrong)


def canary(model: PreTrainedModel, call: Call) -> None:
    """The canary of a training in the model's own precision, and as `train` has it on a GPU: float32 under autocast."""
    check_training(model)
    check_training(model.float(), autocast=torch.bfloat16)


def law_2(model: PreTrainedModel, mask: str, call: Call, backend: str) -> float:
    """The largest difference between a document's logits alone and packed, relative to the largest logit: before other
    documents and, at another place of its row, after one.
    """
    alone, packed, moved = (lay_out([documents], 384) for documents in ([TALK], [TALK, OTHER], [OTHER, TALK]))
    length, before = alone.seq_lens[0][0], moved.seq_lens[0][0]
    tokens = batch_of(packed, mask, call, backend)["input_ids"][:, :length]
    logits = []
    for workload, at in ((alone, 0), (packed, 0), (moved, before)):
        batch = batch_of(workload, mask, call, backend)
        batch["input_ids"][:, at : at + length] = tokens
        with torch.no_grad():
            logits.append(model(**batch).logits[0, at : at + length].float())
    return max(float((each - logits[0]).abs().max() / logits[0].abs().max()) for each in logits[1:])


def law_4(model: PreTrainedModel, mask: str, call: Call, backend: str) -> tuple[float, float]:
    """What changes in rows that must not see a changed token (relative to the largest logit), and the share of rows
    that see one and change.
    """
    workload = lay_out([[OTHER, TALK]], 384)
    places = torch.arange(1, workload.seq_len, 24, device=call.device)
    batch = repeated(batch_of(workload, mask, call, backend), len(places) + 1)
    copy = torch.arange(1, len(places) + 1, device=call.device)
    batch["input_ids"][copy, places] = (batch["input_ids"][copy, places] + VOCABULARY // 2) % VOCABULARY
    with torch.no_grad():
        logits = model(**batch).logits.float()
    change = (logits[1:] - logits[0]).abs().amax(-1) / logits[0].abs().max()  # [changed tokens, T rows]
    sees = torch.from_numpy(masks.dense(*workload.intervals(mask))[0]).to(call.device)[:, places].T
    return float(change[~sees].max()), float((change[sees] > 0).float().mean())


def synchronisations(call: Call) -> Findings:
    """How often forward and backward wait for the device, with few layers and with many: the same number."""
    findings: Findings = {}
    wrong = []
    for backend in call.backends(training=True):
        counts = []
        for layers in (2, 6):
            model = attach(tiny_model(call, layers=layers).train(), backend)
            batch = batch_of(sharegpt_like(256, rows=1), "ism", call, backend)
            pass_ = partial(forward_and_backward, model, batch)
            pass_()  # kernels are compiled and chosen
            counts.append(waits(pass_, call.device))
        findings[backend] = {"2 layers": len(counts[0]), "6 layers": len(counts[1]), "where": counts[1][:4]}
        call.say(f"  {backend}: {len(counts[0])} with 2 layers, {len(counts[1])} with 6")
        if len(counts[0]) != len(counts[1]):
            wrong.append(f"{backend} waits {len(counts[1]) - len(counts[0])} times in 4 layers")
    return verdict(findings, wrong)


def forward_and_backward(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def waits(work: Callable[[], object], device: torch.device) -> list[str]:
    """Where `work` made the host wait for the device, as torch sees it; nowhere on a CPU."""
    if device.type != "cuda":
        work()
        return []
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


def compilations(call: Call) -> Findings:
    """Kernels that `flex` compiles for the first of several batches of one shape, and for all others: none."""
    from torch._dynamo.utils import counters

    if "flex" not in call.backends():
        return {"missing": missing("flex", call.device)}
    heads = Heads(heads=2, kv_heads=1, width=64)
    compiled = []
    for seed, mask in enumerate(("ism", "causal", "prefix", "ism")):
        workload = random_documents(1024, rows=1, seed=seed)
        inputs = random_inputs(workload, heads, call.device, call.dtype, seed=seed)
        before = counters["stats"]["unique_graphs"]
        case("flex", mask, workload, inputs).once()
        compiled.append(counters["stats"]["unique_graphs"] - before)
    call.say(f"  graphs compiled batch by batch: {compiled}")
    return verdict({"compiled": compiled}, [] if not any(compiled[1:]) else [f"compiled again: {compiled}"])


def memory(call: Call) -> Findings:
    """Peak memory of a layer's forward and backward as T doubles. What must be linear is so on a GPU alone: the plain
    kernels of a CPU hold a document's scores.
    """
    lengths = (256, 512) if call.small else (4096, 8192, 16384, 32768)
    heads = Heads(heads=4, kv_heads=2, width=64) if call.small else Heads(heads=32, kv_heads=8, width=64)
    findings: Findings = {}
    wrong = []
    for backend in call.backends():
        peaks = [layer_peak(backend, seq_len, heads, call) for seq_len in lengths]
        growth = [after / before for before, after in pairwise(peaks)]
        findings[backend] = {"T": lengths, "bytes": peaks, "growth": growth}
        call.say(f"  {backend}: {', '.join(f'{peak / 2**20:,.0f} MiB' for peak in peaks)}")
        if call.device.type == "cuda" and backend != "sdpa" and max(growth) > LINEAR:
            wrong.append(f"{backend}: memory grows {max(growth):.2f} times when T doubles")
    return verdict(findings, wrong)


def layer_peak(backend: str, seq_len: int, heads: Heads, call: Call) -> int:
    """Bytes of one row of so many tokens, after a first pass that compiles."""
    workload = sharegpt_like(seq_len, rows=1)
    made: Case = case(backend, "ism", workload, random_inputs(workload, heads, call.device, call.dtype))
    made.once()
    peak = peak_bytes(made.once, call.device)
    del made
    release(call.device)
    return peak


@dataclass(frozen=True)
class _Indented(LogReporter):
    """Passes notes on to the script's own output, indented."""

    call: Call

    def note(self, text: str) -> None:
        self.call.say(f"  {text}")


def bench(call: Call) -> Findings:
    """`ismdata bench attention`, layers alone."""
    results = run_attention_bench(
        call.output / "bench",
        seq_lens="128,256" if call.small else None,
        rounds=1 if call.small else None,
        only=["attention"],
        device=call.device.type,
        overwrite=True,
        reporter=_Indented(call),
    )
    aims = [
        f"{row['backend']}, ism, T 8192: {row['ratio']:.2f} x plain FlashAttention (aim {AIMS[row['backend']]})"
        for row in results["attention"]
        if (row["seq_len"], row["mask"]) == (8192, "ism") and row["backend"] in AIMS and row["ratio"]
    ]
    return verdict(
        {"options": results["options"], "aims": aims}, [row["note"] for row in results["attention"] if row["failed"]]
    )


def steps(call: Call) -> Findings:
    """Training steps of the preset `base` and of a Llama of 1 B."""
    if call.small:
        models = {"tiny": tiny_model(call).config}
    else:
        models = {"1b": one_billion_config(8192), "base": base_config(8192)}
    workload = sharegpt_like(128 if call.small else 8192, rows=1)
    rows = []
    for name, config in models.items():
        for row in model_steps(
            name, config, workload, call.device, backends=list(BACKENDS), rounds=1 if call.small else 5
        ):
            rows.append(row)
            call.say(f"  {row.line()}")
    aims = [
        f"1b, {row.backend}, ism: {row.ratio:.3f} x the causal step (aim {STEP_AIM})"
        for row in rows
        if (row.model, row.mask) == ("1b", "ism") and row.ratio
    ]
    return verdict({"rows": [row.as_json() for row in rows], "aims": aims}, [row.note for row in rows if row.failed])


SECTIONS: dict[str, Callable[[Call], Findings]] = {
    section.__name__: section
    for section in (environment, correctness, laws, bench, steps, synchronisations, compilations, memory)
}


def run(call: Call, *, seconds: float) -> dict[str, Any]:
    """All sections, guarded. Writes gpu.json after each."""
    began = time.monotonic()
    results: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        started = time.monotonic()
        call.say(f"{name} ({started - began:.0f} s)")
        if started - began > seconds:
            results[name] = {"ok": False, "skipped": f"{seconds:.0f} s were over"}
        else:
            try:
                found = section(call)
                results[name] = {"ok": not found.get("wrong"), "findings": found}
            except Exception:  # whatever it is, the other sections run
                results[name] = {"ok": False, "error": traceback.format_exc()}
                call.say(traceback.format_exc())
            release(call.device)
        results[name]["seconds"] = time.monotonic() - started
        (call.output / "gpu.json").write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return results


def summary(results: dict[str, Any]) -> list[str]:
    """A line a section, with what came of its aims and what is wrong in it."""
    lines = []
    for name, section in results.items():
        state = "ok" if section["ok"] else "skipped" if "skipped" in section else "FAILED"
        lines.append(f"{name:16} {state:8} {section['seconds']:6.1f} s")
        findings = section.get("findings", {})
        lines += [f"    {each}" for each in (*findings.get("aims", []), *findings.get("wrong", []))]
        lines += [f"    {section['error'].strip().splitlines()[-1]}"] if "error" in section else []
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--small", action="store_true", help="sizes for a processor: tries the script, measures nothing"
    )
    parser.add_argument("--seconds", type=float, default=460, help="sections that would begin later are skipped")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "gpu.log").open("w", encoding="utf-8") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        device = find_device(options.device)
        call = Call(device=device, output=options.output, small=options.small, say=say)
        results = run(call, seconds=options.seconds)
        say("\n".join(["", *summary(results)]))
    sys.exit(0 if all(section["ok"] for section in results.values()) else 1)


if __name__ == "__main__":
    main()
