"""Known shapes of dialogue data, as they stand beside the repository: each is read as expected, or refused."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from ismdata.errors import DataError
from tests.support.converted import convert_paths
from tests.support.paths import SHARED

FOLDER = SHARED / "faults" / "shapes"
SHAPES: dict[str, Any] = json.loads((FOLDER / "expect.json").read_text()) if FOLDER.is_dir() else {}


@pytest.mark.skipif(not SHAPES, reason=f"the shapes are not here: {FOLDER}")
@pytest.mark.parametrize("name", SHAPES)
def test_a_known_shape_is_read_as_expected(name, tmp_path):
    shape = SHAPES[name]
    words = shlex.split(shape["args"])
    options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    expected = [[(role, text) for role, text in talk] for talk in shape["expect"] if talk is not None]
    path = str(FOLDER / shape["path"])
    if not expected:
        with pytest.raises(DataError, match=r"This looks like|3 speakers"):
            convert_paths([path], tmp_path / "out", **options)
        return
    found = convert_paths([path], tmp_path / "out", **options)
    assert found.talks == expected
    assert len(found.refusals) == shape["expect"].count(None)
