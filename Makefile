# make demo: everything set up, then the whole line on this machine.   make test: set up, then the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format slow faults clean

help:
	@echo "make demo    set up .venv and run the whole line on this machine (about 7 minutes once installed)"
	@echo "make test    set up .venv and run the tests"
	@echo "make check   lint, format, types, import direction"
	@echo "make faults  every fault by hand: kills, dead servers, broken shards"
	@echo "make slow    every combination of ZeRO stage and placement"
	@echo "make setup   only set up .venv;  make clean  removes it"

setup: .venv/.complete

.venv/.complete: requirements.lock requirements-cuda.lock pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "make: Python 3.11 is needed, found: $$($(PYTHON) --version 2>&1). Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up .venv (2.7 GB, or 6.2 GB where pip takes the CUDA torch; a few minutes)"
	@$(PYTHON) -m venv .venv || \
	  { echo "make: this Python cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt install python3.11-venv)."; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/diti demo

test: setup
	@$(BIN)/python -m pytest -m "not gpu and not slow and not faults" -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

format: setup
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

faults: setup
	@$(BIN)/python -m pytest -m faults

slow: setup
	@$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv
