# The two main commands are `make demo` and `make test`. Each target sets up what it needs.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build of torch is enough; where the package index offers only a CUDA build, that works too.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The plug-in for optimum's command line: a distribution of its own, part of the development environment.
OPTIMUM := ./integrations/optimum

# Processes that run tests; each of them computes with one thread and takes up to 2 GB of memory.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal
# Tests of a minute together.
FAST := tests/dsvl_export/lint tests/dsvl_export/targets tests/oracles/test_configs.py \
  tests/oracles/test_names.py tests/oracles/test_resize.py tests/runtimes/bundle tests/runtimes/text \
  tests/runtimes/test_decode_call.py tests/runtimes/test_preprocess.py

.PHONY: demo test test-full test-oldest test-pythons fast style coverage docs wheel clean clean-docs clean-wheel

demo: $(VENV)/cpu.installed
	$(BIN)/dsvl-export demo --output demo

# Style, types, layers, and the tests that `pytest` without arguments runs; 12 minutes on 2 cores.
test: style
	$(PYTEST) --durations=20

# The same, then slow tests and the further cases of grids (the marker `full`).
test-full: test
	$(PYTEST) -m full

# For every change: style, types, layers, and quick tests; under 2 minutes.
fast: style
	$(PYTEST) $(FAST)

style: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy $(OPTIMUM)/src/optimum/commands/register/dsvl.py
	$(BIN)/lint-imports

# Every dependency in the lowest version that pyproject declares, without torch where none is needed; slow.
test-oldest: $(VENV)/dev.installed
	$(BIN)/python tests/oldest/lane.py $(VENV)-oldest

# What needs no torch, on Python 3.10, 3.12 and 3.13 (from PATH or pyenv); a few minutes.
test-pythons: $(VENV)/dev.installed
	$(BIN)/python -m tests.pythons.lane $(VENV)-pythons

# The tests again, a fifth slower, with the lines that they reach.
coverage: $(VENV)/dev.installed
	$(PYTEST) --cov --cov-report=term

$(VENV)/%.installed: pyproject.toml $(OPTIMUM)/pyproject.toml
	@echo '[1/3] Creating the virtual environment $(VENV)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '[2/3] Installing PyTorch: the largest download, a few minutes'
	$(PIP) install 'torch==2.13.0'
	@echo '[3/3] Installing dsvl-export[$*] and its dependencies'
	$(PIP) install --editable '.[$*]' $(if $(filter dev,$*),--editable $(OPTIMUM))
	touch $@

# The docs site, in site/. It needs no PyTorch. A warning is an error.
docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict
	@echo 'Open site/index.html.'

$(VENV)-docs/installed: pyproject.toml
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[docs]'
	touch $@

# The wheel, in dist/. Copy it to a device and install it there.
wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: clean-docs clean-wheel
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-pythons demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

clean-docs:
	rm -rf $(VENV)-docs site

clean-wheel:
	rm -rf dist build
