# Two commands: `make study` and `make test`. Both make the environment first when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STUDY ?= study/tiny

.PHONY: env study test test-slow lint clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,hub]'
	touch $@

study: env
	$(BIN)/var-scale study run $(STUDY)

test: env
	$(BIN)/python -m pytest -m 'not slow and not slurm and not gpu'

test-slow: env
	$(BIN)/python -m pytest -m 'slow and not gpu'

lint: env
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
