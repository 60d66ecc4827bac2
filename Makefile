# `make demo` and `make test` work on a machine that has nothing but Python and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# The suite mostly waits, for servers that start, die or are away: two processes take half the time.
TWO := -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help demo test test-redis lint bench clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

demo: $(READY)  ## Append, kill Redis in the middle, flush, and count: under a minute.
	@$(BIN)/buffer demo

test: $(READY)  ## Run the test suite against real servers.
	@$(BIN)/python -m pytest -q $(TWO)

test-redis: $(READY)  ## The same against the redis-server (or valkey-server) on PATH.
	@BUFFER_TEST_REDIS_FROM_PATH=1 $(BIN)/python -m pytest -q $(TWO)

lint: $(READY)  ## ruff, mypy --strict and import-linter.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)  ## Measure appends, flush and memory beside their baselines.
	@$(BIN)/buffer bench

clean:  ## Remove what these targets made.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Anew whenever the dependencies or the Python version change.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making $(VENV)" >&2
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c .ci/constraints.txt -e '.[embedded]' --group dev
	@touch $@
