# Development of irw-optim. `make` alone explains the targets; each sets up what it needs, once.

# 3.11 first, since constraints.txt was made with it; the first that runs is taken.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

# The oldest Python that pyproject.toml allows and the newest that it names, also where pyenv keeps
# them, for test-lowest and test-newest.
there = $(shell for python in python$(1) $(HOME)/.pyenv/versions/$(1).*/bin/python; do \
	$$python -c 0 2>/dev/null && echo $$python && break; done)
PYTHON_LOWEST ?= $(call there,3.10)
PYTHON_NEWEST ?= $(call there,3.14)

VENV := .venv

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest

# Processes that share the tests out, a file at a time: `make test JOBS=8`.
JOBS ?= 2
SHARED = --numprocesses $(JOBS) --dist loadfile

# Other processors' arithmetic, as far as this one can do it: the kernels of torch, MKL and oneDNN
# for older ones, and two threads. Each kind shuffles the tests by a seed of its own.
machine-oldest := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
machine-default := ATEN_CPU_CAPABILITY=default
machine-avx2 := ATEN_CPU_CAPABILITY=avx2
machine-mkl := MKL_CBWR=COMPATIBLE
machine-onednn := ONEDNN_MAX_CPU_ISA=SSE41
machine-threads := OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 TEST_THREADS=2
seed-oldest := 1
seed-default := 2
seed-avx2 := 3
seed-mkl := 4
seed-onednn := 5
seed-threads := 6
MACHINES := $(addprefix test-machine-,oldest default avx2 mkl onednn threads)

# What makes sense on another device: processes, pages, other libraries' loops and data sets are
# about the host.
DEVICE_TESTS := tests/device tests/conformance tests/gradients tests/monitor tests/schemes \
	tests/criterion/test_criterion.py tests/optimizer/test_optimizer.py \
	tests/optimizer/test_safety.py tests/weighting/test_outliers.py tests/weighting/test_weighting.py \
	tests/test_verify.py

# A stamp file stands for "installed": it is renewed when one of these changes.
DEFINITION := pyproject.toml constraints.txt
WITH_REPORT := $(VENV)/.installed-report
WITH_ALL := $(VENV)/.installed-all

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-fast test-lowest test-newest test-versions test-machines $(MACHINES) lint format types docs demo notebook bench zoo test-device gpu build clean

help: ## Show this text
	@echo "irw-optim: the targets of this Makefile (each installs into $(VENV) what it needs, once)"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(WITH_ALL) ## Install the package with everything needed for development

test: $(WITH_ALL) ## Run all tests, the slow ones and the doctests included
	$(PYTEST) $(SHARED)

test-fast: $(WITH_ALL) ## Run the tests that take no more than seconds
	$(PYTEST) $(SHARED) -m "not slow"

test-lowest: $(VENV)-lowest/.installed ## Run the tests on Python 3.10 and the lowest versions
	$(VENV)-lowest/bin/python -m pytest -W default -p no:cacheprovider

test-newest: $(VENV)-newest/.installed ## Run the tests on Python 3.14 and the newest versions
	$(VENV)-newest/bin/python -m pytest -W default -p no:cacheprovider

test-versions: test-lowest test test-newest ## Run the tests on the lowest, the pinned, the newest

test-machines: $(MACHINES) ## Run the quick tests with other processors' arithmetic, shuffled

$(MACHINES): test-machine-%: $(WITH_ALL)
	env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(machine-$*) \
		$(PYTEST) -m "not slow" -p randomly --randomly-seed=$(seed-$*)

lint: $(WITH_ALL) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(WITH_ALL) ## Mend style and format, where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(WITH_ALL) ## Check the types
	$(BIN)/mypy

docs: $(WITH_ALL) ## Run the documentation's examples and build it in docs/_build/html
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b doctest docs docs/_build/doctest
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

demo: $(WITH_REPORT) ## Train on UCI Adult with and without IRW and write a report (minutes)
	$(BIN)/python examples/adult.py

notebook: $(WITH_ALL) ## Run the notebook of the examples and keep what it shows, on an idle machine
	$(BIN)/python examples/notebook.py

bench: $(WITH_ALL) ## Measure time and memory against plain training (minutes)
	$(BIN)/python -m benchmarks.cost steps
	$(BIN)/python -m benchmarks.cost private

zoo: $(WITH_ALL) ## Measure time, memory and exactness on many architectures (an hour)
	$(BIN)/python -m benchmarks.zoo

test-device: $(WITH_ALL) ## Run the tests with a pretended GPU as the default device (a C++ compiler builds it)
	env OMP_NUM_THREADS=1 PYTHONPATH=tests $(PYTEST) -p pretend_gpu.plugin -m "not slow" $(DEVICE_TESTS)

gpu: ## Test and measure on a CUDA card, with the torch of PYTHON (8 minutes)
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
		|| { echo "No CUDA card that the torch of $(PYTHON) can use; name another: make gpu PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m pip install --disable-pip-version-check --quiet --editable . hypothesis pandas pytest tqdm
	$(PYTHON) -m benchmarks.gpu

build: $(WITH_ALL) ## Build the source and binary distributions in dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## Remove all that these targets made, the environment included
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Creating the environment $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(WITH_REPORT): $(VENV)/.created $(DEFINITION)
	@echo "Installing the package and what the report needs (minutes, once)"
	$(INSTALL) --editable ".[report]"
	@touch $@

$(WITH_ALL): $(VENV)/.created $(DEFINITION)
	@echo "Installing the package and what its development needs (minutes, once)"
	$(INSTALL) --upgrade "pip>=25.1"
	$(INSTALL) --editable ".[report]" --group dev --group docs --group stacks
	@touch $@ $(WITH_REPORT)

# These two download and unpack several gigabytes each. Warnings of other releases of other packages
# are no errors there: they would say nothing about this one.
$(VENV)-lowest/.installed: pyproject.toml
	@test -n "$(PYTHON_LOWEST)" || { echo "Name the oldest Python: make test-lowest PYTHON_LOWEST=/path/to/python3.10" >&2; exit 1; }
	$(PYTHON_LOWEST) -m venv $(VENV)-lowest
	$(PYTHON) -c 'import tomllib; stated = tomllib.load(open("pyproject.toml", "rb")); \
		project, groups = stated["project"], stated["dependency-groups"]; \
		report = project["optional-dependencies"]["report"]; \
		print(*project["dependencies"], *report, *groups["stacks"], sep="\n")' \
		| sed 's/>=/==/' > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --disable-pip-version-check \
		--requirement $(VENV)-lowest/lowest.txt --editable . pytest hypothesis
	@touch $@

$(VENV)-newest/.installed: pyproject.toml
	@test -n "$(PYTHON_NEWEST)" || { echo "Name the newest Python: make test-newest PYTHON_NEWEST=/path/to/python3.14" >&2; exit 1; }
	$(PYTHON_NEWEST) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --disable-pip-version-check --upgrade "pip>=25.1"
	$(VENV)-newest/bin/python -m pip install --disable-pip-version-check --upgrade \
		--editable ".[report]" --group stacks pytest hypothesis
	@touch $@
