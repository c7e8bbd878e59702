"""Packed shards on which a model of a few thousand parameters trains in a second, for the tests of `train`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ismdata.display import LOGGED, Reporter
from ismdata.train.options import TrainOptions
from ismdata.train.pipeline import TrainReport, train
from tests.support.reporters import Recorder
from tests.support.tiny import ANSWER, QUERY, VOCABULARY, sample, tiny_model, write_packed


def word_tokenizer(folder, words=VOCABULARY):
    """Save a tokenizer with one token per word, in the files that `ismdata pack` saves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2").save_pretrained(folder)
    (folder / "ismdata_template.json").write_text("{}")


def copying_rows(count, *, seq_len=128, mask="ism", **options):
    """Rows of documents with two queries and two answers, which repeat the queries."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        documents, tokens = [], []
        for _ in range(6):
            document = []
            for _ in range(2):
                query = generator.integers(3, 20, 4).tolist()
                tokens += [*query, *query, 2]
                document += [(QUERY, 4), (ANSWER, 5)]
            documents.append(document)
        tokens += [0] * (seq_len - len(tokens))
        row = sample(documents, seq_len=seq_len, mask=mask, **options)
        row.sequence.input_ids[:] = tokens
        rows.append(row)
    return rows


class Listener(Recorder):
    """A Recorder that also calls `heard` with each line."""

    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__()
        self.heard = heard

    def note(self, text: str) -> None:
        super().note(text)
        self.heard(text)


def run(packed, output, *, overwrite: bool = False, reporter: Reporter = LOGGED, **fields) -> TrainReport:
    """`train` for one step without warm-up, unless the fields of TrainOptions say otherwise."""
    options = TrainOptions(**({"steps": 1, "warmup": 0} | fields))
    return train(packed, output=output, options=options, overwrite=overwrite, reporter=reporter)


def weights(folder):
    return load_file(folder / "model.safetensors")


def curve(folder: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv without the seconds, which differ between runs."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def packed_folder(folder, count):
    """A packed folder of `count` copying rows, with its tokenizer."""
    word_tokenizer(write_packed(folder, copying_rows(count)) / "tokenizer")
    return folder


def saved_model(folder: Path) -> str:
    """A saved model of the shards' vocabulary, smaller than the presets; its folder."""
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return str(folder)
