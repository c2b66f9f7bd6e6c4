# make demo and make test do everything on a new machine with Python (>= 3.11), git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Tests run in one process for each core, and in no more than 8, each of which takes about 1 GB of memory.
WORKERS ?= -n auto --maxprocesses 8

# One thread for each of the small matrix products here: more only wait for each other.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg

TUTORIALS := quickstart diagnostics mixtures images counts layers control text
EXPERIMENTS := annealing diagnostics_against_nuts nats remedies layers toy_sweep fashion_mnist text known_languages

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format bench tutorials experiments clean

help:
	@echo "make demo         install, then run tutorials/quickstart.py (about 3 minutes)"
	@echo "make test         install, then run all checks: lint, types, tests, tutorials and experiments in smoke mode"
	@echo "make check        lint, types and the fast tests"
	@echo "make tutorials    execute the tutorials into notebooks under tutorials/output (about 6 minutes)"
	@echo "make experiments  run the experiments in a short form; PYRO_ILVAE_FULL=1 for the README's numbers (hours)"
	@echo "make bench        measure what the guarantee costs, against plain decoders and other ways to write them"
	@echo "make lint         ruff and mypy;  make format  ruff format;  make clean  remove what make made"
	@echo "PYTHON=python3.12 selects the interpreter, VENV=DIR the virtual environment ($(VENV))"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,tutorials]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python tutorials/quickstart.py

test: lint
	$(BIN)/python -m pytest -q $(WORKERS)

check: lint
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

tutorials: $(INSTALLED)
	mkdir -p tutorials/output
	for name in $(TUTORIALS); do \
		MPLBACKEND=module://matplotlib_inline.backend_inline $(BIN)/jupytext --to ipynb --execute --run-path . \
			--output tutorials/output/$$name.ipynb tutorials/$$name.py || exit 1; \
	done

experiments: $(INSTALLED)
	for name in $(EXPERIMENTS); do $(BIN)/python experiments/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) .venv-newest tutorials/output experiments/output .pytest_cache .mypy_cache .ruff_cache .hypothesis
