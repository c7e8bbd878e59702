"""Write public_names.txt: what users import, with signatures. Run it where a change of a public signature is meant.

python -m tests.api.make_public_names
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

STORED = Path(__file__).with_name("public_names.txt")

#: Module -> the names that users import from it.
PUBLIC = {
    "ismdata": ("Collator", "PackedDataset", "Session", "answer_many", "attach"),
    "ismdata.attention": ("attach", "detach", "load"),
    "ismdata.convert": ("ConvertOptions", "ConvertReport", "convert"),
    "ismdata.generate": ("Sampling", "Session", "Window", "answer_many", "generation_inputs"),
    "ismdata.masks": ("block_table", "dense", "intervals", "position_ids", "targets", "tile"),
    "ismdata.pack": ("PackOptions", "PackReport", "pack"),
    "ismdata.train": ("TrainOptions", "TrainReport", "train"),
}


def methods(kind: type) -> list[str]:
    """The public methods and properties that a class defines itself, with signatures."""
    lines = []
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_"):
            continue
        if inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            lines.append(f"  .{name}{inspect.signature(getattr(kind, name))}")
        elif isinstance(member, property):
            lines.append(f"  .{name}")
    return lines


def described() -> str:
    """One line per public name: where it is, its signature, and for a class its public methods."""
    lines = []
    for module, names in PUBLIC.items():
        for name in names:
            found = getattr(import_module(module), name)
            lines.append(f"{module}.{name}{inspect.signature(found)}")
            if inspect.isclass(found):
                lines += methods(found)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    STORED.write_text(described(), encoding="utf-8")
