# Needs Python >= 3.11 and make; everything else is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check bench bench-quality bench-ranks clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.demo  ## the whole story on the embedded models, into ./eckart-demo
	$(BIN)/eckart demo --force

test: $(VENV)/.dev  ## every test
	$(BIN)/pytest

check: $(VENV)/.dev  ## format, lint, types, floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/.dev  ## timings against torch and mergekit, appended to bench/RESULTS.md
	$(BIN)/python bench/bench_svd.py
	$(BIN)/python bench/bench_stream.py
	$(BIN)/python bench/bench_adapters.py
	$(BIN)/python bench/bench_calibrate.py
	$(BIN)/python bench/bench_inference.py

bench-quality: $(VENV)/.dev  ## perplexities by method; MODEL=… TOKENS=… (default: the demo model)
	$(BIN)/python bench/bench_quality.py $(if $(MODEL),--model $(MODEL)) $(if $(TOKENS),--tokens $(TOKENS))

bench-ranks: $(VENV)/.dev  ## the rank of merged LoRAs by --rank auto, up to 4096×11008: half an hour
	$(BIN)/python bench/bench_ranks.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "eckart needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[hf]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[hf,peft,diffusers,dev]'
	@touch $@ $(VENV)/.demo

clean:  ## remove the environment and what tools left
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis eckart-demo
