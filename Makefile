# Every target sets up what it needs. PYTHON=python3.12 picks the interpreter, EXTRA=train-cu12 the CUDA 12 build of DALI.
PYTHON ?= python3
EXTRA  ?= train
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

# gpu and readme-tables install nothing: they take .venv where it is ready, else PYTHON with what it has. OUT=DIR picks the
# folder of the results, DATA_PATH=DIR real images for the loading benchmark, PARTS="NAME ..." some parts of the summary.
AS_IS       := $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
GPU_MINUTES ?= 9
# Processes of tests, one thread each: one more than cores, since tests of faults wait, but no more than 4: each needs 1 to 2 GiB.
TEST_JOBS   ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((cores < 4 ? cores + 1 : 4)))
OPTIONS     := $(if $(OUT),--output $(OUT)) $(if $(DATA_PATH),--data-path $(DATA_PATH)) $(if $(PARTS),--parts $(PARTS))

.PHONY: demo test test-slow lint format bench gpu readme-tables clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRA),dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m tinymim_fast.demo --output-dir demo-out

test: lint
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py bench $(OPTIONS)

gpu:
	$(AS_IS) benchmarks/run_all.py gpu --minutes $(GPU_MINUTES) $(OPTIONS)

readme-tables:
	$(AS_IS) benchmarks/readme_tables.py

clean:
	rm -rf $(VENV) build *.egg-info bench-out
