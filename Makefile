# `make demo` trains the three attentions on text, images and sound; `make test` checks everything;
# `make docs` builds the website in build/site. All set up .venv first: with uv if it is there, with
# venv and pip if not.

PYTHON ?= python3
# Processes that test, with a core and about two GiB of memory each.
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# Let Python keep the bytecode of what it imports, whatever the shell says: the tests start many
# processes, and compiling Lightning and what it imports takes longer than importing it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint tests docs setup clean

demo: setup
	$(BIN)/diffmm demo

test: lint docs tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"diffmm needs Python 3.11 or later, this is {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	@if command -v uv >/dev/null 2>&1; then \
		set -e; \
		test -x $(BIN)/python || uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		set -e; \
		test -x $(BIN)/python || $(PYTHON) -m venv .venv; \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $(STAMP)

clean:
	rm -rf .venv build dist runs
