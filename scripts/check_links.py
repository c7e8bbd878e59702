"""Check that the relative links and anchors in Markdown files lead somewhere; no network is needed.

    python scripts/check_links.py [FILE ...]    # default: every Markdown file that git tracks

Links with a scheme (https:, mailto:) are not followed. Exit code 1 where a link is broken.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
#: GitHub's Markdown has tables, whose cells hold links too.
MARKDOWN = MarkdownIt("commonmark").enable("table")


def links(tokens: list[Token]) -> Iterator[str]:
    """The targets of all links and images."""
    for token in tokens:
        target = token.attrs.get("href") or token.attrs.get("src")
        if target:
            yield str(target)
        yield from links(token.children or [])


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a file's headings; a heading that repeats gets a number."""
    tokens = MARKDOWN.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for opening, heading in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeats = (f"{slug}-{number}" for number in range(1, len(found) + 1))
            found.add(slug if slug not in found else next(each for each in repeats if each not in found))
    return found


def broken(path: Path) -> list[str]:
    """One sentence for each link of a Markdown file that leads nowhere."""
    problems = []
    for target in links(MARKDOWN.parse(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target, flags=re.IGNORECASE):
            continue
        name, _, anchor = unquote(target).partition("#")
        linked = (ROOT / name.lstrip("/") if name.startswith("/") else path.parent / name) if name else path
        if not linked.exists():
            problems.append(f"{path}: links to {target}; there is no such file")
        elif anchor and linked.suffix == ".md" and anchor not in anchors(linked):
            problems.append(f"{path}: links to {target}; {linked.name} has no such heading")
    return problems


def main(names: list[str]) -> int:
    if not names:
        listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = [str(ROOT / name) for name in listed.stdout.splitlines()]
    problems = [problem for name in names for problem in broken(Path(name))]
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
