# One command each; both set up a virtual environment first when there is none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench

demo: .venv/ready
	$(BIN)/apexflow demo --force

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/speed.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready
