"""Which split a name means: never guessed from names that only look so."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.sources.splits import declared_splits, is_named, split_of_name, splits_of_files


def splits(*names):
    found = splits_of_files([name.split("/") for name in names])
    return found.splits, [names[at] for at, _ in found.doubtful]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("Training.JSON", "train"),
        ("train-00000-of-00003.parquet", "train"),
        ("train-00000-of-00003-a3ecf92756993583.parquet", "train"),
        ("train1.jsonl.gz", "train"),
        ("train_v2.json", "train"),
        ("train_data.json", "train"),
        ("dev.json", "validation"),
        ("valid.csv", "validation"),
        ("val.jsonl", "validation"),
        ("VALIDATION.parquet", "validation"),
        ("eval_set.jsonl", "validation"),
        ("valid_random_split.json", "validation"),
        ("test.tsv", "test"),
        ("test_freq.json", "test"),
        ("dialogues_test.txt", "test"),
        ("train_sft-00000-of-00001.parquet", "train_sft"),
        ("test_gen.jsonl", "test_gen"),
        ("data/train.jsonl", "train"),
        ("en/train.jsonl", "train"),
        ("train/part-00001.jsonl", "train"),
        ("test/train.jsonl", "train"),
        ("dev/en/a.jsonl", "validation"),
        ("train.zip/a.jsonl", "train"),
    ],
)
def test_exact_names_mean_their_split(name, split):
    assert splits(name) == ([split], [])


@pytest.mark.parametrize(
    "name", ["corpus.jsonl", "trains.jsonl", "contest.jsonl", "latest.jsonl", "devices.json", "evaluate.jsonl"]
)
def test_other_words_mean_nothing(name):
    assert splits(name) == ([None], [])


@pytest.mark.parametrize(
    "name", ["training_notes.jsonl", "test_case_chat.jsonl", "train_test.jsonl", "turing_test.json"]
)
def test_names_that_only_look_so_are_not_guessed(name):
    found, doubtful = splits(name, "corpus.jsonl")
    assert found == [None, None]
    assert doubtful == ([name] if name != "train_test.jsonl" else [])


def test_two_such_names_are_no_series():
    names = ("training_notes.jsonl", "test_case_chat.jsonl")
    assert splits(*names) == ([None, None], list(names))


def test_names_that_differ_only_in_the_word_are_a_series():
    names = ("mw_train_delex.json", "mw_valid_delex.json", "mw_test_delex.json")
    assert splits(*names) == (["train", "validation", "test"], [])
    assert splits("a/" + names[0], "b/" + names[1])[0] == [None, None]  # not beside each other


def test_a_last_word_counts_beside_a_train_split():
    assert splits("alpaca_train.json", "vicuna_test.json") == (["train", "test"], [])
    assert splits("train.json", "unit_test.json") == (["train", "test"], [])
    assert splits("human_eval.json", "stress_test.json") == ([None, None], ["human_eval.json", "stress_test.json"])


def test_files_of_no_split_have_none():
    assert splits("train.jsonl", "extra.jsonl", "test.jsonl") == (["train", None, "test"], [])


def test_keys_of_a_dataset_dict_are_splits_by_declaration():
    keys = ["train_sft", "test_sft", "valid", "math/code", "..", "index.json"]
    found = declared_splits(keys)
    assert list(found.values()) == ["train_sft", "test_sft", "validation", "math_code", "split", "index.json_"]
    assert declared_splits(["dev", "validation"]) == {"dev": "dev", "validation": "validation"}
    assert declared_splits(["a b", "a/b"]) == {"a b": "a_b", "a/b": "a_b_2"}


def test_keys_of_a_json_object():
    assert [split_of_name(key) for key in ("train", "dev", "film", "test_case", "")] == [
        "train",
        "validation",
        None,
        None,
        None,
    ]


def test_a_split_may_be_named_by_its_usual_names():
    assert is_named("validation", ["dev"]) and is_named("validation", ["validation"]) and is_named("code", ["code"])
    assert not is_named("train_sft", ["train"]) and not is_named("validation", ["test"])


@given(st.lists(st.text(string.printable + "äß/\0\u2028", max_size=12), max_size=6, unique=True))
def test_folders_of_declared_splits_are_distinct_and_safe(keys):
    found = list(declared_splits(keys).values())
    assert len({*found}) == len(keys)
    assert all(name and name[0] != "." and "/" not in name and "\0" not in name for name in found)


@given(st.lists(st.lists(st.text(max_size=8), max_size=3), max_size=6))
def test_any_names_can_be_read(places):
    found = splits_of_files(places)
    assert len(found.splits) == len(places)
