# Everything but the documentation runs in one virtual environment. Each target installs its own extra of pyproject.toml
# there, once, beside what other targets have installed. ARGS passes options through.
PYTHON ?= python3
VENV ?= .venv
# What else pip is told to install: make test-floor says the oldest torch.
PIN ?=
RUN := $(VENV)/bin/python
# On all cores. A worker that is done takes tests from another one.
PYTEST := $(RUN) -m pytest -n auto --dist worksteal
LIBRARY := --ignore=tests/examples --ignore=tests/benchmarks

# Every Python from 3.10 on that is found: one that is on the PATH may still not run, as pyenv's may not.
PYTHONS = $(foreach minor,10 11 12 13 14 15,$(shell python3.$(minor) -c 'print("python3.$(minor)")' 2>/dev/null))
# The oldest torch that pyproject.toml promises; the oldest Python has wheels of it.
FLOOR := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]$$/\1/p' pyproject.toml)
FLOOR_PYTHON ?= $(or $(firstword $(PYTHONS)),$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help demo study test test-fast test-library test-triton test-floor test-newest test-versions lint docs mutants \
        bench kernels gpu

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

demo: $(VENV)/.examples  ## train, attack and draw on real digits: out/quickstart.png (ARGS="--help" for the options)
	$(RUN) examples/quickstart.py $(ARGS)

study: $(VENV)/.study  ## the methods compared on digits, in ten minutes (ARGS=--full: all of docs/study.md, hours)
	$(RUN) -m benchmarks.study $(ARGS)

test-fast: $(VENV)/.test  ## lint, types and the tests of the library
	$(MAKE) lint test-library

# tests/test_site.py builds the documentation, as docs does.
test: $(VENV)/.test-all $(VENV)-docs/.done  ## all that CI checks: lint, every test, and those of the loss again on the Triton kernels
	$(MAKE) lint
	$(PYTEST) $(ARGS)
	$(MAKE) test-triton

test-library: $(VENV)/.test  ## the tests of the library alone (ARGS="-k masks" for a part of them)
	$(PYTEST) $(LIBRARY) $(ARGS)

test-triton: $(VENV)/.test  ## the tests of the loss again, on the Triton kernels, in Triton's interpreter
	$(PYTEST) --backend=interpreter $(LIBRARY) $(ARGS)

test-floor:  ## the tests of the library on the oldest torch that is promised, in an environment of its own
	$(MAKE) VENV=.venv-floor PYTHON=$(FLOOR_PYTHON) PIN='"torch==$(FLOOR).*"' test-library

# An empty file of constraints takes the place of any that pip is configured to obey.
test-newest:  ## the tests of the library on the newest torch of the index, in an environment of its own
	rm -f .venv-newest/.test
	PIP_CONSTRAINT=/dev/null $(MAKE) VENV=.venv-newest PIN='--upgrade torch' test-library

test-versions:  ## the tests of the library on every Python that is found, in an environment for each
	@echo "found: $(PYTHONS)"
	@failed=; for python in $(PYTHONS); do \
	    $(MAKE) VENV=.venv-$$python PYTHON=$$python test-library || failed="$$failed $$python"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: $(VENV)/.test  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)-docs/.done  ## the documentation as a site that needs no network: site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

mutants: $(VENV)/.test  ## break the library in named ways, and see a named test fail for each
	$(RUN) tools/mutants.py $(ARGS)

bench: $(VENV)/.bench  ## time, memory, accuracy and training steps on this machine, in three minutes: docs/benchmarks.md
	$(RUN) -m benchmarks $(ARGS)

kernels: $(VENV)/.bench  ## what the compiler makes of the kernels, for absent GPUs: benchmarks/results/kernels.csv, docs/kernels.md
	$(RUN) -m benchmarks.kernels $(ARGS)
	$(RUN) -m benchmarks.report

gpu:  ## on a GPU: its tests and benchmarks, one report named after the device; installs nothing
	$(PYTHON) -m benchmarks --device cuda $(ARGS)

# A stamp for each extra. What is installed stays when pyproject.toml changes: pip adds what is missing.
$(VENV)/.%: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[$*]" $(PIN)
	touch $@

# The documentation is read from the sources: it needs no torch, and torchattacks would hold it to an old requests.
$(VENV)-docs/.done: docs/requirements.txt | $(VENV)-docs/bin/python
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Without this line make would delete the interpreter, as the intermediate file of a chain of rules.
.PRECIOUS: %/bin/python
%/bin/python:
	$(PYTHON) -m venv $*
