# make demo and make test do everything on a new machine with Python (>= 3.11), git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread for each of the small matrix products here: more only wait for each other.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= agg

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench tutorials clean

help:
	@echo "make demo       install, then run tutorials/quickstart.py (about 3 minutes)"
	@echo "make test       install, then run all checks"
	@echo "make tutorials  execute the tutorials into notebooks under tutorials/output (about 15 minutes)"
	@echo "make bench      what the guarantee costs, against a plain decoder and a public one's way to write it"
	@echo "make lint       ruff and mypy;  make format  ruff format;  make clean  remove what make made"
	@echo "PYTHON=python3.12 selects the interpreter, VENV=DIR the virtual environment ($(VENV))"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,tutorials]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python tutorials/quickstart.py

test: lint
	$(BIN)/python -m pytest -q
	PYRO_ILVAE_SMOKE=1 $(BIN)/python -W error tutorials/quickstart.py
	PYRO_ILVAE_SMOKE=1 $(BIN)/python -W error tutorials/diagnostics.py
	PYRO_ILVAE_SMOKE=1 $(BIN)/python -W error tutorials/toy_mixture.py
	PYRO_ILVAE_SMOKE=1 $(BIN)/python -W error tutorials/fashion_mnist.py
	PYRO_ILVAE_SMOKE=1 $(BIN)/python -W error tutorials/text.py

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
	for name in quickstart diagnostics toy_mixture fashion_mnist text; do \
		MPLBACKEND=module://matplotlib_inline.backend_inline $(BIN)/jupytext --to ipynb --execute --run-path . \
			--output tutorials/output/$$name.ipynb tutorials/$$name.py || exit 1; \
	done

clean:
	rm -rf $(VENV) tutorials/output .pytest_cache .mypy_cache .ruff_cache .hypothesis
