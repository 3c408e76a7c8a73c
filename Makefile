# What a developer does here. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ENVIRONMENT := .venv/.installed
export RAY_USAGE_STATS_ENABLED := 0

# The environment is installed without byte code: whoever imports a module first compiles it, for all processes after.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo paper-smoke test test-quick test-ray test-nights test-slow
.PHONY: bench-resampling walk-publishing bench-loading bench-fetching bench-planning bench-networks
.PHONY: bench bench-memory bench-first-night bench-poison bench-workers bench-kills
.PHONY: bench-ddp bench-decoders chaos fuzz licences advisories
.PHONY: lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(ENVIRONMENT): pyproject.toml constraints.txt
	@echo "DARNet: building the Python environment in .venv from constraints.txt (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "DARNet needs Python 3.11, $(PYTHON) is $$($(PYTHON) -V); say make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --disable-pip-version-check --no-compile -qq -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "DARNet: the environment is ready"

demo: $(ENVIRONMENT) ## the whole road on phantoms: prepare, train, score two nights, results in .demo
	@echo "DARNet: running the demo, about six minutes on two cores; everything it makes goes to .demo"
	@$(BIN)/python -m jobs.demo --out .demo

paper-smoke: $(ENVIRONMENT) ## the paper's whole evaluation on phantoms: four networks of five folds, a report in .paper
	@echo "DARNet: the paper's evaluation on phantoms, the longest target here; everything it makes goes to .paper"
	@test -f .paper/phantoms/cohort.csv && test -z "$$(find darnet jobs \
		-type f -not -path '*/__pycache__/*' -newer .paper/phantoms/cohort.csv)" || { \
		rm -rf .paper && \
		$(BIN)/python -m jobs.phantoms --config jobs/paper-smoke.toml --train-scans 30 --out .paper/phantoms; }
	@$(BIN)/python -m jobs.paper --config jobs/paper-smoke.toml --archive .paper/phantoms/archive \
		--cohort .paper/phantoms/cohort.csv --truth .paper/phantoms/truth --out .paper/study
	@echo "DARNet: the report is .paper/study/report/report.html"

test: $(ENVIRONMENT) ## style, types and all tests but the slow ones
	@$(MAKE) --no-print-directory -j 2 lint test-quick
	@$(MAKE) --no-print-directory -j 2 test-ray test-nights

test-quick: $(ENVIRONMENT) # three processes of one thread each: many of these tests wait
	@echo "DARNet: tests without Ray, three at a time"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile -m 'not ray and not slow'

test-ray: $(ENVIRONMENT)
	@echo "DARNet: tests that start Ray"
	@$(BIN)/python -m pytest -q -m 'ray and not slow'

test-nights: $(ENVIRONMENT)
	@$(BIN)/python -m tests.chaos --quick --only kill_driver,conflict

test-slow: $(ENVIRONMENT) ## what takes longer than a person waits
	@$(BIN)/python -m pytest -q -m slow

bench: $(ENVIRONMENT) ## peers and us on the same scans, in turn; ONLY=reading,road SCANS=folder REPEATS=3, results in .bench
	@$(BIN)/python -m tests.bench.peers $(if $(ONLY),--only "$(ONLY)") $(if $(SCANS),--scans "$(SCANS)") \
		$(if $(REPEATS),--repeats "$(REPEATS)")

bench-resampling: $(ENVIRONMENT) ## linear against area depth resampling; SCANS=folder MODEL=bundle REPEATS=5, default phantoms
	@$(BIN)/python -m tests.bench.resampling $(if $(SCANS),--scans "$(SCANS)") $(if $(MODEL),--model "$(MODEL)") \
		$(if $(REPEATS),--repeats "$(REPEATS)")

walk-publishing: $(ENVIRONMENT) ## every way two or three runs can meet in the results table, with the code that publishes
	@$(BIN)/python -m tests.publish_model

bench-loading: $(ENVIRONMENT) ## what share of a training step waits for its scans
	@$(BIN)/python -m tests.bench.loading

bench-fetching: $(ENVIRONMENT) ## slices one after another and side by side, whole and by headers first; REPEATS=3
	@$(BIN)/python -m tests.bench.fetching $(if $(REPEATS),--repeats $(REPEATS))

bench-memory: $(ENVIRONMENT) ## what a worker and its decoding child hold while small scans pass; NUM_SCANS=10000
	@$(BIN)/python -m tests.bench.memory $(if $(NUM_SCANS),--scans $(NUM_SCANS))

bench-poison: $(ENVIRONMENT) ## a night with scans that kill, stall or starve their reader; NUM_SCANS=2000 NUM_POISONOUS=100
	@$(BIN)/python -m tests.bench.poison $(if $(NUM_SCANS),--scans $(NUM_SCANS)) \
		$(if $(NUM_POISONOUS),--poisonous $(NUM_POISONOUS))

bench-workers: $(ENVIRONMENT) ## one worker against two: how far their loss curves are apart, and why
	@$(BIN)/python -m tests.bench.workers

bench-decoders: $(ENVIRONMENT) ## milliseconds a slice of SimpleITK's and other decoders, and who agrees; REPEATS=31
	@$(BIN)/python -m tests.bench.decoders $(if $(REPEATS),--repeats $(REPEATS))

bench-ddp: $(ENVIRONMENT) ## seconds of a training step: two workers of one thread against one of two; REPEATS=3
	@$(BIN)/python -m tests.bench.ddp $(if $(REPEATS),--repeats $(REPEATS))

chaos: $(ENVIRONMENT) ## what stores, disks, processes and clocks can do to a night, one after another; ONLY=names
	@$(BIN)/python -m tests.chaos $(if $(ONLY),--only $(ONLY))

bench-kills: $(ENVIRONMENT) ## what a night loses when its driver is killed at 20 moments, or started twice
	@$(BIN)/python -m tests.bench.kills

bench-first-night: $(ENVIRONMENT) ## how the driver's memory grows while 20,000 sources are scored; NUM_OBJECTS=60 of each, or STAGED=1
	@$(BIN)/python -m tests.bench.first_night $(if $(NUM_OBJECTS),--objects "$(NUM_OBJECTS)") $(if $(STAGED),--staged)

bench-planning: $(ENVIRONMENT) ## seconds and memory of a night with nothing new; REPEATS=3, NUM_OBJECTS=1000 NUM_NIGHTS=365 for one row
	@$(BIN)/python -m tests.bench.planning $(if $(NUM_OBJECTS),--objects "$(NUM_OBJECTS)") \
		$(if $(NUM_NIGHTS),--nights "$(NUM_NIGHTS)") $(if $(REPEATS),--repeats $(REPEATS))

fuzz: $(ENVIRONMENT) ## mutated scans through the reader for SECONDS=240; what breaks a rule is kept in tests/findings
	@$(BIN)/python -m tests.fuzz $(if $(SECONDS),--seconds "$(SECONDS)") $(if $(SEED),--seed "$(SEED)")

bench-networks: $(ENVIRONMENT) ## seconds a scan of torch and OpenVINO on this CPU; REPEATS=3 THREADS=2
	@$(BIN)/python -m tests.bench.networks $(if $(REPEATS),--repeats $(REPEATS)) $(if $(THREADS),--threads $(THREADS))

licences: $(ENVIRONMENT) ## write each dependency's licence behind its version in constraints.txt
	@$(BIN)/python -m tests.licences

advisories: $(ENVIRONMENT) ## ask the Python advisory database about every pinned version; needs the internet
	@$(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --disable-pip-version-check -qq pip-audit
	@.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

lint: $(ENVIRONMENT) ## style and types
	@echo "DARNet: checking style and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy && echo "DARNet: style and types are as they should be"

format: $(ENVIRONMENT) ## rewrite the code in house style
	@$(BIN)/ruff check --fix -q .
	@$(BIN)/ruff format -q .

clean: ## remove the environment, what demo, bench and paper-smoke made, and all caches
	@rm -rf .venv .venv-audit .venv-peers .demo .paper .bench *.egg-info .pytest_cache .mypy_cache .ruff_cache
