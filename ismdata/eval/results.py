"""Write, read and compare the folders of `ismdata eval`.

A folder holds two files: `eval.json` (schemas/eval.schema.json) and `outputs.jsonl`, one answer per line. Two
evaluations can be compared if they cover the same answers after the same histories. The shards may differ: those for
`prefix` always differ from those for `ism`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ismdata.errors import DataError
from ismdata.eval.answers import Answers
from ismdata.eval.bootstrap import Bootstrap, paired_difference, ratio
from ismdata.eval.likelihood import conversation_numbers, group_sums
from ismdata.eval.text_scores import bleu, bleu_counts

FORMAT = "ismdata.eval/1"
EVAL_NAME = "eval.json"
OUTPUTS_NAME = "outputs.jsonl"

#: Generated answers are compared only if these facts are equal.
_GENERATION = ("conversations", "answers", "max_new_tokens", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Results:
    """An evaluation.

    Attributes:
        name: The folder, for messages.
        facts: The content of eval.json.
        outputs: The lines of outputs.jsonl.
    """

    name: str
    facts: dict[str, Any]
    outputs: list[dict[str, Any]]


def write_results(folder: Path, facts: dict[str, Any], outputs: Sequence[dict[str, Any]]) -> None:
    """Write eval.json and outputs.jsonl into an existing folder.

    Args:
        folder: The folder.
        facts: The content of eval.json, without the entry of outputs.jsonl.
        outputs: The lines of outputs.jsonl.
    """
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in outputs).encode("utf-8", "backslashreplace")
    (folder / OUTPUTS_NAME).write_bytes(lines)
    whole = {**facts, "outputs": {"name": OUTPUTS_NAME, "sha256": hashlib.sha256(lines).hexdigest()}}
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    (folder / EVAL_NAME).write_bytes(text.encode("utf-8", "backslashreplace"))


def read_results(folder: Path) -> Results:
    """Read an evaluation.

    Args:
        folder: A folder that `ismdata eval -o` wrote.

    Returns:
        The evaluation.

    Raises:
        DataError: If the folder is not an evaluation, or was changed since.
    """
    path = folder / EVAL_NAME
    if not path.is_file():
        found = f"no {EVAL_NAME}" if folder.is_dir() else "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: found {found}; expected a folder that `ismdata eval -o` wrote")
    try:
        facts = json.loads(path.read_bytes())
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        expected = facts["outputs"]["sha256"]
        lines = (folder / OUTPUTS_NAME).read_bytes()
        if hashlib.sha256(lines).hexdigest() != expected:
            raise ValueError(f"{OUTPUTS_NAME} was changed after it was written")
        outputs = [json.loads(line) for line in lines.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a complete evaluation ({error}). Run `ismdata eval -o` again") from error
    return Results(name=str(folder), facts=facts, outputs=outputs)


def check_same_answers(other: Results, packed: Path, answers: Answers, tokenizer: str | None) -> None:
    """Check that another evaluation covers the same answers after the same histories.

    Args:
        other: The other evaluation.
        packed: The folder of shards, for the message.
        answers: The answers of the shards.
        tokenizer: SHA-256 of the shards' tokenizer; None if the index has none.

    Raises:
        DataError: If it does not, with the reason.
    """
    data = other.facts["data"]
    if data["answers_sha256"] == answers.sha256:
        return
    if data["tokenizer_sha256"] != tokenizer:
        reason = (
            f"it used another tokenizer (SHA-256 {str(data['tokenizer_sha256'])[:12]}…; expected "
            f"{str(tokenizer)[:12]}…)"
        )
    else:
        theirs = {(line["conversation"], line["answer"]) for line in other.outputs}
        mine = set(zip(answers.conversation, answers.digest, strict=True))
        reason = (
            f"{len(theirs & mine):,} of its {len(theirs):,} answers, with the same history, are among the "
            f"{len(mine):,} answers here"
        )
        if theirs & mine:
            reason += (
                ". If long conversations were split, pack both with one --seq-len; for --mask prefix leave out "
                "--prefix-every"
            )
    raise DataError(
        f"{other.name}: evaluates other data than {packed}: {reason}. Evaluate both models on the same "
        "conversations, packed with one tokenizer"
    )


def compare(
    facts: dict[str, Any], outputs: list[dict[str, Any]], other: Results, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Compute this evaluation minus another one of the same answers: loss per token, overall and by turn, and BLEU.

    The same conversations are resampled for both, so the difficulty of a conversation cancels out.

    Args:
        facts: The facts of this evaluation.
        outputs: The lines of outputs.jsonl of this evaluation.
        other: The other evaluation.
        bootstrap: How to resample.

    Returns:
        The entry `comparison` of eval.json.
    """
    mine, theirs = (sorted(lines, key=_key) for lines in (outputs, other.outputs))
    group = conversation_numbers([line["conversation"] for line in mine])
    losses = [np.array([[line["nll"], line["target_tokens"]] for line in lines]) for lines in (mine, theirs)]
    turn = np.array([line["turn"] for line in mine])
    by_turn = []
    for number in np.unique(turn).tolist():
        chosen = turn == number
        owner = np.unique(group[chosen], return_inverse=True)[1]
        left, right = (group_sums(owner, values[chosen]) for values in losses)
        by_turn.append({"turn": number, "nll": paired_difference(left, right, ratio, bootstrap).as_json()})
    left, right = (group_sums(group, values) for values in losses)
    bleu_difference, left_out = _compare_bleu(facts, mine, other.facts, theirs, bootstrap)
    return {
        "other": {"folder": other.name, "model": other.facts["model"], "mask": other.facts["mask"]},
        "nll": paired_difference(left, right, ratio, bootstrap).as_json(),
        "by_turn": by_turn,
        "bleu": bleu_difference,
        "bleu_left_out": left_out,
    }


def _key(line: dict[str, Any]) -> tuple[str, str]:
    return line["conversation"], line["answer"]


def _compare_bleu(
    facts: dict[str, Any],
    mine: list[dict[str, Any]],
    other: dict[str, Any],
    theirs: list[dict[str, Any]],
    bootstrap: Bootstrap,
) -> tuple[dict[str, Any] | None, str | None]:
    """The difference in BLEU, or the reason why there is none. The lines of both are in the same order."""
    generation, reference = facts["generation"], other["generation"]
    if generation is None and reference is None:
        return None, None
    if generation is None or reference is None:
        return None, "one of the two has no generated answers; run it with --generate"
    for name in _GENERATION:
        if generation[name] != reference[name]:
            return None, f"{name.replace('_', ' ')} is {generation[name]} here and {reference[name]} in the other"
    pairs = [pair for pair in zip(mine, theirs, strict=True) if pair[0]["generated"] is not None]
    if any(line["generated"] is None for _, line in pairs):
        return None, "the two generated answers for different conversations; run both with one --seed"
    group = conversation_numbers([line["conversation"] for line, _ in pairs])
    counts = [
        group_sums(
            group,
            bleu_counts(
                [pair[side]["generated"] for pair in pairs],
                [pair[side]["reference"] for pair in pairs],
                generation["tokenizer"],
            ),
        )
        for side in (0, 1)
    ]
    return paired_difference(counts[0], counts[1], bleu, bootstrap).as_json(), None
