# make search: the main job on phantoms.  make test: lint and the fast tests.  All set up .venv on first use.
# make test-all: the same, and the tests that need hosts, services, long searches or much time.
# make test-gpu: the tests and the benchmark that need a GPU.
# make test-packages: what of Debian some tests need; without it they are skipped.

PYTHON ?= python3
BIN := .venv/bin
# for tests of separate hosts, of what Prometheus sees, and of a study in PostgreSQL; those of pages need chromium
TEST_PACKAGES := iproute2 openssh-server rsync prometheus postgresql

.PHONY: search test test-all test-gpu test-packages lint setup lock

search: .venv/.ready
	$(BIN)/python -m lungct_tune.search

# tests that need no Ray in two processes, then those that share one Ray
test: .venv/.ready lint
	$(BIN)/python -m pytest -m "not ray and not long and not gpu" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m "ray and not long and not gpu"

test-all: test
	$(BIN)/python -m pytest -m "long and not ray and not gpu" --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest -m "long and ray and not gpu"

# on a machine with a GPU; the benchmark's figures go into docs/benchmarks.md
test-gpu: .venv/.ready
	$(BIN)/python -m pytest tests/gpu -m gpu
	$(BIN)/python benchmarks/gpu.py

test-packages:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(TEST_PACKAGES) > /dev/null

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

setup: .venv/.ready

# Bytecode is compiled here: every Ray worker is a new process, and without it each spends 10 s more on importing.
.venv/.ready: requirements.lock requirements-uv.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	$(BIN)/python -m compileall -q lungct_tune
	touch $@

# Versions and checksums of all packages, for any machine. uv, which installs them, has a file of its own: pip installs it.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --generate-hashes
lock:
	$(COMPILE) --extra dev pyproject.toml -o requirements.lock
	echo uv | $(COMPILE) - -o requirements-uv.lock

# The docs: the page of settings from the settings model, pictures from phantoms (needs Debian's chromium), and the site.
.PHONY: docs pictures settings-page

docs: .venv/.ready
	$(BIN)/mkdocs build --strict --quiet

pictures: .venv/.ready
	$(BIN)/python docs/make_pictures.py

settings-page: .venv/.ready
	$(BIN)/python docs/make_settings_page.py
