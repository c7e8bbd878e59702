"""JSON as records and their values are read and written: strict, except that a record may have NaN in its metadata."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from ismdata.errors import Refused


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
#: Values nested more deeply are refused. Python's recursion limit is no substitute: it counts the frames of the caller
#: too, so that a value that was read might not be writable.
MAX_DEPTH = 800
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def parse_json(text: str) -> Any:
    """Parse strict JSON, which has no NaN and Infinity.

    Args:
        text: The JSON text of one value.

    Returns:
        The value.

    Raises:
        ValueError: If the text is not strict JSON, or is nested more than MAX_DEPTH levels deep.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and exceeds_depth(value):
        raise ValueError(_TOO_DEEP)
    return value


def exceeds_depth(value: Any) -> bool:
    """Whether a JSON value is nested more than MAX_DEPTH levels deep.

    >>> exceeds_depth([[1]])
    False
    """
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_DEPTH):
        values = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in values if isinstance(inner, list | dict)]
        if not level:
            return False
    return True


def json_text(value: Any, where: str) -> str:
    """The JSON text of a value, not escaped to ASCII; bytes become base64. Raises Refused if JSON cannot express it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_base64)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_field", f"{where}: {error}; expected values that JSON can express") from error


def _base64(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise ValueError(f"{type(value).__name__} is not JSON")


_LENIENT = json.JSONDecoder()
#: Fields in which a number that is not finite is refused rather than read as null: it would be used, or is trained.
_USED = frozenset({"weight", "loss_weight", "loss_scale", "tool_calls", "function_call"})


def parse_record_json(text: str) -> Any:
    """`parse_json` of a record that may have NaN and Infinity, as Python and pandas write them: they become null.

    In fields that are used as numbers they stay what they are, and are refused later. Raises ValueError.
    """
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "NaN" not in text and "Infinity" not in text:
            raise
        try:
            value = _LENIENT.decode(text)
        except RecursionError:
            raise error from None
        if exceeds_depth(value):
            raise
        return without_nan(value)


def without_nan(value: Any, *, used: frozenset[str] = _USED) -> Any:
    """A JSON value with null instead of NaN and infinities, except in the fields `used`.

    >>> without_nan({"score": float("nan"), "n": [1.5]})
    {'score': None, 'n': [1.5]}
    """
    if value is None or type(value) is str:  # most values
        return value
    if isinstance(value, dict):
        return {name: inner if name in used else without_nan(inner, used=used) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner, used=used) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
