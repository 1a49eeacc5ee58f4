# Everything a developer does here, by name. `make` alone lists the names.
#
# PYTHON=python3.12   the interpreter that .venv is made from (default: the first fitting one on PATH)
# ARGS="..."          passed on: to `flamingo demo` (make demo), pytest (make test, make test-integration),
#                     `flamingo bench kernels` (make bench), tools/gpu_check.py (make gpu-check)

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := flamingo_dist kernels data_pipeline jobs
SCRIPTS := tools jobs/slurm tests/tools tests/integration
ARGS ?=

.PHONY: help
help:  ## list these targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP)  ## make .venv and install the project with its developer tools

# Reinstalls only when the dependencies or the installer change; the editable install follows the sources by itself.
$(STAMP): pyproject.toml tools/install.sh
	@PYTHON="$(PYTHON)" tools/install.sh $(VENV)
	@touch $@

.PHONY: demo
demo: $(STAMP)  ## train and evaluate a tiny Flamingo on this machine, nothing needed (ARGS="...")
	@$(BIN)/flamingo demo $(ARGS)

.PHONY: test
test: $(STAMP)  ## run the tests: light ones, kernels (interpreted, compiled), those that start processes
	@$(BIN)/python tools/run_tests.py light interpret dry dry-older distributed -- $(ARGS)

.PHONY: test-integration
test-integration: $(STAMP)  ## two-node SLURM and Ray (Debian: slurmctld slurmd slurm-client munge; as root)
	@$(BIN)/python tools/run_tests.py integration -- $(ARGS)

.PHONY: bench
bench: $(STAMP)  ## time the kernels against baselines on a GPU, or print the roofline (ARGS="...")
	@$(BIN)/flamingo bench kernels $(ARGS)

.PHONY: gpu-check
gpu-check: $(STAMP)  ## kernel tests, benchmarks and a training run on this machine's GPU, under 9 minutes (ARGS="FOLDER")
	@$(BIN)/python tools/gpu_check.py $(ARGS)

.PHONY: check
check: $(STAMP)  ## lint, formatting, types, import arrows, docstrings: everything but the tests
	@tools/check.sh $(BIN) $(ROOMS) -- $(SCRIPTS)

.PHONY: fix
fix: $(STAMP)  ## let ruff repair and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean:  ## remove caches and build leavings; keeps .venv and runs/
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(ROOMS) tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## clean, and remove .venv as well
	rm -rf $(VENV)
