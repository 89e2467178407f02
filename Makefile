# For users: `make demo`, `make studio` and `make test`. Everything else is for developers.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo studio test quick lint types check format clean

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/unbraid demo --out demo

studio: $(BIN)/.installed # a window in the browser; everything is kept in the folder studio
	$(BIN)/unbraid studio

test: $(BIN)/.installed
	$(BIN)/python -m pytest

quick: $(BIN)/.installed # without the tests that are marked slow
	$(BIN)/python -m pytest -m "not slow"

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed
	$(BIN)/pyright

check: lint types test

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build demo dist runs
