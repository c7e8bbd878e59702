"""What stands in several places agrees: versions, pins, and the lower bounds that `make test-lowest` installs."""

from __future__ import annotations

import re
import sys

import yaml

import ismdata
from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ismdata.__version__ == PROJECT["version"]


def test_hooks_use_the_pinned_versions() -> None:
    """Those of tools that the environment has too; a hook may need a tool of its own."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    wanted = [each for repo in config["repos"] for hook in repo["hooks"] for each in hook["additional_dependencies"]]
    for name, version in (re.sub(r"\[.*\]", "", each).split("==") for each in wanted):
        pinned = re.findall(rf"^{re.escape(name)}==(\S+)", CONSTRAINTS, flags=re.MULTILINE)
        assert version in pinned or (not pinned and name == "check-jsonschema"), f"{name}: {version}, {pinned}"


def test_every_extra_is_in_dev_with_the_same_bound() -> None:
    """So that the lowest version of `.[dev]` is the lowest of each extra."""
    extras = PROJECT["optional-dependencies"]
    for name, requirements in extras.items():
        assert set(requirements) <= set(extras["dev"]), name


def test_every_direct_dependency_is_pinned_and_has_a_lower_bound() -> None:
    for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        found = re.match(r"([a-z0-9-]+)>=[0-9.]+(,<[0-9]+)?(;.*)?$", requirement)
        assert found, f"{requirement}: expected NAME>=VERSION"
        assert re.search(rf"^{found[1]}==", CONSTRAINTS, flags=re.MULTILINE), f"{found[1]} is not in constraints.txt"
