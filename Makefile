# `make` alone lists the targets. Each sets up .venv first where that is needed; only pip is used.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench minkowski

help:
	@echo 'make setup      create .venv with the package and its tools (PYTHON=python3.12 names another Python)'
	@echo 'make demo       pretrain, convert and fine-tune on photographs of solar cells'
	@echo 'make test       run the tests'
	@echo 'make check      ruff and mypy'
	@echo 'make bench      time the encoder, packed against masked, a minute or two'
	@echo 'make minkowski  build and install MinkowskiEngine for the minkowski backend: minutes, the first time'

setup: $(READY)
	@:

# The stamp is written last, so that a set-up that was cut off is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '' 2>/dev/null || { \
	    echo 'make: $(PYTHON) does not run: install Python 3.10 or newer, or name yours: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: $(PYTHON) is $$($(PYTHON) --version): fcmae needs 3.10 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo 'make: $(PYTHON) lacks its venv module: install it (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python demo/run.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/encoder.py

minkowski: $(READY)
	PYTHON=$(BIN)/python docker/install_minkowski.sh
