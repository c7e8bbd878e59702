"""Law 5 on real corpora: documents compared with transformers, for all templates of trl and two real tokenizers.

A few conversations of each corpus by default; `ISMDATA_LAW5_SAMPLE=40` takes that many.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ismdata.convert.pipeline import convert
from ismdata.masks.intervals import ANSWER
from ismdata.pack.batch_encoder import BatchEncoder
from ismdata.pack.conversation_batch import ConversationBatch
from ismdata.pack.requests import Requests
from ismdata.pack.skeleton_cache import SkeletonCache
from ismdata.rendering.encoding import Encoding
from ismdata.rendering.messages import as_template_messages
from tests.conftest import DATA, TEMPLATES, encoding, needs_data

pytestmark = pytest.mark.slow  # renders real corpora under many templates

SAMPLE = int(os.environ.get("ISMDATA_LAW5_SAMPLE", "2"))

CORPORA = {
    "dailydialog": ["dailydialog/train.zip", "dailydialog/validation.zip", "dailydialog/test.zip"],
    "kdconv": ["kdconv/film/dev.json", "kdconv/music/test.json", "kdconv/travel/dev.json"],
    "sharegpt": ["sharegpt/sharegpt_first5000.json.gz"],
    "lima": ["lima/lima.json"],
    "openai": ["openai-messages/toy_chat_fine_tuning.jsonl", "openai-messages/weather_chat_fine_tuning.jsonl"],
    "alpaca": ["llamafactory/alpaca_en_demo.json", "llamafactory/alpaca_zh_demo.json", "llamafactory/identity.json"],
    "history": ["llamafactory/history/oaast_sft_zh.json"],
    "glaive": ["llamafactory/glaive_toolcall_en_demo.json", "llamafactory/glaive_toolcall_zh_demo.json"],
    "lccc": ["lccc/LCCC-base_test.json"],
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pa.RecordBatch:
    """A seeded sample of every corpus, as one batch of conversations of at most 24 messages."""
    root = tmp_path_factory.mktemp("corpora")
    chosen = []
    for name, files in CORPORA.items():
        convert([str(DATA / file) for file in files], root / name)
        tables = [pa.ipc.open_stream(path).read_all() for path in sorted((root / name).rglob("*.arrow"))]
        table = pa.concat_tables(tables)
        short = np.flatnonzero(table.column("messages").combine_chunks().value_lengths().to_numpy() <= 24)
        picked = np.random.default_rng(5).choice(short, min(SAMPLE, len(short)), replace=False)
        chosen.append(table.take(picked))
    return pa.concat_tables(chosen).combine_chunks().to_batches()[0]


class Transformers:
    """Renders and encodes with transformers alone; only the date is fixed by ismdata."""

    def __init__(self, with_: Encoding) -> None:
        self.template = with_.renderer.template
        self.pretrained = with_.tokenizer.pretrained
        self.encode = cache(lambda text: self.pretrained.encode(text, add_special_tokens=False))

    def render(self, messages: list[dict[str, Any]], tools: Any, *, generation_prompt: bool = False) -> str | None:
        if self.template.call_content != "as_is":
            content = None if self.template.call_content == "null" else ""
            messages = [
                {**m, "content": content} if "tool_calls" in m and not (m.get("content") or "").strip() else m
                for m in messages
            ]
        if self.template.text_arguments:
            messages = [
                {**m, "tool_calls": [with_text_arguments(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
                for m in messages
            ]
        if self.template.typed_content:
            messages = [{**m, "content": [{"type": "text", "text": m.get("content") or ""}]} for m in messages]
        try:
            # apply_chat_template would call this too, but removes null contents first.
            [text], _ = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template.dated_source,
                add_generation_prompt=generation_prompt,
                **self.pretrained.special_tokens_map,
            )
        except Exception:  # templates raise any exception
            return None
        assert isinstance(text, str)
        return text

    def stable(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[int]] | None:
        """The rendering, and where each answer but an opening one starts; None if a shorter one is no prefix."""
        whole = self.render(messages, tools)
        starts = []
        for k, message in enumerate(messages):
            shorter = [self.render(messages[: k + 1], tools)]
            if message["role"] == "assistant" and k:
                shorter.append(self.render(messages[:k], tools, generation_prompt=True))
                starts.append(len(shorter[-1] or ""))
            if whole is None or any(text is None or not whole.startswith(text) for text in shorter):
                return None
        assert whole is not None
        return whole, starts


def with_fewer_calls(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """All variants of the conversation without one call, or without all calls of one message."""
    for k, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        for kept in ([], *([*calls[:j], *calls[j + 1 :]] for j in range(len(calls)))) if calls else ():
            yield [
                *messages[:k],
                {**message, "content": message.get("content") or "", "tool_calls": kept},
                *messages[k + 1 :],
            ]


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def request_all(batch: Any, history: str) -> Requests:
    """Requests for whole conversations, or for one document per answer."""
    if history == "append":
        conversation, hi = np.arange(len(batch)), np.diff(batch.first)
        target_from = np.zeros(len(batch), np.int64)
    else:
        answers = np.flatnonzero(batch.roles == 2)
        conversation = np.searchsorted(batch.first, answers, side="right") - 1
        target_from = answers - batch.first[conversation]
        hi = target_from + 1
    heads = batch.heads[conversation]
    return Requests(
        conversation=conversation, head=heads, lo=heads, hi=hi, target_from=target_from, cut=np.zeros(len(hi), bool)
    )


@needs_data
@pytest.mark.parametrize("history", ["append", "expand"])
@pytest.mark.parametrize(("name", "markers"), [("smollm2", True), ("deepseek", False)])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_law_5_on_real_conversations(
    template: Path, name: str, markers: bool, history: Any, rows: pa.RecordBatch, smollm2: Path, deepseek: Path
) -> None:
    with_ = encoding({"smollm2": smollm2, "deepseek": deepseek}[name], template, history, markers=markers)
    theirs = Transformers(with_)
    batch = ConversationBatch.from_rows(rows, with_.sensitivity)
    requests = request_all(batch, history)
    encoder = BatchEncoder(SkeletonCache(with_), batch)
    layout = encoder.lay_out(requests)
    documents = encoder.documents(layout, requests)
    assert encoder.stray_controls(layout, documents).size == 0
    ends, span_ends = np.cumsum(documents.lengths), np.cumsum(documents.span_counts)
    seen: Counter[str] = Counter()
    for r in range(len(requests)):
        messages, tools = as_template_messages(batch.conversation(int(requests.conversation[r])))
        messages = messages[: int(requests.hi[r])]
        if r in layout.refused and layout.refused[r].reason == "history_rewritten":
            drawn_in = "does not come before" in layout.refused[r].detail  # a tool result inside the model's turn
            assert theirs.stable(messages, tools) is None or (history == "expand" and drawn_in)
            seen["beyond append"] += 1
            continue
        if r in layout.refused and layout.refused[r].reason == "not_rendered":
            said = theirs.render(messages, tools)
            assert any(theirs.render(fewer, tools) == said for fewer in with_fewer_calls(messages))
            seen["calls left out"] += 1
            continue
        if r in layout.refused and layout.refused[r].reason == "text_lost":
            said = theirs.render(messages, tools) or ""
            assert any((m.get("content") or "").strip() not in said for m in messages)
            seen["texts left out"] += 1
            continue
        if r in layout.refused:
            pieces = [messages[:k] for k in range(1, len(messages) + 1)]
            assert any(
                theirs.render(p, tools) is None or theirs.render(p, tools, generation_prompt=True) is None
                for p in pieces
            ), layout.refused[r]
            seen["refused"] += 1
            continue
        ids = documents.input_ids[ends[r] - documents.lengths[r] : ends[r]].tolist()
        spans = documents.spans[span_ends[r] - documents.span_counts[r] : span_ends[r]].tolist()
        if with_.tokenizer.controls.escape([messages, tools])[1].mapping:
            seen["spells control tokens"] += 1  # transformers would encode the text as the token
            continue
        whole = theirs.render(messages, tools)
        found = theirs.stable(messages, tools)
        if history == "append" and found is None:
            seen["rewritten"] += 1
            continue
        assert whole is not None
        # Cut the text at our span borders. Each part must have the tokens that transformers gives it, and the parts
        # must join to the rendering. So only the forced token borders may differ.
        stretches = [ids[start:end] for start, end, *_ in spans]
        texts = [with_.tokenizer.decode(stretch) for stretch in stretches]
        if "\ufffd" not in whole:
            assert "".join(texts) == whole
        assert [id for text in texts for id in theirs.encode(text)] == ids or theirs.encode(whole) == ids
        if history == "append" and found is not None:
            begins = np.cumsum([0, *map(len, texts)]).tolist()
            answers = [begins[k] for k, span in enumerate(spans) if span[2] == ANSWER]
            opening = messages[0]["role"] == "assistant"
            prompt = with_.renderer.profile.generation_prompt
            for ours, their in zip(answers[int(opening) :], found[1], strict=True):
                # A header that only the rendering has is still context.
                assert ours == their or whole[their:ours].endswith(prompt)
        seen["compared"] += 1
    if seen["refused"] == len(requests):
        pytest.fail(f"the template refused everything: {seen}")
    assert seen["compared"] or seen["rewritten"], seen
