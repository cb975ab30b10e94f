# `make` lists the targets. Recipes only call things; what they do is in the tools themselves.

PYTHON ?= python3
# The test suites' results; `make test` adds them up.
RESULTS := build/results

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# These import vLLM or start it, so they run where it is.
WITH_VLLM := lmcache-connector-vllm/tests tests/vllm
UNIT := $(filter-out $(WITH_VLLM),$(wildcard */tests)) examples tests

# The engine environment's Python, made on first use.
ENGINE = $(PYTHON) tools/engine_env.py
SYSTEM = $(PYTHON) tools/system_packages.py

.DEFAULT_GOAL := help
.PHONY: help test lint types unit docs e2e matrix demo bench bench-compare format engine-env venv wheels system clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

test: system ## everything: style, types, fast tests, documentation, tests on real vLLM
	@rm -rf $(RESULTS) && mkdir -p $(RESULTS)
	@# Each part runs whatever came of the others, so that one run shows all that is wrong.
	@status=0; for part in lint types unit docs e2e; do \
	  echo "== $$part"; \
	  $(MAKE) --no-print-directory SYSTEM=: $$part || { status=1; failed="$$failed $$part"; }; \
	done; \
	[ -z "$$failed" ] || echo "failed:$$failed"; \
	$(PYTHON) tools/summary.py $(RESULTS) || status=1; \
	exit $$status

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy --strict on what is published
	$(BIN)/mypy --strict lmcache-core/src/lmcache_core lmcache-connector-vllm/src kernels/src \
	  lmcache-backend-lm/src lmcache-backend-redis/src lmcache-backend-mooncake/src \
	  lmcache-backend-nixl/src lmcache-backend-infinistore/src lmcache-policy-s3fifo/src

unit: $(READY) ## the tests that need no engine
	@mkdir -p $(RESULTS)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not vllm" $(UNIT) --ignore=tests/vllm \
	  --junit-xml=$(RESULTS)/unit.xml

docs: $(READY) ## the documentation, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

e2e: | system ## the tests on real vLLM
	@mkdir -p $(RESULTS)
	@python=$$($(ENGINE)) && \
	  "$$python" -m pytest -q -n 2 --dist loadgroup --junit-xml=$(RESULTS)/vllm.xml $(WITH_VLLM)

matrix: | system ## greedy equality in all configurations, one and two ranks; half an hour
	@python=$$($(ENGINE)) && "$$python" tests/vllm/full_matrix.py $$("$$python" tools/models.py tiny)

demo: | system ## real vLLM, two overlapping prompts: what is computed once and what is loaded
	@$(PYTHON) tools/demo.py

bench: $(READY) ## measure: ratios to a calibration of the same run, into bench/results; ten minutes
	@$(BIN)/python bench/run_all.py

bench-compare: $(READY) ## BASE=revision: this build against that one, in nine interleaved pairs; fifty minutes on two cores
	@$(BIN)/python bench/compare.py --again --base $(or $(BASE),$(error BASE=revision, please))

wheels: | system ## sdists and wheels of all packages into dist/, tried on every Python that is here; an hour
	@$(PYTHON) tools/wheels.py

engine-env: | system ## prepare the engine environment; prints its Python
	@$(ENGINE)

venv: $(READY) ## prepare .venv

$(READY): requirements-dev.txt $(wildcard */pyproject.toml examples/*/pyproject.toml) | system
	@$(PYTHON) tools/dev_env.py

# What the system lacks is installed, or the command that does is the first line.
system:
	@$(SYSTEM) $(MAKECMDGOALS)

clean: ## remove what was made in this clone
	rm -rf $(VENV) build site .mypy_cache .pytest_cache .ruff_cache
