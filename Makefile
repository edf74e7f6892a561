# make quickstart: set up and train once.   make test: set up and run the test suite, but for what takes long.
# make test-all: the whole of it.
# make install-imagenet: what ffcv files need beside the system's libraries (docs/imagenet.md).
# make install-integrations: other people's trainers and Ray, for their tests (docs/integrations.md).
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# (Three processes on two cores: a third of the time tests wait for others.)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup

.PHONY: quickstart test test-all lint install install-imagenet install-integrations clean

quickstart: install
	$(BIN)/python main.py

test: .venv/.installed-test lint
	$(PYTEST) -m "not long"

test-all: .venv/.installed-test lint
	$(PYTEST)

lint: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

install: .venv/.installed

.venv/.installed: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-test: .venv/.installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

install-integrations: .venv/.installed-integrations

.venv/.installed-integrations: .venv/.installed requirements-integrations.txt requirements-ray.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-integrations.txt -r requirements-ray.txt
	touch $@

install-imagenet: .venv/.installed-imagenet

.venv/.installed-imagenet: .venv/.installed requirements-imagenet.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-imagenet.txt
	touch $@

clean:
	rm -rf .venv .slurm .pytest_cache .ruff_cache .hypothesis
