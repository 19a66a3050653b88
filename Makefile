# SPDX-License-Identifier: Apache-2.0
# `make run` and `make test` are all the set-up there is: each makes the environment that it needs, once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n auto --maxprocesses 8
VM_ARGS ?= -n 0 --timeout 1500
# what pip does, a line a package, without where from
PROGRESS := sed -u -n -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing collected packages.*/  installing/p'
PIP_FLAGS := --require-hashes --only-binary=:all: --disable-pip-version-check --no-input

.PHONY: run test test-vm test-vm-arm lint types check clean help
.DEFAULT_GOAL := help

help:
	@echo "make run    a rehearsed live update with live DMA, on this machine: no hardware, no root"
	@echo "make test   the whole test-suite"
	@echo "make test-vm  the same things on a real kernel, built and booted in QEMU (first build: 10 to 15 minutes)"
	@echo "make test-vm-arm  tables of a stock Debian arm64 kernel behind an SMMUv3, in QEMU (fetches about 270 MB)"
	@echo "make lint   ruff and codespell      make types  mypy --strict      make check  all of it"
	@echo "make clean  removes the environment and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "iokeep needs python3 >= 3.11; '$(PYTHON)' is not (set PYTHON=...)" >&2; exit 4; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "python3 has no venv module: apt-get install python3-venv" >&2; exit 4; }
	@echo "set-up: making $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements/run.lock pyproject.toml | $(BIN)/python
	@echo "set-up: installing what iokeep runs on, from requirements/run.lock (once)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements/run.lock | $(PROGRESS)
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check -e .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.lock $(VENV)/run.stamp
	@echo "set-up: installing the test tools, from requirements/dev.lock (once)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements/dev.lock | $(PROGRESS)
	@touch $@

run: $(VENV)/run.stamp
	@$(BIN)/iokeep rehearse $(ARGS)

test: $(VENV)/dev.stamp
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md docs src tests vmtest

test-vm: $(VENV)/dev.stamp
	@$(BIN)/python -m vmtest
	@$(BIN)/python -m pytest vmtest $(VM_ARGS)

test-vm-arm: $(VENV)/dev.stamp
	@$(BIN)/python -m vmtest.arm
	@$(BIN)/python -m pytest vmtest/arm --confcutdir=vmtest/arm $(VM_ARGS)

types: $(VENV)/dev.stamp
	@$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
