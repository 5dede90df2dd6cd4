# The developer's commands; `make help` lists them. Every target sets the environment up first, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-gpu lint format clean

PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# no hub at run time, and one thread a process: the tests run several processes on few cores
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest
# a folder under tests/ alone: make test ROOM=loss
ROOM :=
TESTS := tests/$(ROOM)
# one process a core, up to two: a file's tests stay together, with what they share, and many of them
# start processes of their own; WORKERS=0 is one process, as plain pytest is
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 2 ? 0 : 2)))
SPREAD := -n $(WORKERS) --dist loadfile

help:  ## list the commands
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/make \1	\2/' | expand -t 20

setup: $(STAMP)  ## make .venv with Python 3.12 and install everything into it (nothing to do when unchanged)

# a killed install leaves no stamp, so the next one runs it again
$(STAMP): pyproject.toml constraints.txt
	@if [[ -x $(BIN)/python ]] && ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then \
	  echo "error: $(VENV) is not a working Python 3.12 environment: remove the folder $(VENV), then run make again" >&2; exit 2; fi
	@if [[ ! -x $(BIN)/python ]] && ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
	  echo "error: '$(PYTHON)' is not a Python 3.12, which megatron-core needs: install one (apt install python3.12-venv," \
	    "pyenv install 3.12, uv python install 3.12, conda create -n py312 python=3.12)," \
	    "or name yours: make setup PYTHON=/path/to/python3.12" >&2; exit 2; fi
	@if [[ ! -x $(BIN)/python ]]; then echo "making $(VENV)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "error: '$(PYTHON) -m venv' failed: on Debian and Ubuntu, apt install python3.12-venv" >&2; exit 2; }; fi
	@echo "installing megatron-tsft and what it needs into $(VENV): about 3 GB to download the first time"
	$(BIN)/python -m pip install --editable '.[dev,quickstart,benchmark]' --constraint constraints.txt
	@touch $@

quickstart: $(STAMP)  ## fine-tune a real model on this computer's CPU and compare before and after
	examples/quickstart/run.sh

test: $(STAMP)  ## the fast tests; ROOM=loss: those of tests/loss
	$(PYTEST) $(SPREAD) -m "not slow and not gpu" $(TESTS)

test-all: $(STAMP)  ## every test that needs no GPU, the slow ones of several processes included
	$(PYTEST) $(SPREAD) -m "not gpu" $(TESTS)

test-gpu: $(STAMP)  ## the tests that need a GPU
	$(PYTEST) -m gpu $(TESTS)

lint: $(STAMP)  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and built files; .venv/ and runs/ stay
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	find megatron_tsft tools examples dev tests -name __pycache__ -type d -prune -exec rm -rf {} +
