# Needs Python 3.11 or later and make; everything else is installed into .venv.
#
#   make demo                     compare construction and trained counterpart, every family
#   make test PYTHON=python3.12   lint, types, tests and notebooks, on the interpreter named
#   make test-all                 the tests marked slow too
#   make fuzz EXAMPLES=20000      that many random programs, a quarter of grammars, damaged files
#                                 and others, in one process; SEED=7 repeats a run
#   make docs                     the site, in build/docs/html
#   make test EXTRAS=dev,notebooks    without torch; the tests that need it are skipped
#   make setup EXTRAS=dev,notebooks,cuda12

.DEFAULT_GOAL := demo
.PHONY: setup demo test test-all fuzz lint notebooks docs bench clean
.SUFFIXES:

SHELL   = /bin/sh
PYTHON ?= python3
EXTRAS ?= dev,notebooks$(if $(filter test test-all,$(MAKECMDGOALS)),$(TORCH))
TORCH   = ,torch
WORKERS ?= 2
PYTEST_ARGS ?=
EXAMPLES ?= 20000
SEED ?=

BIN   = .venv/bin
STAMP = .venv/installed

# The stamp holds what was installed, so that setup is repeated when the interpreter,
# pyproject.toml or constraints.txt change, or an extra is missing, and at no other time, whatever
# the files' dates say. Extras that are there stay.
setup:
	@set -eu; \
	version=$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || { \
	    echo "PYTHON=$(PYTHON) does not run; name an interpreter, as in: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "PYTHON=$(PYTHON) is Python $$version; 3.11 or later is needed" >&2; exit 1; }; \
	basis="$$version $$(cat pyproject.toml constraints.txt | cksum)"; \
	before=; extras=; \
	if [ -f $(STAMP) ]; then { read -r before; read -r extras || true; } < $(STAMP); fi; \
	if [ "$${before%% *}" != "$$version" ]; then rm -rf .venv; extras=; fi; \
	missing=; \
	for extra in $$(echo "$(EXTRAS)" | tr , ' '); do \
	    case ",$$extras," in *",$$extra,"*) ;; *) extras="$${extras:+$$extras,}$$extra"; missing=yes;; esac; \
	done; \
	if [ "$$before" = "$$basis" ] && [ -z "$$missing" ]; then exit 0; fi; \
	rm -f $(STAMP); \
	echo "Installing $$extras into .venv (Python $$version); the first time takes some minutes."; \
	if command -v uv >/dev/null 2>&1; then \
	    [ -d .venv ] || uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
	    VIRTUAL_ENV=.venv uv pip install --quiet -c constraints.txt -e ".[$$extras]"; \
	else \
	    [ -x $(BIN)/pip ] || { rm -rf .venv; $(PYTHON) -m venv .venv; }; \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$$extras]"; \
	fi; \
	printf '%s\n' "$$basis" "$$extras" > $(STAMP)

demo: setup
	@$(BIN)/orrery demo --out reports

test: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

fuzz: setup
	@ORRERY_FUZZ=$(EXAMPLES) ORRERY_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q -s tests/fuzz $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@if $(BIN)/pyright --version >/dev/null 2>&1; then \
	    PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python; \
	else \
	    echo "pyright cannot start here (it needs node): types are not checked"; \
	fi

# Runs every notebook at full settings and keeps its outputs in the .ipynb beside it.
notebooks: setup
	@$(BIN)/python tests/execute_notebooks.py

# The pages are written from the code, the notebooks as they were executed; nothing is downloaded.
docs: EXTRAS = dev,notebooks,docs
docs: setup
	@$(BIN)/python docs/generate.py build/docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f build/docs/mkdocs.yml
	@echo "build/docs/html/index.html"

bench: setup
	@set -eu; for file in benchmarks/[a-z]*.py; do echo "$$file"; $(BIN)/python "$$file"; done

clean:
	rm -rf .venv reports build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
