"""The paper's comparison: its runs and commands, going on where it ended, and its figures against sums written out."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU
from typer.testing import CliRunner

from ismdata.cli.main import app
from ismdata.eval.results import FORMAT, write_results
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # trains

BENCHMARKS = ROOT / "benchmarks"
WORDS = ["rain", "sun", "wind", "hail", "snow", "fog"]


@pytest.fixture(scope="module")
def paper():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("paper")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def report(paper):
    return importlib.import_module("paper_report")


def setting(paper, **changed):
    facts = {"corpus": "dailydialog", "model": "tiny", "train": 50, "test": 20, "epochs": 2.0, "step_tokens": 2048}
    facts |= {"vocabulary": 600, "precision": "auto", "generate": 5, "max_new_tokens": 16}
    return paper.Setting(**facts | changed)


def experiment(paper, folder, **changed):
    return paper.Experiment(setting(paper, **changed), data=folder / "data", output=folder / "out", threads=1)


def test_runs_are_whole_seeds_one_after_the_other(paper, tmp_path):
    runs = experiment(paper, tmp_path).runs([3, 5])
    assert [run.seed for run in runs] == [3] * 6 + [5] * 6
    assert [run.name for run in runs[:6]] == [
        "causal-3",
        "ism-3",
        "prefix-conversations-3",
        "prefix-compute-3",
        "prefix-3-conversations-3",
        "prefix-3-compute-3",
    ]


def test_commands_are_what_the_command_line_takes(paper, tmp_path, monkeypatch):
    commands = []

    def recorded(self, *words, output):
        commands.append([str(word) for word in (*words, "-o", self.folder / output)])
        return self.folder / output

    monkeypatch.setattr(paper.Experiment, "ismdata", recorded)
    monkeypatch.setattr(paper.Experiment, "_tokenizer", lambda self, train: ("tokenizer", "--chat-template", "chatml"))
    monkeypatch.setattr(paper.Experiment, "one_pass_steps", lambda self: 77)
    asked = experiment(paper, tmp_path)
    asked.prepare()
    for run in asked.runs([1]):
        asked.train_and_evaluate(run)
    options = {(words[0], word) for words in commands for word in words if word.startswith("--")}
    names = {name for name, _ in options}
    helped = {name: CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400"}).output for name in names}
    assert not [f"ismdata {name} has no {option}" for name, option in options if option not in helped[name]]
    outputs = [Path(words[-1]).name for words in commands]
    assert len(set(outputs)) == len(outputs)
    converted = next(words for words in commands if words[-1].endswith("/train"))
    assert converted[converted.index("--against") + 1].endswith("/test-all")
    steps = {Path(words[-1]).name: words[-3] for words in commands if words[0] == "train" and "--steps" in words}
    assert steps == {"model-prefix-compute-1": "77", "model-prefix-3-compute-1": "77"}


def test_a_command_runs_once_and_its_failure_is_shown(paper, tmp_path):
    source = tmp_path / "talk.jsonl"
    source.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    asked = experiment(paper, tmp_path)
    first = asked.ismdata("convert", source, output="train")
    made = (first / "index.json").stat().st_mtime_ns
    stage = json.loads((asked.folder / "stages" / "train.json").read_text())
    assert stage["processor_seconds"] > 0.1 and stage["command"].startswith("ismdata convert")
    assert asked.ismdata("convert", source, output="train") == first
    assert (first / "index.json").stat().st_mtime_ns == made
    assert json.loads((asked.folder / "stages" / "train.json").read_text()) == stage
    with pytest.raises(SystemExit, match=r"(?s)test\.log: ended with \d.*no-such-file"):
        asked.ismdata("convert", tmp_path / "no-such-file", output="test")


def test_another_setting_is_refused(paper, tmp_path):
    experiment(paper, tmp_path)
    experiment(paper, tmp_path)
    with pytest.raises(SystemExit, match=r"begun with another setting: epochs 2\.0 there, 3\.0 here"):
        experiment(paper, tmp_path, epochs=3.0)


# Figures


def answers(seed, run_seed):
    """Made-up lines of an evaluation: the same answers for every run, in an order and with losses of its own."""
    draw, own = random.Random(seed), random.Random(run_seed)
    lines = []
    for conversation in range(30):
        for turn in range(1, draw.randint(2, 5)):
            targets, said = draw.randint(1, 9), draw.choices(WORDS, k=6)
            generated = " ".join(own.choices(said, k=6)) if conversation < 10 else None
            lines.append(
                {
                    "conversation": f"talk-{conversation}",
                    "turn": turn,
                    "answer": f"{conversation}-{turn}",
                    "target_tokens": targets,
                    "nll": targets * own.uniform(2, 4),
                    "reference": " ".join(said),
                    "generated": generated,
                }
            )
    own.shuffle(lines)
    return lines


@pytest.fixture
def done(paper, report, tmp_path):
    """Seeds 0 and 1 whole, seed 2 begun; and the lines of each run."""
    asked = experiment(paper, tmp_path)
    lines = {}
    for number, run in enumerate([*asked.runs([0, 1]), *asked.runs([2])[:2]]):
        lines[run.name] = answers(7, number)
        folder = asked.folder / f"eval-{run.name}"
        folder.mkdir()
        write_results(folder, {"format": FORMAT, "generation": {"tokenizer": "13a"}}, lines[run.name])
        model = asked.folder / f"model-{run.name}"
        model.mkdir()
        (model / "metrics.csv").write_text(f"step,loss,tokens,target_tokens\n1,3,9,9\n8,2,{1000 + run.seed},500\n")
        stage = {"command": "ismdata train", "seconds": 3.0, "processor_seconds": 2.0}
        (asked.folder / "stages" / f"model-{run.name}.json").write_text(json.dumps(stage))
    return asked, lines


def test_only_whole_seeds_count(report, done):
    asked, _ = done
    assert report.whole_seeds(asked.folder) == [0, 1]


def test_figures_are_the_sums_written_out(report, done):
    asked, lines = done
    report.write_report(asked.folder.parent)
    facts = json.loads((asked.folder.parent / "paper.json").read_text())["dailydialog-tiny"]
    assert facts["test"]["answers"] == len(lines["ism-0"])
    row = next(each for each in facts["rows"] if (each["method"], each["budget"]) == ("prefix", "compute"))

    def nats(names, turn=None):
        sums = defaultdict(float)
        for name in names:
            for line in lines[name]:
                if turn in (None, line["turn"]):
                    sums["nll"] += line["nll"]
                    sums["targets"] += line["target_tokens"]
        return sums["nll"] / sums["targets"]

    names, ism = ["prefix-compute-0", "prefix-compute-1"], ["ism-0", "ism-1"]
    assert row["nll"]["value"] == pytest.approx(nats(names))
    assert row["nll_by_seed"] == pytest.approx([nats([name]) for name in names])
    assert row["less_ism"]["value"] == pytest.approx(nats(names) - nats(ism))
    assert row["less_ism_by_seed"] == pytest.approx(
        [nats([mine]) - nats([other]) for mine, other in zip(names, ism, strict=True)]
    )
    for each in row["by_turn"]:
        assert each["nll"]["value"] == pytest.approx(nats(names, each["turn"]))
        assert each["conversations"] == sum(line["turn"] == each["turn"] for line in lines[names[0]])
    said = [line for line in lines[names[0]] if line["generated"] is not None]
    expected = BLEU(tokenize="13a").corpus_score(
        [line["generated"] for line in said], [[line["reference"] for line in said]]
    )
    assert row["bleu_by_seed"][0] == pytest.approx(expected.score)
    assert row["cost"]["tokens"] == 1000.5 and row["cost"]["processor_seconds"] == 2.0
    low, high = row["nll"]["interval"]
    assert low < row["nll"]["value"] < high


def test_the_table_has_a_line_for_each_way_and_budget(report, done):
    asked, _ = done
    output = report.write_report(asked.folder.parent)
    table = (output / "table.md").read_text().splitlines()
    rows = [line.split(" | ") for line in table if line.startswith("| ")][1:]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        ("causal", "both"),
        ("ism", "both"),
        ("prefix", "conversations"),
        ("prefix", "compute"),
        ("prefix-3", "conversations"),
        ("prefix-3", "compute"),
    ]
    assert "Seeds: 0, 1." in "\n".join(table)
    for name in ("paper-turns", "paper-compute"):
        assert (output / f"{name}.svg").stat().st_size > 1000


def test_other_answers_are_not_compared(report, done):
    asked, lines = done
    folder = asked.folder / "eval-causal-0"
    changed = [dict(line, target_tokens=line["target_tokens"] + 1) for line in lines["causal-0"]]
    write_results(folder, {"format": FORMAT, "generation": {"tokenizer": "13a"}}, changed)
    with pytest.raises(SystemExit, match="causal was evaluated on other answers than ism"):
        report.write_report(asked.folder.parent)


def test_a_run_without_generated_answers_has_no_bleu(report, done):
    asked, lines = done
    for run in asked.runs([0, 1]):
        silent = [dict(line, generated=None) for line in lines[run.name]]
        write_results(asked.folder / f"eval-{run.name}", {"format": FORMAT, "generation": None}, silent)
    output = report.write_report(asked.folder.parent)
    facts = json.loads((output / "paper.json").read_text())["dailydialog-tiny"]
    assert all(row["bleu"] is None for row in facts["rows"])
    assert all(math.isfinite(row["nll"]["value"]) for row in facts["rows"])
