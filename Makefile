# Two commands need nothing but Python >= 3.11 and make:
#   make serve    a node on 127.0.0.1:1109 with its data in ./data
#   make test     everything CI runs
# PYTHON=/path/to/python chooses the interpreter; VENV=dir the place of the virtual environment.

VENV ?= .venv
PYTHON ?=
DATA ?= ./data
BIND ?= 127.0.0.1:1109
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help serve test check venv venv-dev docs format constraints clean

help:
	@sed -n 's/^#   //p' Makefile

serve: $(VENV)/.runtime
	@exec $(BIN)/ayder serve --bind $(BIND) --data $(DATA)

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Everything that reads the code without running it.
check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/flake8-async --disable=ASYNC114,ASYNC9 $(shell find ayder -name '*.py')
	$(BIN)/lint-imports

venv: $(VENV)/.runtime
venv-dev: $(VENV)/.dev

# The interpreter comes first; a stamp is older than what it was made from when that has changed.
$(BIN)/python:
	@PYTHON='$(PYTHON)' sh .ci/make-venv '$(VENV)'

$(VENV)/.runtime: constraints/runtime.txt pyproject.toml | $(BIN)/python
	@echo "installing the pinned dependencies into $(VENV)"
	@$(PIP) install --quiet --require-hashes -r constraints/runtime.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: constraints/dev.txt $(VENV)/.runtime
	@echo "installing the pinned development tools into $(VENV)"
	@$(PIP) install --quiet --require-hashes -r constraints/dev.txt
	@touch $@

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The generated part of the documentation; a test fails when it is stale.
docs: $(VENV)/.dev
	$(BIN)/python -m ayder.config_report docs/configuration.md
	$(BIN)/python -m ayder.http.openapi docs/openapi.json

# Needs uv. The files name packages, versions and hashes, and no index.
UV_COMPILE := uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate pyproject.toml
constraints:
	$(UV_COMPILE) --extra build -o constraints/runtime.txt
	$(UV_COMPILE) --extra build --extra dev -o constraints/dev.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
