# Everything from a fresh clone: `make run` and `make test` set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test lint model bench faults clean

run: $(VENV)/.installed
	$(BIN)/optkit run

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

model: $(VENV)/.installed
	$(BIN)/python -m model.train

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.overhead

faults: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.faults

$(VENV)/bin/python:
	$(PYTHON) optkit/doctor.py --before-install
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[nf4,int8,gpu]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[all]' --group dev
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
