# Every target sets up what it needs. PYTHON=python3.12 picks the interpreter, EXTRA=train-cu12 the CUDA 12 build of DALI.
PYTHON ?= python3
EXTRA  ?= train
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

.PHONY: demo test lint format clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRA),dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m tinymim_fast.demo --output-dir demo-out

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
