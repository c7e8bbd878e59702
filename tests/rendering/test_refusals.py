"""Each way in which a conversation cannot be rendered has a reason that `pack` can write to quarantine."""

import inspect

import pytest

from ismdata.conversation import REASONS
from ismdata.errors import Refused
from ismdata.rendering import refusals

CLASSES = [
    found
    for _, found in inspect.getmembers(refusals, inspect.isclass)
    if issubclass(found, refusals.CannotRender) and found is not refusals.CannotRender
]


@pytest.mark.parametrize("refusal", CLASSES, ids=lambda found: found.__name__)
def test_reasons(refusal):
    assert refusal.reason in REASONS
    raised = refusal(2001) if refusal is refusals.TooManyMessages else refusal("said so")
    assert isinstance(raised, Refused)
    assert (raised.reason, raised.detail) == (refusal.reason, str(raised))
