# Everything runs in .venv, which is made anew whenever pyproject.toml changes. ARGS passes options through.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint mutants bench

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

demo: $(READY)  ## train, attack and draw on real digits: out/quickstart.png (ARGS="--help" for the options)
	$(RUN) examples/quickstart.py $(ARGS)

test: lint  ## all that CI checks (ARGS="-k masks" for a part of it)
	$(RUN) -m pytest $(ARGS)

lint: $(READY)  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

mutants: $(READY)  ## break the library in named ways, and see a named test fail for each
	$(RUN) tests/mutations.py $(ARGS)

bench: $(READY)  ## the loss against Eq. 17 as people write it, on this machine (ARGS="--compile")
	$(RUN) benchmarks/loss.py $(ARGS)

$(READY): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
