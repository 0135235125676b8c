# `make quickstart` and `make test` set everything up from a fresh clone: they need Python ≥ 3.10 with pip and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint types check clean

$(VENV)/.user: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -e .
	touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/pip install -e ".[dev]"
	touch $@

quickstart: $(VENV)/.user
	$(BIN)/graft run configs/quickstart.yaml

test: $(VENV)/.dev
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package mapping in pyproject.toml is visible to mypy only in an installed, non-editable package.
types: $(VENV)/.dev
	rm -rf build/types
	$(BIN)/pip install --quiet --no-deps --target build/types .
	$(BIN)/python -m mypy --version
	cd build/types && $(abspath $(BIN))/python -m mypy -p grafting --config-file $(abspath pyproject.toml)

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
