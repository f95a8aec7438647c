# Everything runs in .venv, which is made anew whenever pyproject.toml changes. ARGS passes options through.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo study test lint test-torch test-triton mutants bench kernels gpu

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 13

demo: $(READY)  ## train, attack and draw on real digits: out/quickstart.png (ARGS="--help" for the options)
	$(RUN) examples/quickstart.py $(ARGS)

study: $(READY)  ## the methods compared on digits, in ten minutes (ARGS=--full: all of docs/study.md, hours)
	$(RUN) -m benchmarks.study $(ARGS)

test: lint  ## all that CI checks: lint, test-torch and test-triton, side by side
	$(MAKE) --jobs=2 --output-sync=target test-torch test-triton

test-torch: $(READY)  ## the tests, but for those in Triton's interpreter (ARGS="-k masks" for a part of them)
	$(RUN) -m pytest $(ARGS)

test-triton: $(READY)  ## the tests of the loss again, on the Triton kernels, in Triton's interpreter
	$(RUN) -m pytest -m interpreter $(ARGS)

lint: $(READY)  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

mutants: $(READY)  ## break the library in named ways, and see a named test fail for each
	$(RUN) tests/mutations.py $(ARGS)

bench: $(READY)  ## time, memory, accuracy and training steps on this machine, in ten minutes: benchmarks/results
	$(RUN) -m benchmarks $(ARGS)

kernels: $(READY)  ## what the compiler makes of the kernels, for GPUs that aren't here: benchmarks/results/kernels.md
	$(RUN) -m benchmarks.kernels $(ARGS)

gpu: $(READY)  ## on a GPU: its tests and benchmarks, one report in benchmarks/results named after the device
	$(RUN) -m benchmarks.gpu $(ARGS)

$(READY): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
