"""ChatGPT's exports: the branch that was shown last."""

from __future__ import annotations

from ismdata.convert.formats.registry import FORMATS
from tests.support.records import refusal
from tests.support.shapes import EXPORT


def test_only_the_branch_on_the_screen_is_read_and_the_others_are_counted():
    (draft,) = FORMATS["chatgpt_export"].parse_record(EXPORT)
    assert list(draft.ignored) == ["messages of other branches"]
    ring = {"current_node": "a", "mapping": {"a": {"message": None, "parent": "b"}, "b": {"parent": "a"}}}
    assert refusal("chatgpt_export", ring)[0] == "broken_tree"
    assert refusal("chatgpt_export", {"current_node": "x", "mapping": {}})[0] == "broken_tree"
