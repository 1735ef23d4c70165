# make demo and make test need Python >= 3.11 and make, nothing else; both work in .venv, which they make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz fuzz-graphs fuzz-files lint docs simplify kill-test clean
.DEFAULT_GOAL := test

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graphopt needs Python 3.11 or later; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: .venv/.installed  ## build engines and ONNX Runtime models from two networks, and show what came out
	$(BIN)/python -m benchmarks.demo

lint: .venv/.installed
	$(BIN)/ruff check .  passes backends models
	$(BIN)/ruff format --check . passes backends models
	$(BIN)/mypy

test: lint  ## everything CI runs
	$(BIN)/python -m pytest -q -n 2

fuzz: fuzz-graphs fuzz-files

fuzz-graphs: .venv/.installed  ## the laws of the suite on random models, for MINUTES (10)
	$(BIN)/python tests/fuzz.py --minutes $(or $(MINUTES),10)

fuzz-files: .venv/.installed  ## mutated files, MINUTES (10) at random and as long guided by coverage; what fails goes to fuzz-finds/
	$(BIN)/python tests/fuzz_files.py --seconds $$(($(or $(MINUTES),10) * 60))
	$(BIN)/python tests/fuzz_files.py --seconds $$(($(or $(MINUTES),10) * 60)) --atheris

simplify: .venv/.installed  ## nodes, CPU seconds and memory beside the peers; PEERS is a Python with benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.simplify $(if $(PEERS),--python $(PEERS))

docs: .venv/.installed  ## the documentation, into site/; dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

kill-test: .venv/.installed  ## kill -9 at random moments of builds; KILLS of them
	$(BIN)/python -m benchmarks.kills --kills $(or $(KILLS),200)

clean:
	rm -rf .venv site build dist *.egg-info demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis
