"""`ismdata eval`, top to bottom: a model and packed shards in; likelihoods, generated answers and a comparison out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ismdata import __version__
from ismdata.attention import PRESETS, TOKENIZER_NAME, attach, open_model
from ismdata.choices import BleuTokenizer, Precision, check_choice
from ismdata.data import PackedDataset, check_serves, open_output
from ismdata.errors import DataError, UsageError
from ismdata.eval.answers import Answers, find_answers
from ismdata.eval.bootstrap import Bootstrap, FloatArray, estimate
from ismdata.eval.generation import generate_answers
from ismdata.eval.likelihood import answer_losses, conversation_numbers, group_sums, likelihood
from ismdata.eval.results import EVAL_NAME, FORMAT, check_same_answers, compare, read_results, write_results
from ismdata.eval.text_scores import bleu, bleu_counts, require_sacrebleu, text_scores, tokenizer_for
from ismdata.rendering import ConversationEncoder
from ismdata.train import weights_digest

#: Called with a stage, how much of it is done, and the total.
Stages = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How to evaluate. `generate`: the most conversations whose answers are generated. Raises UsageError."""

    mask: str | None = None
    generate: int = 0
    max_new_tokens: int = 256
    bleu_tokenizer: str = "auto"
    batch_size: int = 4
    precision: str = "auto"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("generate", 0), ("max_new_tokens", 1), ("batch_size", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                given = f"--{name.replace('_', '-')} is {getattr(self, name)}"
                raise UsageError(f"{given}; expected {least} or more")
        check_choice("--bleu-tokenizer", self.bleu_tokenizer, BleuTokenizer)
        check_choice("--precision", self.precision, Precision)

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(resamples=self.resamples, seed=self.seed)


def run_eval(
    name: str,
    packed: Path,
    *,
    output: Path | None = None,
    compare_with: Path | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Stages = lambda stage, done, total: None,
    options: EvalOptions | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Evaluate a model on the shards in `packed`; what eval.json says (schemas/eval.schema.json).

    name: a folder that `ismdata train` wrote or, with a mask among the options, any model. options: how; or the same as
    keywords. compare_with: another evaluation, of the same answers. output: the folder to write, where one is wanted.

    Raises UsageError, DataError and UnsupportedModelError before the first batch, but for a loss that is no number.
    """
    options = dataclasses.replace(options or EvalOptions(), **fields)
    began = time.monotonic()
    if options.generate:
        require_sacrebleu()
    dataset = PackedDataset(packed)
    if options.mask is not None:
        _check_mask(options.mask, dataset)
    other = None if compare_with is None else read_results(compare_with)
    answers = find_answers(dataset.shards)
    if not len(answers):
        what = "no answer is to be trained" if len(dataset) else "no sequences"
        raise DataError(f"{packed}: {what}; expected at least one answer to measure. Look at its quarantine.jsonl")
    tokenizer_sha256 = dataset.shards.index["tokenizer"].get("sha256")
    if other is not None:
        check_same_answers(other, packed, answers, tokenizer_sha256)
    encoder = ConversationEncoder.load(packed / TOKENIZER_NAME)

    inputs = [packed, *([] if compare_with is None else [compare_with])]
    writing = (
        nullcontext() if output is None else open_output(output, overwrite=overwrite, marker=EVAL_NAME, inputs=inputs)
    )
    with writing as folder:
        model, mask, described = _ready_model(name, dataset, options, say)
        losses = answer_losses(
            model,
            dataset,
            answers,
            mask=mask,
            batch_size=options.batch_size,
            progress=lambda done, total: progress("evaluate", done, total),
        )
        generation, generated = _generation(model, encoder, dataset, answers, mask, options, progress)
        outputs = _outputs(encoder, dataset, answers, losses, generated)
        if generation is not None:
            generation |= _scores(outputs, options)
        overall, by_turn = likelihood(answers, losses, options.bootstrap)
        facts: dict[str, Any] = {
            "format": FORMAT,
            "version": __version__,
            "model": described,
            "mask": mask,
            "data": {
                "name": packed.name,
                "index_sha256": dataset.shards.index["sha256"],
                "answers_sha256": answers.sha256,
                "tokenizer_sha256": tokenizer_sha256,
                "mask": dataset.mask,
                "seq_len": dataset.seq_len,
                "sequences": len(dataset),
            },
            "bootstrap": {**dataclasses.asdict(options.bootstrap), "drawn": "conversations"},
            "overall": overall.as_json(),
            "by_turn": [{"turn": turn, **each.as_json()} for turn, each in by_turn.items()],
            "generation": generation,
        }
        facts["comparison"] = None if other is None else compare(facts, outputs, other, options.bootstrap)
        facts["seconds"] = round(time.monotonic() - began, 3)
        if folder is not None:
            write_results(folder, facts, outputs)
    return facts


def _check_mask(mask: str, dataset: PackedDataset) -> None:
    try:
        check_serves(mask, packed_mask=dataset.mask)
    except UsageError as error:
        raise UsageError(f"{dataset.shards.folder}: {error}") from error


def _ready_model(
    name: str, dataset: PackedDataset, options: EvalOptions, say: Callable[[str], None]
) -> tuple[PreTrainedModel, str, dict[str, Any]]:
    """The model on its device with its mask attached, the mask, and what eval.json says of the model."""
    if name in PRESETS:
        raise UsageError(f"{name}: a preset has no weights to evaluate; expected a folder that `ismdata train` wrote")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = open_model(name, dataset)
    trained_under: str | None = getattr(model.config, "ismdata_mask", None)
    mask = options.mask or trained_under
    if mask is None:
        raise UsageError(
            f"{name}: config.json records no ismdata_mask, so it is unknown under which mask the model was trained. "
            "Name one: --mask causal for a model that was not trained with ismdata"
        )
    _check_mask(mask, dataset)
    if trained_under not in (None, mask):
        say(f"{name}: was trained under the mask {trained_under} and is evaluated under {mask}")
    on_gpu = torch.cuda.is_available()
    precision = ("bfloat16" if on_gpu else "float32") if options.precision == "auto" else options.precision
    device = torch.device("cuda" if on_gpu else "cpu")
    described = {
        "name": name,
        "config_sha256": _config_digest(model),
        "weights_xxh3_128": weights_digest(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_mask": trained_under,
        "precision": precision,
        "device": device.type,
    }
    nn.Module.to(model, device, getattr(torch, precision)).train(False)
    return attach(model), mask, described


def _config_digest(model: PreTrainedModel) -> str:
    """SHA-256 of what a model's config says of the model, and not of where it was loaded from."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _generation(
    model: PreTrainedModel,
    encoder: ConversationEncoder,
    dataset: PackedDataset,
    answers: Answers,
    mask: str,
    options: EvalOptions,
    progress: Stages,
) -> tuple[dict[str, Any] | None, dict[int, list[int]]]:
    """What was generated, as eval.json describes it and as tokens by the answer's number; None where nothing was."""
    if options.generate == 0:
        return None, {}
    drawn = sorted(set(answers.conversation), key=lambda each: _rank(each, options.seed))[: options.generate]
    of_drawn = set(drawn)
    chosen = [at for at, conversation in enumerate(answers.conversation) if conversation in of_drawn]
    began = time.monotonic()
    tokens = generate_answers(
        model,
        encoder,
        dataset,
        answers,
        chosen,
        mask=mask,
        max_new_tokens=options.max_new_tokens,
        progress=lambda done, total: progress("generate", done, total),
    )
    described = {
        "conversations": len(drawn),
        "answers": len(chosen),
        "max_new_tokens": options.max_new_tokens,
        "tokens": sum(map(len, tokens)),
        "seconds": round(time.monotonic() - began, 3),
    }
    return described, dict(zip(chosen, tokens, strict=True))


def _rank(conversation: str, seed: int) -> bytes:
    """Decides which conversations are drawn: by their ids, so that every packing draws the same."""
    return hashlib.sha256(f"{seed} {conversation}".encode()).digest()


def _outputs(
    encoder: ConversationEncoder,
    dataset: PackedDataset,
    answers: Answers,
    losses: FloatArray,
    generated: dict[int, list[int]],
) -> list[dict[str, Any]]:
    """The lines of outputs.jsonl: one an answer, conversation by conversation."""
    ending = encoder.end_of_turn_ids
    lines = []
    for at in np.lexsort((answers.turn, conversation_numbers(answers.conversation))).tolist():
        start, end = int(answers.start[at]), int(answers.end[at])
        reference = dataset[int(answers.row[at])].sequence.input_ids[start:end].tolist()
        if ending and reference[-len(ending) :] == ending:
            del reference[-len(ending) :]
        elif reference[-1] in encoder.next_turn_end_ids:
            del reference[-1]
        lines.append(
            {
                "conversation": answers.conversation[at],
                "turn": int(answers.turn[at]),
                "answer": answers.digest[at],
                "context_tokens": int(answers.context_tokens[at]),
                "target_tokens": int(answers.targets[at]),
                "nll": float(losses[at]),
                "reference": encoder.decode(reference).strip(),
                "generated": encoder.decode(generated[at]).strip() if at in generated else None,
            }
        )
    return lines


def _scores(outputs: list[dict[str, Any]], options: EvalOptions) -> dict[str, Any]:
    """BLEU with its interval, chrF and ROUGE-L of the generated answers."""
    lines = [line for line in outputs if line["generated"] is not None]
    texts, references = ([line[name] for line in lines] for name in ("generated", "reference"))
    tokenizer = tokenizer_for(references) if options.bleu_tokenizer == "auto" else options.bleu_tokenizer
    scores = text_scores(texts, references, tokenizer)
    group = conversation_numbers([line["conversation"] for line in lines])
    counts = group_sums(group, bleu_counts(texts, references, tokenizer))
    return {
        "tokenizer": tokenizer,
        "bleu": {**estimate(counts, bleu, options.bootstrap).as_json(), "signature": scores.bleu_signature},
        "chrf": {"value": scores.chrf, "signature": scores.chrf_signature},
        "rouge_l": {"value": scores.rouge_l},
    }
