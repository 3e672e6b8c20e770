# Everything runs in .venv, which the first target that needs it makes. PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup train test test-slow lint bench gpu-check transcript clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# The install is repeated only when the dependencies change.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hybridlm needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

setup: $(READY)  ## make .venv and install everything into it

train: $(READY)  ## train the default hybrid model on this machine (ARGS='model.pattern=TM ...' for overrides)
	@$(BIN)/python train.py $(ARGS)

test: $(READY)  ## all tests except those marked slow or gpu
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)  ## the tests marked slow
	@$(BIN)/python -m pytest -m slow

lint: $(READY)  ## ruff, and a strict type check of the whole package
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --diff . >/dev/null || { echo "run: ruff format ."; exit 1; }
	@$(BIN)/mypy

bench: $(READY)  ## the measurements of benchmarks/, written to benchmarks/results
	@for script in $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

gpu-check: $(READY)  ## what an NVIDIA GPU does: kernels, memory, speed, peers (ARGS='--only decode'); without one it prints what it would do
	@$(BIN)/python benchmarks/gpu_check.py $(ARGS)

transcript: $(READY)  ## run the default job and put what it prints into README.md
	@$(BIN)/python docs/transcript.py

clean:  ## remove caches and build products (runs and .venv stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
