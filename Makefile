# `make demo` and `make test` each build .venv on first use; both may be run again and again.

PYTHON ?= python3
WORKERS ?= 2
PROMPT ?= def read_config(path):

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# One thread for each pytest worker: more only fight over the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test lint check benchmark clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train the quickstart drafter, then decode with it beside plain decoding"
	@echo "make test       lint, types, layers and every test"
	@echo "make lint       lint, types and layers only"
	@echo "make benchmark  the quickstart pair's table (long)"
	@echo "make clean      remove .venv and caches; checkpoints stay"

# -qq hides pip's remarks on its own configuration; its errors still show.
.venv/ready: pyproject.toml constraints.txt
	@echo "[install] .venv from pyproject.toml and constraints.txt (minutes on the first run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

# The demo trains afresh each time, so it replaces its own run and no other.
demo: .venv/ready
	@echo "[demo 1/2] distil a drafter from the committed target"
	@$(BIN)/python train.py --config configs/train/quickstart.yaml --overwrite true
	@echo "[demo 2/2] decode with it, beside the plain target"
	@$(BIN)/python generate.py --run checkpoints/quickstart --prompt "$(PROMPT)" --compare true

test: lint
	@echo "[test] pytest on $(WORKERS) workers"
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

lint: .venv/ready
	@echo "[lint 1/4] ruff check"
	@$(BIN)/ruff check -q --output-format concise .
	@echo "[lint 2/4] ruff format"
	@$(BIN)/ruff format -q --check . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@echo "[lint 3/4] mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "[lint 4/4] imports only point down"
	@$(BIN)/lint-imports --no-cache > .import-report 2>&1 || { cat .import-report; exit 1; }
	@rm -f .import-report

benchmark: .venv/ready
	@$(BIN)/python -m specstream.benchmark --config configs/benchmark/text-draft-model.yaml

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
