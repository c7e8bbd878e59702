"""What `convert` drops, draws, splits and merges, what it always counts, and what it skips."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest

from ismdata.convert.options import Cleaning, Selection
from ismdata.convert.pipeline import ConvertReport, convert, explain_sources
from ismdata.data.conversations import ConvertedFolder
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.pack.pipeline import pack
from tests.support.paths import SCHEMAS


def rows_of(folder: Path) -> list[dict[str, Any]]:
    index = json.loads((folder / "index.json").read_text())
    rows: list[dict[str, Any]] = []
    for shard in index["shards"]:
        with pa.memory_map(str(folder / shard["name"])) as mapped:
            rows += pa.ipc.open_stream(mapped).read_all().to_pylist()
    return rows


def texts_of(folder: Path) -> list[list[str]]:
    return [[message["content"] for message in row["messages"]] for row in rows_of(folder)]


def check_counts(report: ConvertReport, folders: list[Path]) -> None:
    """read = written + quarantined in the report, in each index and in total, and the output verifies."""
    assert report.read == report.written + sum(report.quarantined.values())
    total: Counter[str] = Counter()
    for folder in folders:
        counts = json.loads((folder / "index.json").read_text())["counts"]
        assert counts["read"] == counts["written"] + sum(counts["quarantined"].values())
        lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        assert Counter(line["reason"] for line in lines) == counts["quarantined"]
        total.update({"read": counts["read"], "written": counts["written"]})
    assert total == {"read": report.read, "written": report.written}
    assert verify(report.output).problems == []


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three hundred conversations of two to seven turns, every tenth a repeat of the first."""
    talks = [[f"talk {0 if n % 10 == 9 else n} turn {turn}" for turn in range(2 + n % 6)] for n in range(300)]
    talks = [talks[0] if n % 10 == 9 else talk for n, talk in enumerate(talks)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return path


def test_repeats_are_counted_always_and_dropped_on_request(corpus, tmp_path):
    report = convert([str(corpus)], tmp_path / "all")
    assert (report.duplicates, report.written) == (30, 300)
    report = convert([str(corpus)], tmp_path / "once", selection=Selection(cleaning=Cleaning(dedup="exact")))
    assert (report.duplicates, report.written, report.quarantined) == (30, 270, {"duplicate": 30})
    texts = texts_of(tmp_path / "once")
    assert len({tuple(text) for text in texts}) == len(texts) == 270
    check_counts(report, [tmp_path / "once"])


def test_short_and_excluded_conversations_go_with_their_reason(corpus, tmp_path):
    cleaning = Cleaning(min_turns=4, exclude=(r"talk 2\d\d ",))
    report = convert([str(corpus)], tmp_path / "out", selection=Selection(cleaning=cleaning))
    texts = texts_of(tmp_path / "out")
    assert texts and all(len(text) >= 4 and not re.match(r"talk 2\d\d ", text[0]) for text in texts)
    given = [json.loads(line) for line in corpus.read_text().splitlines()]
    expected = Counter(
        "too_few_turns" if len(talk) < 4 else "excluded" if re.match(r"talk 2\d\d ", talk[0]) else "" for talk in given
    )
    assert report.quarantined == {reason: count for reason, count in sorted(expected.items()) if reason}
    check_counts(report, [tmp_path / "out"])


@pytest.mark.parametrize("raw", [True, False])
def test_conversations_of_another_corpus_are_dropped(corpus, tmp_path, raw):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(corpus.read_text().splitlines(keepends=True)[10:20]))
    if not raw:
        convert([str(other)], tmp_path / "other")
        other = tmp_path / "other"
    report = convert([str(corpus)], tmp_path / "out", selection=Selection(against=(str(other),)))
    # Lines 11 to 19, and line 20, which is one of the thirty repeats of the first line.
    assert report.quarantined == {"in_other": 9 + 31}
    check_counts(report, [tmp_path / "out"])


def test_a_sample_has_its_size_is_in_order_and_depends_on_the_seed(corpus, tmp_path):
    drawn = {}
    for name, seed, workers in (("a", 0, 1), ("b", 0, 4), ("c", 1, 1)):
        selection = Selection(sample=50, seed=seed)
        report = convert([str(corpus)], tmp_path / name, selection=selection, workers=workers)
        assert (report.written, report.quarantined) == (50, {"not_sampled": 250})
        check_counts(report, [tmp_path / name])
        drawn[name] = [int(row["source"].rpartition(":")[2]) for row in rows_of(tmp_path / name)]
        assert drawn[name] == sorted(drawn[name])
    assert drawn["a"] == drawn["b"] != drawn["c"]
    report = convert([str(corpus)], tmp_path / "more", selection=Selection(sample=1000))
    assert (report.written, report.quarantined) == (300, {})


@pytest.mark.parametrize("sample", [None, 120])
def test_a_split_keeps_repeats_in_one_part(corpus, tmp_path, sample):
    report = convert([str(corpus)], tmp_path / "out", selection=Selection(split="0.6/0.3/0.1", sample=sample))
    folders = [tmp_path / "out" / name for name in ("train", "validation", "test")]
    check_counts(report, folders)
    texts = [{tuple(text) for text in texts_of(folder)} for folder in folders]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert sum(map(len, (rows_of(folder) for folder in folders))) == (sample or 300)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    jsonschema.validate(index, json.loads((SCHEMAS / "split_index.schema.json").read_text()))
    schema = json.loads((SCHEMAS / "conversations_index.schema.json").read_text())
    for folder in folders:
        jsonschema.validate(json.loads((folder / "index.json").read_text()), schema)
    assert report.parts == {folder.name: len(rows_of(folder)) for folder in folders} == index["parts"]


def test_both_sides_of_a_dialogue_and_all_paths_of_a_tree_are_in_one_part(corpus, tmp_path):
    convert([str(corpus)], tmp_path / "both", assistant="both", selection=Selection(split="0.5/0.5"))
    sides = {}
    for part in ("train", "validation"):
        for row in rows_of(tmp_path / "both" / part):
            assert sides.setdefault(row["source"], part) == part
    assert len(sides) == 300
    trees = tmp_path / "trees.jsonl"
    lines = []
    for tree in range(40):
        line = {"message_tree_id": f"t{tree}", "message_id": f"{tree}-q", "parent_id": None, "role": "prompter"}
        lines.append({**line, "text": f"question {tree}"})
        for reply in range(3):
            answer = {**line, "message_id": f"{tree}-{reply}", "parent_id": f"{tree}-q", "role": "assistant"}
            lines.append({**answer, "text": f"answer {tree} {reply}", "rank": reply})
    trees.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = convert([str(trees)], tmp_path / "trees", selection=Selection(split="0.5/0.5"))
    assert report.written == 120
    questions = [{row["messages"][0]["content"] for row in rows_of(tmp_path / "trees" / part)} for part in report.parts]
    assert not questions[0] & questions[1]
    best = convert([str(trees)], tmp_path / "best", tree="best")
    assert (best.written, {text[1][-1] for text in texts_of(best.output)}) == (40, {"0"})


@pytest.mark.slow
def test_a_split_folder_is_verified_whole_and_packed_by_part(corpus, tmp_path, smollm2):
    convert([str(corpus)], tmp_path / "out", selection=Selection(split="0.5/0.5"))
    with pytest.raises(DataError, match=r"holds splits; .*Name .*train or .*validation"):
        ConvertedFolder(tmp_path / "out")
    packed = pack([tmp_path / "out" / "train"], tmp_path / "packed", tokenizer=str(smollm2), seq_len=256)
    assert packed.counts["packed"] == len(rows_of(tmp_path / "out" / "train"))
    shard = tmp_path / "out" / "validation" / "conversations-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    (problem,) = verify(tmp_path / "out").problems
    assert str(shard) in problem


def test_an_invalid_selection_leaves_nothing(corpus, tmp_path):
    with pytest.raises(UsageError, match="adds up to"):
        convert([str(corpus)], tmp_path / "out", selection=Selection(split="0.9/0.2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talks.jsonl"]


def test_an_empty_part_is_refused(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('["q", "a"]\n')
    with pytest.raises(DataError, match="has none of the 1 conversations"):
        convert([str(path)], tmp_path / "out", selection=Selection(split="0.5/0.5"))


def test_a_choice_without_effect_is_noted(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    report = convert([str(path)], tmp_path / "out", assistant="both", tree="best")
    assert [note.split(":")[0] for note in report.notes] == ["--assistant had no effect", "--tree had no effect"]


def test_consecutive_messages_are_merged_on_request(tmp_path):
    path = tmp_path / "one.jsonl"
    roles = [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")]
    record = {"messages": [{"role": role, "content": content} for role, content in roles]}
    path.write_text(json.dumps(record) + "\n" + '{"messages": [{"role": "user", "content": "x"}]}\n')
    convert([str(path)], tmp_path / "kept")
    convert([str(path)], tmp_path / "joined", join=True)
    assert texts_of(tmp_path / "kept") == [["a", "b", "c", "d", "e"], ["x"]]
    assert texts_of(tmp_path / "joined") == [["a\nb", "c\nd", "e"], ["x"]]


def test_a_file_of_a_folder_that_is_no_corpus_is_skipped_and_named(corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "talks.jsonl").write_text(corpus.read_text())
    (folder / "about.json").write_text('{"licence": "none"}')
    report = convert([str(folder)], tmp_path / "out")
    assert report.written == 300
    assert any("about.json" in note and "licence" in note for note in report.notes)
    assert [name for source in report.sources for name in source.left_aside] == [str(folder / "about.json")]
    with pytest.raises(DataError, match=r"about\.json"):
        convert([str(folder / "about.json"), str(corpus)], tmp_path / "named")


def test_an_archive_of_a_folder_without_a_corpus_is_skipped_and_named(corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "talks.jsonl").write_text(corpus.read_text())
    with tarfile.open(folder / "pictures.tar", "w") as archive:
        for name in ("pictures/one.png", "pictures/two.png"):
            archive.add(__file__, name)
    report = convert([str(folder)], tmp_path / "out")
    assert (report.written, report.read) == (300, 300)
    assert any("pictures.tar" in name for source in report.sources for name in source.left_aside)
    assert verify(tmp_path / "out").problems == []


def test_explaining_writes_nothing_and_its_mapping_reads_the_file(tmp_path):
    path = tmp_path / "odd.jsonl"
    talk = {"talk": [{"who": "Kim", "said": "Is it open?"}, {"who": "Bo", "said": "Until six, every day."}]}
    path.write_text(json.dumps(talk) + "\n")
    (found,) = explain_sources([str(path)])
    mapping = tmp_path / "odd.toml"
    mapping.write_text(found.as_json()["mapping"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["odd.jsonl", "odd.toml"]
    convert([str(path)], tmp_path / "out", mapping=mapping)
    (row,) = rows_of(tmp_path / "out")
    assert [(message["role"], message["content"]) for message in row["messages"]] == [
        ("user", "Is it open?"),
        ("assistant", "Until six, every day."),
    ]
