# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` need Python 3.10 or newer, git and make, and nothing else.
# PIP_CONSTRAINT, if set, pins versions as pip itself reads it; see constraints.txt.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyro_mpis tests tutorials $(wildcard benchmarks)

# One thread for each process: the tensors are small, and the test workers share the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo test test-slow lint types tests doctests wheel tutorials docs docs-check bench bench-adapt bench-narrow paper clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install into .venv and run tutorials/01_eight_schools.py"
	@echo "make test       lint, spelling, types, tests, doctests, wheel, site, tutorials"
	@echo "make test-slow  the tests left out of make test"
	@echo "make docs       the site, with the tutorials as notebooks, into output/site"
	@echo "make docs-check the site without running the tutorials: links, references"
	@echo "make bench      speed and memory against Pyro's estimators, into docs/speed.md"
	@echo "make bench-adapt  learned proposals against Pyro's inference, into output/adapt; resumes"
	@echo "make bench-narrow  how often narrow proposals are found, into docs/diagnostics.md"
	@echo "make paper      the paper's experiments, into output/paper; half an hour, resumes"
	@echo "make wheel      build the wheel, and use it outside of the source tree"
	@echo "make lint       ruff check, ruff format --check, codespell"
	@echo "make clean      remove caches, build products and output/; distclean: .venv too"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "Python 3.10 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "python -m venv failed; on Debian and Ubuntu it is the package python3-venv"; exit 1; }

# Stamps: install again only when what the package needs has changed.
$(VENV)/.stamp-demo: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[tutorials]'
	@touch $@

$(VENV)/.stamp-dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev,tutorials]'
	@touch $@ $(VENV)/.stamp-demo $(VENV)/.stamp-docs

$(VENV)/.stamp-docs: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

demo: $(VENV)/.stamp-demo
	$(BIN)/python tutorials/01_eight_schools.py

test: lint types tests doctests wheel docs-check tutorials

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell $(SOURCES) docs $(wildcard *.md) setup.cfg Makefile

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

# A file stays in one process: what its tests share is computed once.
tests: $(VENV)/.stamp-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.stamp-dev
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) -m slow

doctests: $(VENV)/.stamp-dev
	mkdir -p output/doctests  # for the files that they write
	cd output/doctests && $(ONE_THREAD) $(abspath $(BIN))/python -m pytest -q --doctest-modules \
	    --doctest-glob='*.md' $(CURDIR)/pyro_mpis $(CURDIR)/README.md \
	    $(CURDIR)/docs/from_importance.md $(CURDIR)/docs/writing_models.md \
	    $(CURDIR)/docs/training.md

wheel: $(VENV)/.stamp-dev
	.ci/check-wheel $(BIN)/python

# The site, with the tutorials executed; opens from output/site/index.html.
docs: $(VENV)/.stamp-docs
	$(ONE_THREAD) $(BIN)/python -m sphinx -q -W --keep-going docs output/site

# The same pages, with the tutorials as they are written: that each link has its target.
docs-check: $(VENV)/.stamp-dev
	NB_EXECUTION_MODE=off $(ONE_THREAD) $(BIN)/python -m sphinx -q -W --keep-going -E docs \
	    output/site-check

bench: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/speed.py

bench-adapt: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/adapt.py --output output/adapt

bench-narrow: $(VENV)/.stamp-dev
	$(ONE_THREAD) $(BIN)/python benchmarks/narrowness.py \
	    $(if $(PYRO_MPIS_DATA),--trials 30 --paper)

paper: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.paper --output output/paper

# CI in the environment makes the tutorials small. What they assert counts here, not what they print.
QUICK := 'benchmarks/speed.py --quick --output output/benchmarks-quick.md' \
    'benchmarks/narrowness.py --quick --output output/narrowness-quick.md' \
    '-m benchmarks.paper --quick --output output/paper-quick' tutorials/[0-9]*.py

tutorials: $(VENV)/.stamp-dev
	printf '%s\n' $(QUICK) | $(ONE_THREAD) CI=1 MPLBACKEND=Agg \
	    xargs -P $(JOBS) -I '{}' sh -c '$(BIN)/python {} > /dev/null'

clean:
	rm -rf build dist output *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
