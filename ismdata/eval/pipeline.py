"""Evaluate a model on packed shards: likelihoods, generated answers and a comparison with another evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ismdata import __version__
from ismdata.attention import PRESETS, TOKENIZER_NAME, attach, open_model, weights_digest
from ismdata.choices import BleuTokenizer, Precision, check_choice, check_mask
from ismdata.data import PackedDataset, check_serves, open_output
from ismdata.display import LOGGED, Reporter
from ismdata.errors import DataError, UsageError
from ismdata.eval.answers import Answers, find_answers
from ismdata.eval.bootstrap import Bootstrap, FloatArray, estimate
from ismdata.eval.generation import generate_answers
from ismdata.eval.likelihood import answer_losses, conversation_numbers, group_sums, likelihood
from ismdata.eval.pictures import Row, by_source, write_groups
from ismdata.eval.results import EVAL_NAME, FORMAT, check_same_answers, compare, read_results, write_results
from ismdata.eval.text_scores import bleu, bleu_counts, require_sacrebleu, text_scores, tokenizer_for
from ismdata.rendering import ConversationEncoder


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        mask: The mask to run the model under; None for the one in its config.
        generate: Maximum number of conversations whose answers are generated.
        max_new_tokens: Maximum number of tokens in a generated answer.
        bleu_tokenizer: A value of `choices.BleuTokenizer`.
        batch_size: Sequences per batch.
        precision: A value of `choices.Precision`.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples and of the choice of conversations.

    Raises:
        UsageError: If a value is not allowed.
    """

    mask: str | None = None
    generate: int = 0
    max_new_tokens: int = 256
    bleu_tokenizer: str = "auto"
    batch_size: int = 4
    precision: str = "auto"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mask is not None:
            check_mask(self.mask, "--mask")
        for name, least in (("generate", 0), ("max_new_tokens", 1), ("batch_size", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                given = f"--{name.replace('_', '-')} is {getattr(self, name)}"
                raise UsageError(f"{given}; expected {least} or more")
        check_choice("--bleu-tokenizer", self.bleu_tokenizer, BleuTokenizer)
        check_choice("--precision", self.precision, Precision)

    @property
    def bootstrap(self) -> Bootstrap:
        """The settings of the bootstrap."""
        return Bootstrap(resamples=self.resamples, seed=self.seed)


def run_eval(
    name: str,
    packed: Path,
    *,
    output: Path | None = None,
    compare_with: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = LOGGED,
    options: EvalOptions | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Evaluate a model on packed shards.

    Args:
        name: A folder that `ismdata train` wrote; or, if the options name a mask, any model.
        packed: A folder that `ismdata pack` wrote.
        output: The folder to write; None to write nothing.
        compare_with: The folder of another evaluation of the same answers.
        overwrite: Whether to replace an earlier evaluation in `output`.
        reporter: Receives notes and progress.
        options: How to evaluate.
        **fields: Fields of EvalOptions, which take precedence over `options`.

    Returns:
        The content of eval.json (schemas/eval.schema.json).

    Raises:
        UsageError: If the call is wrong: the options, the mask for these shards, or the output folder.
        DataError: If the model, the shards or the other evaluation cannot be used, or a loss is not finite.
        UnsupportedModelError: If the mask cannot be attached to the model.
    """
    options = dataclasses.replace(options or EvalOptions(), **fields)
    began = time.monotonic()
    if options.generate:
        require_sacrebleu()
    dataset = PackedDataset(packed)
    if options.mask is not None:
        check_serves(options.mask, packed_mask=dataset.mask, place=str(packed))
    other = None if compare_with is None else read_results(compare_with)
    answers = find_answers(dataset.shards)
    if not len(answers):
        found = "no answer has targets" if len(dataset) else "no sequences"
        raise DataError(f"{packed}: {found}; expected at least one answer to measure. Look at its quarantine.jsonl")
    tokenizer_sha256 = dataset.shards.index["tokenizer"].get("sha256")
    if other is not None:
        check_same_answers(other, packed, answers, tokenizer_sha256)
    encoder = ConversationEncoder.load(packed / TOKENIZER_NAME)

    inputs = [packed, *([] if compare_with is None else [compare_with])]
    writing = (
        nullcontext()
        if output is None
        else open_output(output, overwrite=overwrite, marker=EVAL_NAME, inputs=inputs, reporter=reporter)
    )
    with writing as folder:
        model, mask, described = _open_attached(name, dataset, options, reporter)
        losses = answer_losses(model, dataset, answers, mask=mask, batch_size=options.batch_size, reporter=reporter)
        generation, generated = _generate(model, encoder, dataset, answers, mask, options, reporter)
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
            sources = by_source(answers, losses, options.bootstrap)
            groups = {
                "turn": [Row(name=str(turn), facts=each.as_json()) for turn, each in by_turn.items()],
                "source": [Row(name=name, facts=each.as_json()) for name, each in sources.items()],
            }
            drawn = [write_groups(folder, group, rows, mask=mask) for group, rows in groups.items()]
            if not all(drawn):
                reporter.note("no pictures, for want of matplotlib; run: pip install 'ismdata[plots]'")
    return facts


def _open_attached(
    name: str, dataset: PackedDataset, options: EvalOptions, reporter: Reporter
) -> tuple[PreTrainedModel, str, dict[str, Any]]:
    """The model on its device with its mask attached, the mask, and the description for eval.json."""
    if name in PRESETS:
        raise UsageError(f"{name}: is a preset, which has no weights; expected a folder that `ismdata train` wrote")
    model = open_model(name, dataset, reporter=reporter)
    trained_under: str | None = getattr(model.config, "ismdata_mask", None)
    mask = options.mask or trained_under
    if mask is None:
        raise UsageError(
            f"{name}: config.json records no ismdata_mask, so the mask that the model was trained under is unknown. "
            "Pass it with --mask; a model that was not trained with ismdata takes --mask causal"
        )
    check_serves(mask, packed_mask=dataset.mask, place=str(dataset.shards.folder))
    if trained_under not in (None, mask):
        reporter.note(f"{name}: trained under the mask {trained_under}, evaluated under {mask}")
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
    return attach(model, reporter=reporter), mask, described


def _config_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's config, without its location, library version and dtype."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _generate(
    model: PreTrainedModel,
    encoder: ConversationEncoder,
    dataset: PackedDataset,
    answers: Answers,
    mask: str,
    options: EvalOptions,
    reporter: Reporter,
) -> tuple[dict[str, Any] | None, dict[int, list[int]]]:
    """The description of the generation for eval.json, and the tokens by index of the answer; None and {} if off."""
    if options.generate == 0:
        return None, {}
    drawn = sorted(set(answers.conversation), key=lambda each: _rank(each, options.seed))[: options.generate]
    drawn_set = set(drawn)
    chosen = [index for index, conversation in enumerate(answers.conversation) if conversation in drawn_set]
    began = time.monotonic()
    length = options.max_new_tokens
    tokens = generate_answers(
        model, encoder, dataset, answers, chosen, mask=mask, max_new_tokens=length, reporter=reporter
    )
    described = {
        "conversations": len(drawn),
        "answers": len(chosen),
        "max_new_tokens": length,
        "tokens": sum(map(len, tokens)),
        "seconds": round(time.monotonic() - began, 3),
    }
    return described, dict(zip(chosen, tokens, strict=True))


def _rank(conversation: str, seed: int) -> bytes:
    """A pseudo-random sort key that depends on the id alone, so that every packing draws the same conversations."""
    return hashlib.sha256(f"{seed} {conversation}".encode()).digest()


def _outputs(
    encoder: ConversationEncoder,
    dataset: PackedDataset,
    answers: Answers,
    losses: FloatArray,
    generated: dict[int, list[int]],
) -> list[dict[str, Any]]:
    """The lines of outputs.jsonl, one per answer, ordered by conversation and turn."""
    ending = encoder.end_of_turn_ids
    lines = []
    for index in np.lexsort((answers.turn, conversation_numbers(answers.conversation))).tolist():
        start, end = int(answers.start[index]), int(answers.end[index])
        reference = dataset[int(answers.row[index])].sequence.input_ids[start:end].tolist()
        if ending and reference[-len(ending) :] == ending:
            del reference[-len(ending) :]
        elif reference[-1] in encoder.next_turn_end_ids:
            del reference[-1]
        lines.append(
            {
                "conversation": answers.conversation[index],
                "turn": int(answers.turn[index]),
                "answer": answers.digest[index],
                "context_tokens": int(answers.context_tokens[index]),
                "target_tokens": int(answers.targets[index]),
                "nll": float(losses[index]),
                "reference": encoder.decode(reference).strip(),
                "generated": encoder.decode(generated[index]).strip() if index in generated else None,
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
