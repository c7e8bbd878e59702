"""Where the repository and what stands beside it lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "schemas"

#: Real corpora and vectors that stand beside the repository where it is developed; a clone elsewhere has none.
SHARED = ROOT.parent / "shared"
