# `make demo` and `make test` work on a fresh machine with Python 3.11+ and make; each sets up .venv first.
PYTHON ?= python3
VENV := .venv
LOCK := requirements.lock
BIN := $(VENV)/bin
READY := $(VENV)/ready
export PYTHONNOUSERSITE = 1
unexport PYTHONDONTWRITEBYTECODE  # else each process compiles the code of helpers/ and tests/ again

.PHONY: demo test lint audit lock lab clean env systems slow crash browser cluster families

demo: env  ## the main job: solar cells to a report
	$(BIN)/thaw run recipes/elpv.yaml

test: env  ## all tests except the slow ones
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

systems: env  ## the five systems' recipes end to end, on built-in images with a small network
	$(BIN)/python benchmarks/systems.py

slow: env  ## tests that are too slow for make test, with transformers, JAX and a search (installs three extras), minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[hub,search,cluster]'
	$(BIN)/python -m pytest -m slow

crash: env  ## kills, full disks and read-only folders on the real notebooks, minutes
	$(BIN)/python -m pytest -m crash

browser: env  ## every notebook in a real JupyterLab, and the label review (needs Debian's chromium), minutes
	$(BIN)/python -m pytest -m browser

families: env  ## nine families of networks in every format of a bundle, ten minutes and more
	$(BIN)/python -m pytest -s -m families

cluster: env  ## two hosts, by two processes on this machine; installs the extra, minutes
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[cluster]'
	$(BIN)/python -m pytest -m cluster

lint: env  ## style of code and notebooks; the floors of helpers/; no outputs in git
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

audit: env  ## known vulnerabilities of the packages in both lock files; asks PyPI itself, since a mirror may know none
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	for lock in $(LOCK) requirements-gpu.lock; do \
		$(VENV)/audit/bin/pip-audit --requirement $$lock --require-hashes --disable-pip --progress-spinner off || exit; \
	done

lab: env  ## JupyterLab with the environment's kernel
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_explore.ipynb

env: $(READY)

# pip compiles on one core, compileall on all; it fails where a package carries code of another Python, which is no harm
$(READY): $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Thaw needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --require-hashes --requirement $(LOCK)
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

lock: env  ## write both lock files again from pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra data --extra weights --extra formats --extra dev $(LOCK_OPTIONS) --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra data --extra weights --extra formats --extra dev --extra gpu $(LOCK_OPTIONS) --output-file requirements-gpu.lock

LOCK_OPTIONS := --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-find-links \
	--custom-compile-command "make lock"

clean:  ## remove the environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
