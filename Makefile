# Two commands: `make study` and `make test`. Both make the environment first when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STUDY ?= study/tiny
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: env study test test-slow test-slurm lint clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@echo "making the environment in $(VENV): one to three minutes, about 2 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true  # on all cores; pip does it on one
	@touch $@

study: env
	$(BIN)/var-scale study run $(STUDY)

test: env
	$(BIN)/python -m pytest -m 'not slow and not slurm and not gpu'

test-slow: env
	$(BIN)/python -m pytest -m 'slow and not gpu and not slurm'

test-slurm: env
	$(BIN)/python -m pytest -m slurm

lint: env
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
