"""Check, build, try and tag a release. CONTRIBUTING.md says how to prepare one.

    python scripts/release.py --dry-run    # everything but the tag; names each problem and goes on
    python scripts/release.py              # the same, stops at the first problem, tags at the end
    python scripts/release.py --upload     # and uploads to PyPI, as `twine upload` is configured

Python of this call makes the virtual environments. TORCH_OPTIONS is passed to pip for torch, as in the Makefile.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
BUILD_TOOLS = ("build==1.6.1", "twine==7.0.0")


def run(*command: str | Path, cwd: Path = ROOT, quiet: bool = False) -> str:
    """Run a command to its end and return what it printed when `quiet`. Raises CalledProcessError where it fails."""
    print("+", shlex.join(map(str, command)), flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, text=True, check=True, stdout=-1 if quiet else None)
    return (done.stdout or "").strip()


def version() -> str:
    """The version in pyproject.toml."""
    found = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.MULTILINE)
    assert found, "pyproject.toml has no version"
    return found[1]


def problems(release: str) -> list[str]:
    """What stands against a release from this tree."""
    found = []
    branch = run("git", "rev-parse", "--abbrev-ref", "HEAD", quiet=True)
    if branch != "main":
        found.append(f"the branch is {branch}; expected main")
    if changed := run("git", "status", "--porcelain", quiet=True):
        found.append(f"the tree is not clean:\n{changed}")
    if run("git", "tag", "--list", f"v{release}", quiet=True):
        found.append(f"the tag v{release} exists; expected a new version in pyproject.toml")
    headings = re.findall(r"^## \[([^\]]+)\](.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    name, rest = next((each for each in headings if each[0] != "Unreleased"), ("", ""))
    if name != release or not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", rest):
        shown = f"[{name}]{rest}" if name else "none but [Unreleased]"
        found.append(f"the newest heading of CHANGELOG.md is {shown}; expected [{release}] - YYYY-MM-DD")
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), flags=re.MULTILINE)
    if not cited or cited[1] != release:
        found.append(f"CITATION.cff has version {cited and cited[1]}; expected {release}")
    own = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "ismdata/__init__.py").read_text("utf-8"), flags=re.MULTILINE)
    if not own or own[1] != release:
        found.append(f"ismdata/__init__.py has version {own and own[1]}; expected {release}")
    return found


def environment(folder: Path) -> Path:
    """A new virtual environment; returns the folder of its programs."""
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin"


def build(scratch: Path) -> tuple[Path, Path]:
    """The wheel, built of what git tracks and nothing else, and the twine that found nothing wrong with it."""
    source = scratch / "source"
    source.mkdir()
    run("git", "archive", "--output", scratch / "source.tar", "HEAD")
    shutil.unpack_archive(scratch / "source.tar", source)
    programs = environment(scratch / "tools")
    run(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *BUILD_TOOLS)
    shutil.rmtree(DIST, ignore_errors=True)
    run(programs / "python", "-m", "build", "--outdir", DIST, source)
    run(programs / "twine", "check", "--strict", *sorted(DIST.iterdir()))
    (wheel,) = DIST.glob("*.whl")
    return wheel, programs / "twine"


def try_out(wheel: Path, release: str, scratch: Path) -> None:
    """Install the wheel as a user does, away from the source tree, and run the demo."""
    programs = environment(scratch / "installed")
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    install = (*pip, "--constraint", ROOT / "constraints.txt")
    run(*install, *shlex.split(os.environ.get("TORCH_OPTIONS", "")), "torch")
    run(*install, wheel)
    found = run(programs / "python", "-c", "import ismdata; print(ismdata.__version__)", cwd=scratch, quiet=True)
    if found != release:
        raise SystemExit(f"the installed wheel says it is {found}; expected {release}")
    if "--version" in run(programs / "ismdata", "--help", cwd=scratch, quiet=True):
        run(programs / "ismdata", "--version", cwd=scratch)
    run(programs / "ismdata", "demo", "--output", scratch / "demo", cwd=scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--dry-run", action="store_true", help="tag and upload nothing")
    last.add_argument("--upload", action="store_true", help="upload to PyPI after tagging")
    parser.add_argument("--skip-tests", action="store_true", help="with --dry-run: leave out make check and make test")
    options = parser.parse_args()
    if options.skip_tests and not options.dry_run:
        parser.error("--skip-tests goes with --dry-run only")
    release = version()
    found = problems(release)
    for problem in found:
        print(f"problem: {problem}", file=sys.stderr)
    if found and not options.dry_run:
        raise SystemExit(1)
    if not options.skip_tests:
        run("make", "check", f"PYTHON={sys.executable}")
        run("make", "test", f"PYTHON={sys.executable}")
    with tempfile.TemporaryDirectory() as scratch:
        wheel, twine = build(Path(scratch))
        try_out(wheel, release, Path(scratch))
        if options.dry_run:
            print(f"dry run: {len(found)} problems, nothing tagged or uploaded; {wheel.relative_to(ROOT)} works")
            raise SystemExit(bool(found))
        run("git", "tag", "--annotate", f"v{release}", "--message", f"ismdata {release}")
        if options.upload:
            run(twine, "upload", *sorted(DIST.iterdir()))
    print(f"tagged v{release}; publish the tag with: git push origin v{release}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"stopped: {shlex.join(error.cmd)} ended with {error.returncode}") from error
