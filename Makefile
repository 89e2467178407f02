# For users: `make demo`, `make studio` and `make test`. Everything else is for developers.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo studio test quick docs lint types check format package clean

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # on all cores; pip uses one. torch ships a file for newer Pythons, which does not compile
	touch $@

demo: $(BIN)/.installed
	$(BIN)/unbraid demo --out demo

studio: $(BIN)/.installed # a window in the browser; everything is kept in the folder studio
	$(BIN)/unbraid studio

test: $(BIN)/.installed
	$(BIN)/python -m pytest

quick: $(BIN)/.installed # without the tests that are marked slow
	$(BIN)/python -m pytest -m "not slow"

docs: $(BIN)/.installed # the docs as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed
	$(BIN)/pyright

check: lint types test

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: # a wheel in dist, checked as PyPI checks it, and smaller than 80 MB
	rm -rf build dist
	test -x $(VENV)-package/bin/twine || $(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/pip install -q --upgrade pip twine
	$(VENV)-package/bin/pip wheel -q . --no-deps --build-constraint constraints.txt --wheel-dir dist
	$(VENV)-package/bin/twine check --strict dist/*.whl
	$(PYTHON) -m tools.wheel dist

clean:
	rm -rf $(VENV) $(VENV)-package build demo dist runs site
