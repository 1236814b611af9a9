# All targets work on a fresh machine with make and Python 3.11 or later: each target first brings
# .venv up to date. Another Python: make PYTHON=python3.13 …

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
SIMULATE_ARGS ?=
ALERTS_ARGS ?=
VERSIONS ?= rq-2.6 rq-2.12 rq-3.0 celery-5.4 celery-5.5 celery-5.6 celery-5.7 \
	dramatiq-1.17 dramatiq-1.18 dramatiq-2.0 dramatiq-2.2
REDIS_SERVERS ?=
POSTGRES_BINS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test ecosystem matrix check bench bench-compare chaos simulate alerts fmt docs

help:
	@echo "make demo    see jobs survive what kills Redis and workers     (DEMO_ARGS='--library celery')"
	@echo "make test    all tests, with a real PostgreSQL and Redis       (TEST_ARGS='-k spool')"
	@echo "make ecosystem  the tests beside tools and applications of others, more of them than make test has"
	@echo "make matrix  the adapters' tests on several libraries and servers  (VERSIONS='rq-2.0 celery-5.7')"
	@echo "make check   ruff, mypy and the import contracts"
	@echo "make fmt     format the code and mend what ruff can mend"
	@echo "make docs    build the manual into build/docs"
	@echo "make bench   measure beside floors and peers                   (BENCH_ARGS='enqueue work')"
	@echo "make bench-compare REV=main  measure this tree and a revision in alternation"
	@echo "make simulate  10,000 simulated schedules of crashes and outages    (SIMULATE_ARGS='--seed 7')"
	@echo "make alerts  break what each alert is for, under a real Prometheus    (ALERTS_ARGS='--only paused')"
	@echo "make chaos   3 runs a library under random faults; CHAOS=full: 20 (CHAOS_ARGS='--library rq')"
	@echo "make chaos SOAK=30m   faults for so long in all libraries at once; memory and logs are watched"

demo: $(VENV)/.ready-for-demo
	$(BIN)/jobguard demo $(DEMO_ARGS)

# With bytecode, also where an image forbids it: else each of the processes compiles all tests and
# all of jobguard again.
test: export PYTHONDONTWRITEBYTECODE =

# A test that fails on a busy machine alone is no fault: what fails is run once more, and fails then.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 6 --dist worksteal $(TEST_ARGS) || { \
		echo "Running the tests that failed once more, with fewer beside them."; \
		$(BIN)/python -m pytest -n 2 --last-failed --last-failed-no-failures none $(TEST_ARGS); }

ecosystem: $(VENV)-ecosystem/.ready
	$(VENV)-ecosystem/bin/python -m pytest -n 2 tests/acceptance/test_ecosystem.py \
		tests/acceptance/test_tracing.py tests/integration/celery/test_batches.py $(TEST_ARGS)

$(VENV)-ecosystem/.ready: pyproject.toml $(VENV)/.created
	$(BIN)/python -m venv --clear $(VENV)-ecosystem
	$(VENV)-ecosystem/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[celery,dramatiq,rq,embedded,test,ecosystem]'
	@touch $@

# For each library the oldest version comes first; the servers are tested with the last one.
matrix: $(VENV)/.ready $(VERSIONS:%=$(VENV)-%/.ready)
	REDIS_SERVERS='$(REDIS_SERVERS)' POSTGRES_BINS='$(POSTGRES_BINS)' \
		$(BIN)/python -m tests.matrix $(VERSIONS)

check: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.ready-for-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# With bytecode, as an installed jobguard has it: else an import compiles its modules again.
bench bench-compare: export PYTHONDONTWRITEBYTECODE =

bench: $(VENV)/.ready-for-bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-compare: $(VENV)/.ready
	@test -n "$(REV)" || { echo "Name a revision: make bench-compare REV=main"; exit 2; }
	$(BIN)/python -m benchmarks.compare $(REV) $(BENCH_ARGS)

chaos: $(VENV)/.ready
	$(BIN)/python -m tests.chaos $(if $(SOAK),--soak $(SOAK),--runs $(if $(filter full,$(CHAOS)),20,3)) $(CHAOS_ARGS)

alerts: $(VENV)/.ready
	$(BIN)/python -m tests.alerts $(ALERTS_ARGS)

simulate: $(VENV)/.ready
	PYTHONHASHSEED=0 $(BIN)/python -m tests.simulation $(SIMULATE_ARGS)

# The stamps are written last, so that an interrupted step is done again.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "jobguard needs Python 3.11 or later; '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 | tail -n 1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.ready-for-demo: pyproject.toml $(VENV)/.created
	$(PIP) --editable '.[celery,dramatiq,rq,embedded]'
	@touch $@

# The peers that the benchmarks measure too are needed for nothing else.
$(VENV)/.ready-for-bench: $(VENV)/.ready
	$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/.ready-for-docs: pyproject.toml $(VENV)/.created
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.created
	$(PIP) --editable '.[celery,dramatiq,rq,embedded,test,dev]'
	@touch $(VENV)/.ready-for-demo $@

# Only one library is installed, as most users have it. Celery 5.4 accepts a kombu that refuses its
# redis.
PINS_celery-5.4 := 'kombu<5.5'
$(VENV)-%/.ready: pyproject.toml $(VENV)/.created
	$(BIN)/python -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[$(firstword $(subst -, ,$*)),embedded,matrix]' '$(subst -,==,$*).*' $(PINS_$*)
	@touch $@
