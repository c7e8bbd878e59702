"""The next context of a long conversation in three renderings.

The reference (`turns.Renderer.next_context`) cuts the whole conversation, two renderings for each answer in it, so a
turn costs the more the longer the conversation is. Under a prefix-stable template what was fed is the beginning of what
is rendered now, which is checked; where it is not so, the reference decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ismdata.encoder import Encoding
from ismdata.template import Message, TemplateRefused
from ismdata.turns import SENTINEL, Renderer


class _Quick(Renderer):
    """A renderer whose `next_context` takes the same time for each answer, whatever the number of those before it."""

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """As the reference. Raises TemplateRefused, HistoryRewritten."""
        found = self._found(messages, tools) if self.profile.prefix_stable else None
        return super().next_context(messages, tools) if found is None else found

    def _found(self, messages: Sequence[Message], tools: list[Any] | None) -> str | None:
        last = max((k for k, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
        opener = next((message["role"] for message in messages if message["role"] != "system"), None)
        if last == 0 or opener != "user":  # templates differ most on who may begin
            return None
        try:
            fed = self.template.render(messages[:last], tools=tools)
            opened = self.template.render(messages, tools=tools, generation_prompt=True)
            answered = self.template.render([*messages, {"role": "assistant", "content": SENTINEL}], tools=tools)
        except TemplateRefused:
            return None  # the reference may get by without one of them, and says why where it does not
        close = self.profile.close
        done = len(fed) - len(close) + len(self.profile.end_of_turn)
        stable = fed.endswith(close) and opened.startswith(fed[:done]) and answered.startswith(opened)
        return opened[done:] if stable else None


def quick(encoding: Encoding) -> Encoding:
    """The same, for sessions: only its time is another."""
    renderer = encoding.renderer
    return replace(
        encoding, renderer=_Quick(**{field.name: getattr(renderer, field.name) for field in fields(renderer)})
    )
