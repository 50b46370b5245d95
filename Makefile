# make demo and make test do the whole set-up from a fresh clone: everything lands in .venv and in the
# user cache ($XDG_CACHE_HOME or ~/.cache, then sparsemm-edge/). Running them again does only what is new.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: setup setup-dev demo test lint clean

setup: $(VENV)/.package
setup-dev: $(VENV)/.dev

# Until the trained demo model is part of the package, its stand-in is made with torch: hence setup-dev.
demo: $(VENV)/.dev
	$(VENV)/bin/sparsemm-edge demo --out build/demo

test: lint
	$(PY) -m pytest

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is missing or older than 3.10: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# llama-cpp-python with this project's patches: built once a machine, minutes, then from the cache
$(VENV)/.llama: $(VENV)/.python scripts/build_llama_cpp_python.py patches/pin.json $(wildcard patches/*.patch)
	$(PY) scripts/build_llama_cpp_python.py install
	touch $@

$(VENV)/.package: $(VENV)/.llama pyproject.toml
	$(PIP) --editable .
	touch $@

# torch first and by itself, so that nothing else chooses its version
$(VENV)/.torch: $(VENV)/.python
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.dev: $(VENV)/.package $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@
