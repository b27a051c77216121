# Each goal sets up what it needs, from nothing: `make quickstart`, `make test`, `make lint`, `make bench`.
#
#   PYTHON=python3.12                                            another interpreter
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu     the small CPU build of torch on a machine without a GPU
#   PYTEST_ARGS="-m slow tests/trainers"                         what `make test` is given besides

SHELL := /bin/bash
PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
# The pins stand for the set that was tested on a CPU. Where an NVIDIA driver answers, pip chooses builds for the GPU.
PINS = $(shell nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
INPUTS := pyproject.toml constraints-cpu.txt Makefile

.PHONY: quickstart test lint types bench clean

quickstart: .venv/core.stamp
	$(BIN)/fastgen quickstart

# One process per core, so one thread per process: small tensors gain nothing from more.
test: export OMP_NUM_THREADS := 1
test: .venv/dev.stamp
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

bench: .venv/core.stamp
	$(BIN)/python benchmarks/overhead.py

# A type checker reads folders, not import hooks: in the checkout it would not find fastgen.trainers. build/types/fastgen
# is laid out like the installed package, one link per entry of fastgen/ and one per mapped folder.
types: .venv/dev.stamp
	rm -rf build/types && mkdir -p build/types/fastgen
	ln -s $(addprefix $(CURDIR)/,$(filter-out %/__pycache__,$(wildcard fastgen/*)) configs eval samplers trainers) build/types/fastgen
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fastgen

.venv/core.stamp: $(INPUTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e . $(PINS)
	touch $@

.venv/dev.stamp: $(INPUTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev,metrics,data,3d]" $(PINS)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
