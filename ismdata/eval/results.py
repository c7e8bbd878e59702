"""What `ismdata eval` writes, and two of them compared.

A folder of two files: `eval.json` (schemas/eval.schema.json) and `outputs.jsonl`, one answer a line. Two evaluations
can be compared where both are of the same answers after the same histories; the shards may differ, as those for
`prefix` must from those for `ism`.
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

#: Generated answers can be compared where both were made and scored alike.
_GENERATION = ("conversations", "answers", "max_new_tokens", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Results:
    """An evaluation: what eval.json says, and the lines of outputs.jsonl."""

    name: str
    facts: dict[str, Any]
    outputs: list[dict[str, Any]]


def write_results(folder: Path, facts: dict[str, Any], outputs: Sequence[dict[str, Any]]) -> None:
    """Write both files into `folder`."""
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in outputs).encode("utf-8", "backslashreplace")
    (folder / OUTPUTS_NAME).write_bytes(lines)
    whole = {**facts, "outputs": {"name": OUTPUTS_NAME, "sha256": hashlib.sha256(lines).hexdigest()}}
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    (folder / EVAL_NAME).write_bytes(text.encode("utf-8", "backslashreplace"))


def read_results(folder: Path) -> Results:
    """What `write_results` wrote. Raises DataError where the folder holds something else, or was changed."""
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
            raise ValueError(f"{OUTPUTS_NAME} is not the one that it was written with")
        outputs = [json.loads(line) for line in lines.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a whole evaluation ({error}). Make it again with `ismdata eval -o`") from error
    return Results(name=str(folder), facts=facts, outputs=outputs)


def check_same_answers(other: Results, packed: Path, answers: Answers, tokenizer: str | None) -> None:
    """Raise DataError, with the reason, unless another evaluation is of these answers after the same histories.

    packed, tokenizer: the shards, and the SHA-256 of what made their tokens.
    """
    data = other.facts["data"]
    if data["answers_sha256"] == answers.sha256:
        return
    if data["tokenizer_sha256"] != tokenizer:
        reason = (
            f"its tokens are another tokenizer's (SHA-256 {str(data['tokenizer_sha256'])[:12]}…, here "
            f"{str(tokenizer)[:12]}…)"
        )
    else:
        theirs = {(line["conversation"], line["answer"]) for line in other.outputs}
        mine = set(zip(answers.conversation, answers.digest, strict=True))
        reason = (
            f"{len(theirs & mine):,} of its {len(theirs):,} answers are among the {len(mine):,} here, with the same "
            "history before them"
        )
        if theirs & mine:
            reason += (
                ". Where long conversations were split, pack both alike; with --mask prefix, without --prefix-every"
            )
    raise DataError(
        f"{other.name}: is of other data than {packed}: {reason}. Evaluate both models on the same conversations, "
        "packed with one tokenizer"
    )


def compare(
    facts: dict[str, Any], outputs: list[dict[str, Any]], other: Results, bootstrap: Bootstrap
) -> dict[str, Any]:
    """An evaluation less another one of the same answers: loss per token, overall and by turn, and BLEU.

    Conversations are drawn in pairs, so that what is hard for both models cancels out.
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
    """The difference in BLEU, or why there is none. Lines are in pairs."""
    generation, reference = facts["generation"], other["generation"]
    if generation is None and reference is None:
        return None, None
    if generation is None or reference is None:
        return None, "one of the two has no generated answers: --generate"
    for name in _GENERATION:
        if generation[name] != reference[name]:
            return None, f"{name.replace('_', ' ')} here {generation[name]}, there {reference[name]}"
    pairs = [pair for pair in zip(mine, theirs, strict=True) if pair[0]["generated"] is not None]
    if any(there["generated"] is None for _, there in pairs):
        return None, "other conversations were drawn to be answered: use one --seed"
    group = conversation_numbers([here["conversation"] for here, _ in pairs])
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
