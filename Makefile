# Three commands: `make study`, `make truth` and `make test`. They build the environment first when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STUDY ?= study/tiny
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

# Tests on two processes. Tests that share a fixture or depend on time share a group: tests/conftest.py.
PYTEST = $(BIN)/python -m pytest --durations=15
PARALLEL ?= -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: env study truth test test-slow test-slurm test-nightly lint docs docs-coverage clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@echo "building the environment in $(VENV): one to three minutes, about 2 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true  # on all cores; pip does it on one
	@touch $@

study: env
	$(BIN)/var-scale study run $(STUDY)

# A law whose answer is known: the report compares the fitted floor with the exact one.
truth: env
	$(BIN)/var-scale study run study/truth

test: env
	$(PYTEST) $(PARALLEL) -m 'not slow and not slurm and not gpu and not nightly'

test-slow: env
	$(PYTEST) $(PARALLEL) -m 'slow and not slurm and not gpu'

test-slurm: env
	$(PYTEST) -m slurm

# The complete engine matrix, fifty kills, and the tests in an environment that nothing has used.
test-nightly: env
	$(PYTEST) $(PARALLEL) -m nightly
	fresh=$$(mktemp -d) && $(MAKE) VENV=$$fresh/venv test; status=$$?; rm -rf $$fresh; exit $$status

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The generated pages of docs/ and kernels/README.md.
docs: env
	$(BIN)/python -m tools.docs

# The tables of coverage in docs/explanation/intervals.md take long.
docs-coverage: env
	$(BIN)/python -m tools.coverage

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
