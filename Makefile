# make help         list these targets
# make setup        make .venv with the pinned versions
# make quickstart   the whole job on this machine: base model, conversion, ProFit, export, answers, figure
# make quickstart MODEL=qwen3.5   the same with a small model of another family
# make test         lint and every test that runs without a GPU; sets itself up
# make test-all     the longer checks as well
# make lint         ruff and mypy alone
# make unit         the unit tests alone
# make format       ruff's fixes and format
# make bench        measure the objective, whole training steps and the conversion against others; 10 to 20 minutes on 2 CPU cores
# make clean        remove the environment and scratch files; checkpoints in runs/ stay

SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTEST := $(PYTHON) -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup lint format unit test test-all bench quickstart clean

help:
	@sed -n 's/^# \(make \)/\1/p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

# The environment is rebuilt only when what it is made from changes, or when it is not usable: half made, or
# of another Python. Python compiles the modules that are used; to compile all of them takes pip a minute.
USABLE := $(shell $(PYTHON) -c 'import pip, sys; print(sys.version_info[:2] == (3, 12))' 2>/dev/null)
ifneq ($(USABLE),True)
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt .python-version
ifneq ($(USABLE),True)
	@candidate=$$(for p in python3.12 python3 python; do \
	    "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$p" && break; \
	  done); \
	if [ -z "$$candidate" ]; then \
	  echo "error: Python 3.12 is needed and was not found; install it (e.g. 'pyenv install 3.12') and run make again." >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$candidate ..."; \
	if ! "$$candidate" -m venv --clear $(VENV) >/dev/null; then \
	  echo "error: $$candidate cannot make $(VENV); install its venv module (e.g. 'apt install python3.12-venv') and run make again." >&2; exit 1; \
	fi
endif
	@echo "installing the pinned packages into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[dev]'
	@touch $@

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Benchmarks write dated files into benchmarks/results; those that need files of one's own are run by hand.
bench: $(STAMP)
	$(PYTHON) benchmarks/bench_objective.py --quick
	$(PYTHON) benchmarks/bench_training_step.py --quick
	$(PYTHON) benchmarks/bench_conversion.py --sizes 0.6B --scratch build/bench_conversion

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Unit tests share the cores. The others start several processes each, so two of them run at a time; tests on
# a GPU run one after the other.
UNIT := tests/unit --numprocesses logical --dist loadfile
RUNS := tests/distributed tests/integration --numprocesses 2 --dist loadfile
GPU := tests/gpu

test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs=2 lint unit
	$(PYTEST) $(RUNS) -m "not slow"
	$(PYTEST) $(GPU) -m "not slow"

# Next to lint: mypy takes a minute of one core.
unit: $(STAMP)
	$(PYTEST) $(UNIT) -m "not slow"

test-all: lint
	$(PYTEST) $(UNIT)
	$(PYTEST) $(RUNS)
	$(PYTEST) $(GPU)

quickstart: $(STAMP)
	$(PYTHON) examples/quickstart.py $(if $(MODEL),--family $(MODEL))

# What make itself has made. Runs and their checkpoints are in runs/, which stays.
clean:
	rm -rf $(VENV) build dist *.egg-info
