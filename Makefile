# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv when it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# The versions that the suite last passed with, so that a stranger gets what was tested; `make test-newest` leaves them out.
PINNED := --constraint constraints.txt

.PHONY: demo test test-whole test-newest constraints check format site notebooks dist clean

demo: $(VENV)/installed
	$(BIN)/diffing demo
	@echo "The commands are in $(BIN); this puts them on your path: source $(BIN)/activate"

test: $(VENV)/installed-dev
	$(MAKE) check

# What a user does from end to end: the demo, the notebooks, the site, the wheel, the pages in a browser.
test-whole: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m whole

# The same with the newest releases that pyproject.toml admits, in an environment of its own.
test-newest:
	$(MAKE) test test-whole VENV=.venv-newest PINNED=

# Run after the suite passed: writes down the versions in $(VENV).
constraints: $(VENV)/installed-dev
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//; / @ file:/d' > constraints.txt

# Every step can fail; none of them edits a file.
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A wheel and an sdist in dist/.
dist: $(VENV)/installed-dev
	$(BIN)/python -m hatchling build

# Into site/, with the pages of docs/ and the reference from the docstrings; a broken link ends it.
site: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Runs the notebooks of docs/notebooks and writes their outputs anew.
notebooks: $(VENV)/installed-dev
	$(BIN)/python tests/notebooks.py

$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once: some minutes."
	$(PIP) $(PINNED) --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once: some minutes."
	$(PIP) $(PINNED) --editable '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once: some minutes."
	$(PIP) $(PINNED) --editable '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .venv-newest .mypy_cache .pytest_cache .ruff_cache build dist site
