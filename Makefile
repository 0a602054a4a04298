# The verbs of this project. Needed beforehand: Python 3.11 or newer with venv, gcc and make; nothing else.
#
#   make install      .venv with everything, from the lock (constraints.txt)
#   make quickstart   a whole run on a small graph; RUN_ARGS="run=/elsewhere" and other overrides go with it
#   make check test   what every change must pass

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
PYTEST_ARGS ?=
RUN_ARGS ?=
BENCH ?= $(sort $(wildcard benchmarks/bench_*.py))
LOCKED_TORCH = $(shell grep -E '^torch==' constraints.txt)

.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-all test-gpu check fix bench clean distclean

help: ## these lines
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r verb what; do \
		printf '  make %-12s %s\n' "$$verb" "$$what"; done

install: $(INSTALLED) ## create or update .venv from the lock

# torch comes first and alone: the build of deepspeed imports it, and pip's own settings decide which build of torch
# (CUDA or CPU) it is. DS_BUILD_OPS=0: no kernel of deepspeed is used, so none is compiled. The stamp comes last.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make install: $(PYTHON) is not Python 3.11 or newer; name one with make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make install: $(PYTHON) cannot make virtual environments; install its venv package (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(LOCKED_TORCH) setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[s3,gcs,azure,fast,dev]'
	@touch $@

quickstart: install ## partition, teach, infer, distill, evaluate: minutes on two cores
	$(BIN)/gkd run configs/quickstart.yaml $(RUN_ARGS)

test: install ## all tests but the slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: install ## all tests but those that need a GPU
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-gpu: install ## the tests that need a GPU
	$(PYTEST) -m gpu $(PYTEST_ARGS)

check: install ## format, style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: install ## format, and mend the style where it can be mended by machine
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## all benchmarks, or BENCH=benchmarks/bench_lsp.py
	@test -n "$(BENCH)" || { echo "make bench: no benchmarks/bench_*.py here" >&2; exit 1; }
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

clean: ## caches and build products; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## .venv too
	rm -rf $(VENV)
