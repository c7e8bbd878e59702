"""`pack` from converted folders to shards: nothing lost, every answer trained once, the same bytes each time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerFast

from ismdata import masks
from ismdata.convert.pipeline import convert
from ismdata.data.shards import PackedShards, packed_schema
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.pack.pipeline import note_resumed, pack
from ismdata.pack.report import PackReport
from ismdata.pack.template_check import SkeletonMismatch
from ismdata.rendering.sensitivity import Sensitivity
from tests.conftest import template_named
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.paths import SCHEMAS
from tests.support.reporters import Recorder

ROOMY = 1024


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte, and one per marker of ChatML, so that text shows its length."""
    return save_tokenizer(tmp_path_factory.mktemp("bytes"))


def talk(turns: int, *, system: str = "", size: int = 10, name: str = "t") -> list[dict[str, Any]]:
    head = [{"role": "system", "content": system}] if system else []
    body = [
        {"role": role, "content": f"{name}{k}{role[0]}".ljust(size, ".")}
        for k in range(turns)
        for role in ("user", "assistant")
    ]
    return head + body


def corpus(tmp_path: Path, conversations: list[list[dict[str, Any]]], name: str = "c") -> Path:
    source = tmp_path / f"{name}.jsonl"
    lines = [json.dumps({"id": f"{name}-{k}", "messages": m}) for k, m in enumerate(conversations)]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    convert([str(source)], tmp_path / f"{name}-converted")
    return tmp_path / f"{name}-converted"


def packed(tmp_path: Path, converted: Path, tokenizer: Path, **options: Any) -> tuple[PackReport, PackedShards]:
    options = {"seq_len": 256, "overwrite": True} | options
    report = pack([converted], tmp_path / "packed", tokenizer=str(tokenizer), **options)
    found = verify(tmp_path / "packed")
    assert found.problems == []
    index = json.loads((tmp_path / "packed" / "index.json").read_text(encoding="utf-8"))
    Draft202012Validator(json.loads((SCHEMAS / "packed_index.schema.json").read_text("utf-8"))).validate(index)
    counts = index["counts"]
    assert counts["read"] == counts["packed"] + sum(counts["quarantined"].values())
    return report, PackedShards(tmp_path / "packed")


def documents(shards: PackedShards) -> list[tuple[str, str, list[str]]]:
    """(conversation id, whole text, texts of the answers trained) of each document; bytes_tokenizer only."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(shards.folder / "tokenizer"))
    found = []
    for row in range(len(shards)):
        sequence = shards[row]
        start = 0
        for name, length in zip(sequence.conversation_ids, sequence.seq_lens.tolist(), strict=True):
            trained = [
                tokenizer.decode(sequence.input_ids[s:e])
                for s, e, kind, train in sequence.spans.tolist()
                if start <= s < start + length and train and kind == masks.ANSWER
            ]
            found.append((name, tokenizer.decode(sequence.input_ids[start : start + length]), trained))
            start += length
    return found


def answers(conversations: list[list[dict[str, Any]]]) -> Counter[str]:
    return Counter(m["content"] + "<|im_end|>" for c in conversations for m in c if m["role"] == "assistant")


def test_whole_conversations(tmp_path: Path, bytes_tokenizer: Path) -> None:
    conversations = [talk(k % 4 + 1, system="Be kind." * (k % 2), name=f"c{k}-") for k in range(30)]
    conversations.append([*talk(2, name="open-")[1:]])  # opens with the assistant
    conversations.append([*talk(2, name="ends-"), {"role": "user", "content": "and?"}])
    report, shards = packed(tmp_path, corpus(tmp_path, conversations), bytes_tokenizer, seq_len=ROOMY)
    found = documents(shards)
    assert report.counts == {"read": 32, "packed": 32, "quarantined": {}}
    assert Counter(name for name, _, _ in found) == Counter(f"c-{k}" for k in range(32))
    rendered = {
        f"c-{k}": "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in c)
        for k, c in enumerate(conversations)
    }
    assert {name: text for name, text, _ in found} == rendered
    assert Counter(answer for _, _, trained in found for answer in trained) == answers(conversations)
    assert report.totals["tokens"] == sum(
        len(text.replace("<|im_start|>", "x").replace("<|im_end|>", "x")) for text in rendered.values()
    )
    assert report.totals["sequences"] >= report.totals["lower_bound_sequences"] > 1


@pytest.mark.parametrize("mask", masks.MASKS)
def test_over_long_conversations_are_split_at_turns(mask: str, tmp_path: Path, bytes_tokenizer: Path) -> None:
    conversations = [talk(12, system="Be kind.", size=20), talk(2), talk(9, size=31)]
    report, shards = packed(tmp_path, corpus(tmp_path, conversations), bytes_tokenizer, mask=mask)
    found = documents(shards)
    assert report.counts["quarantined"] == {}
    assert report.totals["split"] == 2
    assert Counter(answer for _, _, trained in found for answer in trained) == answers(conversations)
    for name, text, trained in found:
        whole = name == "c-1"
        assert whole or text.endswith(trained[-1])  # a part ends with an answer
        if name.startswith("c-0"):
            assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
        assert text.count("<|im_start|>system") == (name.startswith("c-0"))
    if mask == "prefix":
        assert all(len(trained) == 1 for _, _, trained in found)
        assert len(found) == 12 + 2 + 9
    else:
        assert sorted(name for name, _, _ in found if name.startswith("c-0")) == [
            f"c-0#{k}" for k in range(sum(n.startswith("c-0") for n, _, _ in found))
        ]


def test_an_answer_that_cannot_fit_is_quarantined_whole(tmp_path: Path, bytes_tokenizer: Path) -> None:
    conversations = [talk(3, size=20), [*talk(2), *talk(1, size=400, name="long")]]
    report, shards = packed(tmp_path, corpus(tmp_path, conversations), bytes_tokenizer)
    assert report.counts["quarantined"] == {"over_long": 1}
    assert report.totals["dropped"] == 1
    assert {name for name, _, _ in documents(shards)} == {"c-0"}
    line = json.loads((tmp_path / "packed" / "quarantine.jsonl").read_text(encoding="utf-8"))
    assert line["source"].endswith("c.jsonl:2")
    assert "message 6 needs" in line["detail"]
    assert line["record"]["id"] == "c-1"
    Draft202012Validator(json.loads((SCHEMAS / "quarantine.schema.json").read_text("utf-8"))).validate(line)


def test_other_policies(tmp_path: Path, bytes_tokenizer: Path) -> None:
    conversations = [talk(2), talk(12, size=20), talk(1, size=300)]
    converted = corpus(tmp_path, conversations)
    report, _ = packed(tmp_path, converted, bytes_tokenizer, over_long="drop")
    assert report.counts["quarantined"] == {"over_long": 2}
    report, shards = packed(tmp_path, converted, bytes_tokenizer, over_long="truncate")
    assert report.counts["quarantined"] == {"no_target_left": 1}
    assert (report.totals["truncated"], report.totals["dropped"]) == (1, 1)
    long = next(text for name, text, _ in documents(shards) if name == "c-1")
    assert len(long.replace("<|im_start|>", "x").replace("<|im_end|>", "x")) == 256
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversations[1])
    assert whole.startswith(long)
    assert report.totals["truncated_tokens"] == len(whole.replace("<|im_start|>", "x").replace("<|im_end|>", "x")) - 256
    with pytest.raises(DataError, match=r"c\.jsonl:2: \d+ tokens; expected at most 256"):
        pack([converted], tmp_path / "stopped", tokenizer=str(bytes_tokenizer), seq_len=256, over_long="error")
    assert not (tmp_path / "stopped").exists()


def test_prefix_every(tmp_path: Path, bytes_tokenizer: Path) -> None:
    conversations = [talk(7), talk(2), talk(3)]
    report, shards = packed(
        tmp_path, corpus(tmp_path, conversations), bytes_tokenizer, mask="prefix", prefix_every=3, seq_len=ROOMY
    )
    trained = sorted(answer.partition(".")[0] for _, _, each in documents(shards) for answer in each)
    assert trained == ["t2a", "t2a", "t5a"]
    assert report.counts["quarantined"] == {"no_target": 1}


def test_marks_on_messages(tmp_path: Path, bytes_tokenizer: Path) -> None:
    marked = talk(4)
    marked[1]["train"] = False
    marked[3]["weight"] = 0
    marked[5]["weight"] = 0.5
    silent = talk(1)
    silent[1]["train"] = False
    report, shards = packed(tmp_path, corpus(tmp_path, [marked, silent]), bytes_tokenizer, seq_len=ROOMY)
    assert report.counts["quarantined"] == {"no_target": 1}
    assert shards.weighted
    sequence = shards[0]
    assert documents(shards)[0][2] == [m["content"] + "<|im_end|>" for m in (marked[5], marked[7])]
    assert sequence.loss_weight is not None
    assert Counter(sequence.loss_weight[sequence.loss_mask == 1].tolist()) == {0.5: 11, 1.0: 11}
    assert not sequence.loss_weight[sequence.loss_mask == 0].any()


def test_expand_gives_each_answer_its_own_document(tmp_path: Path, smollm2: Path) -> None:
    converted = corpus(tmp_path, [talk(3), talk(1)])
    report, shards = packed(
        tmp_path, converted, smollm2, chat_template=str(template_named("qwen3")), history="expand", seq_len=ROOMY
    )
    names = sorted(name for row in range(len(shards)) for name in shards[row].conversation_ids)
    assert names == ["c-0#0", "c-0#1", "c-0#2", "c-1#0"]
    assert report.totals["conversations"] == 2


def test_refused_by_the_template(tmp_path: Path, smollm2: Path) -> None:
    converted = corpus(tmp_path, [talk(1, system="Be kind."), talk(2)])
    report, _ = packed(tmp_path, converted, smollm2, chat_template=str(template_named("gemma")))
    assert report.counts["quarantined"] == {"template_refused": 1}
    assert "System role not supported" in report.first_refusals[0].detail
    with pytest.raises(DataError, match=r"no conversation can be packed \(1 x template_refused\).*sys\.jsonl:1"):
        pack(
            [corpus(tmp_path, [talk(1, system="Be kind.")], "sys")],
            tmp_path / "none",
            tokenizer=str(smollm2),
            chat_template=str(template_named("gemma")),
        )
    assert not (tmp_path / "none").exists()


def test_tools_and_calls(tmp_path: Path, smollm2: Path) -> None:
    """Tool calls are answers, tool results are queries."""
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "name": "clock"},
        {"role": "assistant", "content": "Noon."},
    ]
    tools = [{"type": "function", "function": {"name": "clock", "description": "d", "parameters": {}}}]
    source = tmp_path / "tools.jsonl"
    source.write_text(json.dumps({"messages": messages, "tools": tools}), encoding="utf-8")
    convert([str(source)], tmp_path / "converted")
    _, shards = packed(
        tmp_path, tmp_path / "converted", smollm2, chat_template=str(template_named("qwen3_instruct_2507")), seq_len=512
    )
    _, text, trained = documents(shards)[0]
    assert '"name": "clock"' in text[: text.index("What time")]
    assert trained == [
        '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>',
        "Noon.<|im_end|>",
    ]


def test_calls_that_a_template_omits(tmp_path: Path, smollm2: Path) -> None:
    """SmolLM2's own template does not write tool calls: an answer that is a call would be trained as an empty one."""
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Time?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    report, _ = packed(tmp_path, corpus(tmp_path, [messages, talk(1)]), smollm2)
    assert report.counts["quarantined"] == {"not_rendered": 1}
    assert "calls the tool 'clock'" in report.first_refusals[0].detail


def test_a_template_that_does_more_than_its_probing_showed(
    tmp_path: Path, bytes_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample of the corpus finds it, and each conversation is rendered individually instead."""
    source = (tmp_path / "loud.jinja").absolute()
    source.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    blind = Sensitivity(triggers=(), blank=False, everything=False)
    monkeypatch.setattr("ismdata.rendering.encoding.find_sensitivity", lambda renderer, prepends: blind)
    recorder = Recorder()
    report, shards = packed(
        tmp_path, corpus(tmp_path, [talk(2)]), bytes_tokenizer, chat_template=str(source), reporter=recorder
    )
    assert any("rendered individually" in note for note in recorder.notes)
    assert report.counts["packed"] == 1
    assert [answer for _, _, trained in documents(shards) for answer in trained] == [
        "T0A.......<|im_end|>",
        "T1A.......<|im_end|>",
    ]


def test_renderings_that_differ_each_time_are_an_error(
    tmp_path: Path, bytes_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a template that uses random numbers: trying again would never end."""
    asked = []

    def never_alike(*arguments: Any) -> None:
        asked.append(arguments)
        raise SkeletonMismatch("c.jsonl:1")

    monkeypatch.setattr("ismdata.pack.tokenize.template_check.prepare_comparison", never_alike)
    with pytest.raises(DataError, match=r"c\.jsonl:1: two renderings of the conversation differ"):
        packed(tmp_path, corpus(tmp_path, [talk(2)]), bytes_tokenizer, tokenizer_backend="hf")
    assert len(asked) == 2


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path, bytes_tokenizer: Path) -> None:
    converted = corpus(tmp_path, [talk(k % 9 + 1, size=15, name=f"{k}-") for k in range(200)])
    folders = []
    for number, workers in enumerate((1, 2, 0)):
        folder = tmp_path / f"run{number}"
        pack([converted], folder, tokenizer=str(bytes_tokenizer), seq_len=256, workers=workers)
        folders.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert folders[0] == folders[1] == folders[2]
    pack([converted], tmp_path / "seeded", tokenizer=str(bytes_tokenizer), seq_len=256, seed=1)
    assert (tmp_path / "seeded" / "shard-00000.arrow").read_bytes() != folders[0][Path("shard-00000.arrow")]


def test_several_folders_at_once(tmp_path: Path, bytes_tokenizer: Path) -> None:
    one, two = corpus(tmp_path, [talk(2)], "one"), corpus(tmp_path, [talk(3)], "two")
    report = pack([one, two], tmp_path / "both", tokenizer=str(bytes_tokenizer), seq_len=256)
    assert report.totals["conversations"] == 2
    assert verify(tmp_path / "both").ok


def test_ids_that_look_like_parts_and_repeat(tmp_path: Path, bytes_tokenizer: Path) -> None:
    source = tmp_path / "c.jsonl"
    ids = ["a#1", "a", "a", "a#0", "b#7x"]
    source.write_text("\n".join(json.dumps({"id": id, "messages": talk(1)}) for id in ids), encoding="utf-8")
    convert([str(source)], tmp_path / "converted")
    report, shards = packed(tmp_path, tmp_path / "converted", bytes_tokenizer)
    assert report.totals["conversations"] == 5
    names = sorted(name for row in range(len(shards)) for name in shards[row].conversation_ids)
    assert names == ["a", "a", "a#0#0", "a#1#0", "b#7x"]


def test_a_converted_folder_that_was_tampered_with(tmp_path: Path, bytes_tokenizer: Path) -> None:
    converted = corpus(tmp_path, [talk(1)])
    shard = converted / "conversations-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"conversations-00000\.arrow: \d+ bytes; expected \d+"):
        pack([converted], tmp_path / "out", tokenizer=str(bytes_tokenizer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1000}, "--seq-len 1000: expected a positive multiple of 128, for instance 1024"),
        ({"seq_len": 0}, "--seq-len 0: expected a positive multiple of 128, for instance 128"),
        (
            {"seq_len": 1 << 22},
            "--seq-len 4194304: expected at most 4194176, because block tables number blocks in 16 bits",
        ),
        ({"mask": "full"}, "--mask is 'full'; expected one of ism, causal, prefix"),
        ({"over_long": "cut"}, "--over-long is 'cut'; expected one of split, drop, truncate, error"),
        ({"history": "rewrite"}, "--history is 'rewrite'; expected one of append, expand"),
        ({"prefix_every": 0}, "--prefix-every 0: expected 1 or more"),
        ({"prefix_every": 2}, "--prefix-every requires --mask prefix; found --mask ism"),
        ({"workers": -1}, "--workers -1: expected 0 (all cores) or more"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pack([tmp_path], tmp_path / "out", tokenizer="none", **options)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_tokenizer_without_pad_and_eos(tmp_path: Path, bytes_tokenizer: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(bytes_tokenizer))
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    converted = corpus(tmp_path, [talk(1)])
    with pytest.raises(DataError, match="neither a pad nor an eos token"):
        pack([converted], tmp_path / "out", tokenizer=str(tmp_path / "bare"), chat_template="chatml")


def test_the_arrow_schema_is_the_published_one() -> None:
    text = "".join(
        f"{f.name}: {f.type}{'' if f.nullable else ' not null'}\n"
        for f in packed_schema(1280, weighted=True, layout="glm")
    )
    published = (SCHEMAS / "packed.arrow.txt").read_text(encoding="utf-8")
    assert published.replace("[T]", "[1280]").replace("[4·T/128]", "[40]") == text


def test_rows_hold_what_their_names_say(tmp_path: Path, bytes_tokenizer: Path) -> None:
    """Columns against values computed token by token."""
    _, shards = packed(tmp_path, corpus(tmp_path, [talk(2, name=f"{k}-") for k in range(9)]), bytes_tokenizer)
    for row in range(len(shards)):
        sequence = shards[row]
        used = int(sequence.seq_lens.sum())
        pad = PreTrainedTokenizerFast.from_pretrained(str(bytes_tokenizer)).pad_token_id
        assert (sequence.input_ids[used:] == pad).all()
        assert sequence.position_ids.tolist() == [k for n in sequence.seq_lens for k in range(n)] + [0] * (256 - used)
        lo, hi = masks.intervals(sequence.seq_lens, sequence.spans, seq_len=256, mask="ism")
        assert np.array_equal(sequence.block_table, masks.block_table(lo, hi))
        assert np.array_equal(
            sequence.loss_mask, masks.targets(sequence.seq_lens, sequence.spans, seq_len=256, mask="ism")
        )
    table = pa.ipc.open_stream(shards.folder / "shard-00000.arrow").read_all()
    assert table.schema.equals(packed_schema(256, weighted=False))


@pytest.mark.parametrize("state", [None, {"done": 0}])
def test_a_run_that_wrote_shards_is_reported_as_resumed(state: dict[str, int] | None) -> None:
    """Also if it was killed before it recorded a conversation."""
    recorder = Recorder()
    for journal in (
        SimpleNamespace(state=state, finished=[{"name": "shard-00000.arrow"}]),
        SimpleNamespace(state=None, finished=[]),
    ):
        note_resumed(SimpleNamespace(journal=journal, conversations=0, reporter=recorder))  # type: ignore[arg-type]
    assert ["shards written: 1" in note for note in recorder.notes] == [True]


def test_a_folder_named_twice_is_refused(tmp_path: Path, bytes_tokenizer: Path) -> None:
    converted = corpus(tmp_path, [talk(1)])
    again = tmp_path / "x" / ".." / converted.name
    (tmp_path / "x").mkdir()
    for folders in ([converted, converted], [converted, again]):
        with pytest.raises(UsageError, match=r"c-converted: named twice; .*--epochs"):
            pack(folders, tmp_path / "packed", tokenizer=str(bytes_tokenizer))
    assert not (tmp_path / "packed").exists()
