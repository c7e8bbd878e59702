"""DailyDialog, and lines with tabs: labels, and the fast path against the general one."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ismdata.conversation import ROLE_NAMES
from ismdata.convert.corpus_format import Choices, SourceBlock, with_choices
from ismdata.convert.formats.registry import FORMATS
from ismdata.convert.read_block import read_block, read_records
from ismdata.convert.sources.blocks import LineBlock
from ismdata.convert.sources.framing import line_block
from tests.convert.formats.test_fast_path import compare, text
from tests.support.records import PLACE, RULES, conversations, refusal


def test_labels_of_a_line_go_to_meta():
    (conversation,) = conversations("dailydialog", "a __eou__ b __eou__\t1\t2 1\t0 0")
    assert json.loads(conversation["meta"]) == {"labels": ["1", "2 1", "0 0"]}
    reason, detail = refusal("dailydialog", "a __eou__ b\tc __eou__ d")
    assert reason == "invalid_row" and "'c __eou__ d'" in detail


@settings(deadline=None, max_examples=150)
@given(
    lines=st.lists(
        st.lists(st.one_of(text, st.sampled_from(["__eou__", " __eou__ ", "\t"])), max_size=6).map("".join), max_size=6
    )
)
@example(lines=["__eou__", "__eou__ a", "a __eou__ __eou__ b", " "])
def test_both_paths_agree_on_dailydialog(lines):
    data = "\n".join(line.replace("\n", " ").replace("\r", " ") for line in lines).encode("utf-8", "surrogatepass")
    block, _ = line_block(data, 1, plain_text=True)
    compare(block, "dailydialog")


@settings(deadline=None, max_examples=100)
@given(
    lines=st.lists(
        st.lists(st.sampled_from(["a", " b ", "\t", "\u3000", "你", "", "__eou__"]), max_size=6).map("".join),
        max_size=6,
    )
)
@example(lines=["a\tb", "a", "\t", "a\t\tb", "a\tb\tc\t"])
def test_both_paths_agree_on_lines_with_tabs(lines):
    block, _ = line_block("\n".join(lines).encode(), 1, plain_text=True)
    assert isinstance(block, LineBlock)
    for name in ("tsv_pairs", "dailydialog"):
        for assistant in ("second", "first", "both"):
            corpus_format = with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, assistant=assistant))
            fast = read_block(SourceBlock(block, PLACE, corpus_format), RULES)
            general = read_records(SourceBlock(block, PLACE, corpus_format), RULES)
            assert fast.rows.to_pylist() == general.rows.to_pylist()
            assert fast.quarantined == general.quarantined
