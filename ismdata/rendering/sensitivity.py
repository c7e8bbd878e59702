"""Which contents a template does not simply write out: found by rendering, not by reading its source.

A skeleton is right only for contents that the template leaves as they are, apart from blanks at the ends. So each
string constant of the template, a list of odd contents and empty contents are rendered in a short conversation. If the
rendering is not the filled skeleton, conversations with such contents are rendered individually.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ismdata.rendering.chat_template import parsed
from ismdata.rendering.pieces import Slot
from ismdata.rendering.refusals import TemplateRefused
from ismdata.rendering.renderer import Renderer
from ismdata.rendering.skeleton import EM_SPACE, NotDecomposable, fill_parts, template_parts

#: Contents that templates treat specially without naming them in a constant: case, escapes, lengths, blanks, JSON.
BATTERY = (
    "a", "Yes", "lower UPPER Title", "tab\tin", "two  blanks", " ends with blanks ", "\tx\t", "\nx\n", "x\r\n",
    "\u3000x", "line\nbreak", "many\n\n\nbreaks", "<b>&amp; \"quoted\" 'single'</b>", '{"json": [1, 2]}', "[1, 2]",
    "- item\n- item", "123", "0", "true", "None", "http://a.b/c?d=e&f", "# Heading", "```code```", "\\n \\u0041",
    "{{ x }}", "{% x %}", "é ü 你好", "word " * 400,
)  # fmt: skip

#: Contents without text.
_BLANK = ("", " ", "\n", "\n\n \t")

#: The most constants that are tried, each in a few renderings. The longest real templates have some hundred.
_MOST_CONSTANTS = 2000


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Which contents must not be filled into skeletons.

    Attributes:
        triggers: Contents that contain one of these texts.
        blank: Contents without text.
        everything: All contents.
    """

    triggers: tuple[str, ...]
    blank: bool
    everything: bool


def find_sensitivity(renderer: Renderer, *, prepends: bool) -> Sensitivity:
    """Find out to which contents a template is sensitive.

    What the template refuses altogether does not matter here: it will refuse the conversation itself.

    Args:
        renderer: The probed template.
        prepends: Whether the tokenizer puts a blank before some texts.

    Returns:
        The contents that must not be filled into skeletons.
    """
    shapes = [["user", "assistant", "user", "assistant"], ["system", "user", "assistant", "user", "assistant"]]
    usable = [(roles, parts) for roles in shapes if (parts := _parts(renderer, roles)) is not None]
    if not usable:
        return Sensitivity(triggers=(), blank=True, everything=True)

    def changes(roles: Sequence[str], parts: Sequence[str | Slot], contents: Sequence[str]) -> bool:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return renderer.template.render(messages) != fill_parts(parts, contents)
        except TemplateRefused:
            return True

    def differs(content: str) -> bool:
        return any(changes(roles, parts, [content] * len(roles)) for roles, parts in usable)

    def differs_alone(content: str) -> bool:
        return any(
            changes(roles, parts, ["x"] * k + [content] + ["x"] * (len(roles) - k - 1))
            for roles, parts in usable
            for k in range(len(roles))
        )

    constants = [text for text in renderer.template.constants if EM_SPACE not in text]
    if (
        parsed(renderer.template.source) is None
        or len(constants) > _MOST_CONSTANTS
        or any(differs(content) for content in BATTERY)
    ):
        return Sensitivity(triggers=(), blank=True, everything=True)
    # What stripping tokens strip, and which text begins a document, depends on whether there is any text.
    stripping = any(token.lstrip or token.rstrip for token in renderer.controls.tokens.values())
    blank = prepends or stripping or any(differs(content) or differs_alone(content) for content in _BLANK)
    # A constant with a control token never reaches the template from a message: it is escaped before.
    candidates = [text for text in constants if renderer.controls.pattern.search(text) is None]
    triggers = {text for text in candidates if any(map(differs, (text, f"{text}x", f"x{text}", f"x{text}x")))}
    for text in candidates:  # some templates look for an opening and a closing tag together
        closing = f"</{text[1:]}"
        if text.startswith("<") and closing in candidates and differs(f"{text}x{closing}"):
            triggers.add(text)
    shortest = {text for text in triggers if not any(other in text for other in triggers - {text})}
    return Sensitivity(triggers=tuple(sorted(shortest)), blank=blank, everything=False)


def _parts(renderer: Renderer, roles: Sequence[str]) -> tuple[str | Slot, ...] | None:
    try:
        return template_parts(renderer.template, roles)
    except TemplateRefused:
        return None
    except NotDecomposable:
        return ("\0",)  # differs from every rendering
