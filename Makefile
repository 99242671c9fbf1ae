# Each target works in a fresh clone: the environment is made on first use and kept in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all lint docs clean

demo: $(VENV)/.recipes  ## Train the small SLaK on handwritten digits
	$(BIN)/python recipes/slak_imagenet.py

test: $(VENV)/.development  ## Every test that is not marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(VENV)/.development  ## Every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/.development  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.development  ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.recipes: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[recipes]'
	@touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[recipes,tests,docs,dev]'
	@touch $@ $(VENV)/.recipes
