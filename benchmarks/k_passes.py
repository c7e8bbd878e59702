"""Training on K single-turn samples a conversation beside one pass over it: time for the same conversations.

    python benchmarks/k_passes.py [--turns 1,2,4,8] [--conversations 64] [--model tiny]

Made-up conversations of K turns (8 words a question, 16 an answer) are packed twice: for `ism`, one document a
conversation with all its answers targets; and as single-turn samples (`--mask prefix`), one document an answer, cut
after it and with it alone as target. Both hold the same targets. A model is trained one epoch on each, on this machine,
and the processor seconds of its steps compared, the first one left out. Prints one JSON object a number of turns.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from ismdata.convert.pipeline import convert
from ismdata.data import ConvertedFolder
from ismdata.data.shards import PackedShards
from ismdata.pack.pipeline import pack
from ismdata.rendering import train_tokenizer
from ismdata.train.options import TrainOptions
from ismdata.train.pipeline import train


def write_corpus(path: Path, *, turns: int, conversations: int) -> None:
    draw = random.Random(turns)
    words = [f"word{number}" for number in range(200)]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(conversations):
            messages = []
            for _ in range(turns):
                messages.append({"role": "user", "content": text(8)})
                messages.append({"role": "assistant", "content": text(16)})
            file.write(json.dumps({"messages": messages}) + "\n")


class StepClock:
    """A reporter that keeps the processor's time after each step."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def note(self, text: str) -> None:
        pass

    def progress(self, stage: str, done: int, total: int) -> None:
        self.moments.append(time.process_time())


def compare(folder: Path, *, turns: int, conversations: int, model: str) -> dict[str, Any]:
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", turns=turns, conversations=conversations)
    convert([str(folder / "corpus.jsonl")], folder / "converted")
    train_tokenizer(ConvertedFolder(folder / "converted").texts(), vocab_size=600).save_pretrained(
        str(folder / "tokenizer")
    )
    seen: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    sequences = []
    for way, mask in (("one pass", "ism"), ("K passes", "prefix")):
        packed = folder / f"packed-{mask}"
        pack(
            [folder / "converted"],
            packed,
            tokenizer=str(folder / "tokenizer"),
            chat_template="chatml",
            seq_len=2048,
            mask=mask,
        )
        sequences.append(len(PackedShards(packed)))
        clock = StepClock()
        options = TrainOptions(model=model, batch_size=1)
        seen[way] = train(packed, output=folder / f"model-{mask}", options=options, reporter=clock)
        steps = seen[way].steps
        seconds[way] = (clock.moments[-1] - clock.moments[0]) * steps / (steps - 1)
    one, many = seen["one pass"], seen["K passes"]
    assert one.target_tokens == many.target_tokens, "the two ways do not have the same targets"
    return {
        "turns": turns,
        "target_tokens": one.target_tokens,
        "tokens": [one.tokens, many.tokens],
        "sequences": sequences,
        "seconds": [round(seconds["one pass"], 1), round(seconds["K passes"], 1)],
        "ratio_of_tokens": round(many.tokens / one.tokens, 2),
        "ratio_of_seconds": round(seconds["K passes"] / seconds["one pass"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", default="1,2,4,8")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--model", default="tiny", help="as for train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for turns in map(int, options.turns.split(",")):
            result = compare(
                Path(name) / str(turns), turns=turns, conversations=options.conversations, model=options.model
            )
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
