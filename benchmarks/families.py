"""Every causal family of transformers, built tiny and attached: right, refused with a reason, or not buildable.

    python benchmarks/families.py -o families                 # all of them, some twenty minutes on a core
    python benchmarks/families.py -o families llama doge      # these again; OUT keeps the others
    python benchmarks/families.py -o families --write-docs    # and the table in docs/attention.md

family_models.py builds the models, family_checks.py says what each is held to, in float64: under every backend that the
machine runs, with gradients where that backend has them. Mixture-of-experts families are judged in float32 too, since
their grouped products need it, in which case experts are the stock implementation. Each family runs in a process of its
own with a time limit.

OUT gets `families.json` and `table.md`. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from family_checks import (
    MASKS,
    Differs,
    Oracle,
    batch_of,
    check_cache,
    check_documents_alone,
    check_dropout,
    check_explicit,
    check_laws,
    is_random,
    vocabulary_of,
    windows_of,
)
from family_models import VARIANTS, Rates, model_class, model_types, tiny_model

from ismdata.attention import BACKENDS, attach, check_training
from ismdata.errors import UnsupportedModelError, UsageError
from ismdata.generate.feeding import feed

RIGHT, REFUSED, WRONG, UNBUILDABLE, TOO_SLOW = "right", "refused", "wrong", "not buildable", "not finished"

#: Between these lines the docs have the table.
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

#: Bytes that a family's process may take.
_MEMORY = 6 << 30

Verdict = dict[str, str]


def judge(name: str) -> dict[str, Any]:
    """Build a family's tiny model and hold it to everything.

    Args:
        name: A model type, or a name in VARIANTS.

    Returns:
        `verdict` and `reason`; `backends`, a verdict each; `cache`, that of law 3.
    """
    model_type, changes = VARIANTS.get(name, (name, {}))
    try:
        stock = tiny_model(model_type, **changes)
        with torch.no_grad():
            stock(input_ids=torch.arange(2, 22)[None], use_cache=False)
    except Exception as error:  # whatever a configuration or a missing package raises
        if not model_class(model_type).is_backend_compatible():  # whatever its configuration
            return {"verdict": REFUSED, "reason": "does not take its attention from transformers' AttentionInterface"}
        return {"verdict": UNBUILDABLE, "reason": _first_line(error)}
    backends = {backend: _judge_backend(stock, backend) for backend in BACKENDS}
    found: dict[str, Any] = {"class": type(stock).__name__, "backends": backends}
    if backends["sdpa"]["verdict"] == RIGHT:
        found["more"] = _judge_more(model_type, changes, stock)
    verdicts = {each["verdict"]: each["reason"] for each in [*backends.values(), *found.get("more", {}).values()]}
    found["verdict"] = next((each for each in (WRONG, RIGHT) if each in verdicts), REFUSED)
    found["reason"] = verdicts[found["verdict"]]
    return found


def _judge_backend(stock: transformers.PreTrainedModel, backend: str) -> Verdict:
    try:
        model = attach(copy.deepcopy(stock), backend)
    except (UnsupportedModelError, UsageError) as error:
        return {"verdict": REFUSED, "reason": str(error)}
    except Exception as error:
        return {"verdict": WRONG, "reason": f"attach: {type(error).__name__}: {_first_line(error)}"}
    oracle, eager = Oracle(stock), copy.deepcopy(stock)
    eager.set_attn_implementation("eager")
    trains = BACKENDS[backend].missing_for_training(torch.device("cpu")) is None
    checks: list[Callable[[], None]] = [
        *(lambda mask=mask: check_explicit(model, oracle, mask, trains=trains) for mask in MASKS),  # type: ignore[misc]
        lambda: check_documents_alone(model, eager),
    ]
    if backend == "sdpa":  # other backends then give the same logits
        checks.append(lambda: check_laws(model, windows_of(oracle)))
    if trains:
        checks.append(lambda: check_training(model))
    return _run(checks)


def _judge_more(model_type: str, changes: dict[str, Any], stock: transformers.PreTrainedModel) -> dict[str, Verdict]:
    """What need not run under every backend: caches, dropout, float32 with the stock experts."""
    model = attach(copy.deepcopy(stock), "sdpa")
    try:
        check_cache(model, feed)
        found = {"cache": {"verdict": RIGHT, "reason": ""}}
    except Differs as error:
        found = {"cache": {"verdict": WRONG, "reason": str(error)}}
    except Exception as error:  # MiniMax refuses caches of another kind than its own
        found = {"cache": {"verdict": REFUSED, "reason": _first_line(error)}}
    found["dropout"] = _run([lambda: _check_dropout(model_type, changes)])
    if hasattr(stock, "set_experts_implementation") and any("expert" in name for name, _ in stock.named_modules()):
        found["float32"] = _run([lambda: _check_float32(model_type, changes)])
    return found


def _check_dropout(model_type: str, changes: dict[str, Any]) -> None:
    plain = tiny_model(model_type, rates=Rates(0.0, 0.1), **changes)
    check_dropout(attach(copy.deepcopy(plain), "sdpa"), Oracle(plain))
    stock = tiny_model(model_type, rates=Rates(0.1, 0.0), **changes)
    oracle = Oracle(stock)
    batch = batch_of("ism", vocabulary_of(stock))
    drops = is_random(oracle.model, lambda: oracle.logits(batch))
    for backend in BACKENDS:
        model = attach(copy.deepcopy(stock), backend)
        try:
            dropped = is_random(model, lambda: model(**batch.inputs).logits)  # noqa: B023
        except UnsupportedModelError as error:
            if not drops or backend == "sdpa":
                raise Differs(f"dropout of attention weights is refused: {error}") from error
        else:
            if dropped != drops:
                raise Differs(f"attention weights are dropped: {dropped}; by the stock model: {drops}")


def _check_float32(model_type: str, changes: dict[str, Any]) -> None:
    stock = tiny_model(model_type, dtype=torch.float32, **changes)
    for backend in ("sdpa", "varlen"):
        model = attach(copy.deepcopy(stock), backend)
        check_explicit(model, Oracle(stock), "ism", trains=True)
        check_training(model)


def _run(checks: list[Callable[[], None]]) -> Verdict:
    failures = [failure for failure in map(_failure, checks) if failure]
    return {"verdict": WRONG if failures else RIGHT, "reason": "; ".join(failures)}


def _failure(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Differs as error:
        return str(error)
    except Exception as error:  # a model that is not refused must not fail in any other way
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _child(name: str, sender: Connection) -> None:
    torch.set_num_threads(1)  # for such small models more threads are slower
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    sender.send(judge(name))


def judge_in_time(name: str, seconds: float) -> dict[str, Any]:
    """`judge` in a process of its own, which is ended after so many seconds."""
    start = time.monotonic()
    context = multiprocessing.get_context("fork")  # torch is imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    found: dict[str, Any] = {"verdict": TOO_SLOW, "reason": f"more than {seconds:.0f} s, or the process died"}
    try:
        if receiver.poll(seconds):
            found = receiver.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    return {"name": name, **found, "seconds": round(time.monotonic() - start, 1)}


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: the families with each verdict and remark."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in sorted(results, key=lambda each: each["name"]):
        groups.setdefault((each["verdict"], _remark(each)), []).append(f"`{each['name']}`")
    order = (RIGHT, REFUSED, UNBUILDABLE, TOO_SLOW, WRONG)
    ordered = sorted(groups.items(), key=lambda group: (order.index(group[0][0]), -len(group[1])))
    lines = ["| verdict | families | remark |", "|---|---|---|"]
    lines.extend(f"| {verdict} | {', '.join(names)} | {remark} |" for (verdict, remark), names in ordered)
    counts = Counter(each["verdict"] for each in results)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])
    return f"{summary}.\n\n" + "\n".join(lines) + "\n"


def _remark(result: dict[str, Any]) -> str:
    if result["verdict"] != RIGHT:
        return _short(result["reason"])
    backends: dict[str, Verdict] = result["backends"]
    refused = [name for name, each in backends.items() if each["verdict"] == REFUSED]
    remarks = []
    if refused:
        remarks.append(f"refused under {', '.join(refused)}: {_short(backends[refused[0]]['reason'])}")
    if result.get("more", {}).get("cache", {}).get("verdict") == REFUSED:
        remarks.append("calls with a cache are refused: " + _short(result["more"]["cache"]["reason"]))
    return "; ".join(remarks)


def _short(reason: str) -> str:
    """A reason without class names, numbers and advice, so that families have it in common."""
    first = reason.split(". ")[0].replace("|", "/")
    first = re.sub(r"^(\w+(ForCausalLM|LMHeadModel|Attention|ForConditionalGeneration)\w*) ", "", first)
    return re.sub(r" \(largest difference [^)]*\)", "", first).rstrip(".")


def write_docs(text: str, page: Path) -> None:
    """Replace the table in a page of the documentation."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types and variants; all by default")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180, help="time limit of a family")
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/attention.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    path = arguments.output / "families.json"
    if arguments.families and path.is_file():
        results = {each["name"]: each for each in json.loads(path.read_text())["families"]}
    for name in arguments.families or [*model_types(), *VARIANTS]:
        result = results[name] = judge_in_time(name, arguments.seconds)
        print(f"{name}: {result['verdict']} {result['reason'][:200]} ({result['seconds']} s)", flush=True)
        path.write_text(json.dumps(facts | {"families": list(results.values())}, indent=1) + "\n")
        (arguments.output / "table.md").write_text(table(list(results.values())))
    if arguments.write_docs:
        write_docs(table(list(results.values())), Path(__file__).parents[1] / "docs" / "attention.md")
    return int(any(each["verdict"] in (WRONG, TOO_SLOW) for each in results.values()))


if __name__ == "__main__":
    sys.exit(main())
