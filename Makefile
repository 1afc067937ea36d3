# From a bare machine (Python 3.11 and pip): `make quickstart` trains, `make test` runs every check.
# The environment is built once and then found in a moment; see tools/setup_environment.py.

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
VENV        ?= .venv
ACCELERATOR ?= auto
MODEL       ?= models/SmolLM2-135M-Instruct
PIPELINE    ?= async-grpo
CONFIG      ?= configs/$(PIPELINE)/quickstart.yaml
OUTPUT      ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
# What the student of PIPELINE=distill learns from and PIPELINE=sdpo begins with; made when it is not there.
SUMS        ?= runs/sums
# Test processes of `make test`.
TEST_PROCESSES ?= 2
# More overrides for the quickstart: make quickstart ARGS="seed=1 max_steps=8"
ARGS        ?=

SUMS_AS.distill := teacher_model_name_or_path=$(SUMS)/checkpoints/step-20
SUMS_AS.sdpo    := model_name_or_path=$(SUMS)/checkpoints/step-20
SUMS_AS         := $(SUMS_AS.$(PIPELINE))

RUN    := $(VENV)/bin/python
SETUP  := $(PYTHON) tools/setup_environment.py --venv $(VENV) --accelerator $(ACCELERATOR)
SOURCE := $(wildcard trl_ray tests tools examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help quickstart environment environment-dev test test-long check lint types unit bench clean

help:
	@echo "make quickstart   set up, fetch a small model, train it by asynchronous GRPO; PIPELINE=sft and so on for others"
	@echo "make test         set up, lint, types, the whole test suite"
	@echo "make test-long    the tests of random inputs and interleavings, with eighty times as many, and those marked long"
	@echo "make check        lint, types, unit tests"
	@echo "make unit         unit tests"
	@echo "make bench        the benchmarks"
	@echo "make clean        remove the environment, models/, caches; runs/ stays"

quickstart: environment
	@$(RUN) -c 'import pathlib, sys; sys.exit(not pathlib.Path("$(MODEL)", "generation_config.json").is_file())' \
	    || $(RUN) examples/fetch_smollm2.py $(MODEL)
	@if [ -n "$(SUMS_AS)" ] && [ ! -d $(SUMS)/checkpoints/step-20 ]; then \
	    $(VENV)/bin/trl-ray sft --config configs/sft/sums.yaml model_name_or_path=$(MODEL) output_dir=$(SUMS) \
	        overwrite_output_dir=true; fi
	$(VENV)/bin/trl-ray $(PIPELINE) --config $(CONFIG) model_name_or_path=$(MODEL) output_dir=$(OUTPUT) $(SUMS_AS) $(ARGS)

environment:
	@$(SETUP) --extras quickstart

environment-dev:
	@$(SETUP) --extras dev,test,quickstart

# The longest files start first (tests/conftest.py), and types are checked beside the tests.
define with_types
@log=$$(mktemp); $(RUN) -m mypy >$$log 2>&1 & types=$$!; \
$(RUN) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(1); tests=$$?; \
wait $$types || { cat $$log; tests=1; }; rm -f $$log; exit $$tests
endef

test: environment-dev lint
	$(call with_types,)

# Only those that draw what they try: the others would do again what `make test` does.
test-long: environment-dev
	HYPOTHESIS_PROFILE=thorough $(RUN) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile \
	    $$(grep -rlE "^(from|import) hypothesis" tests/unit tests/parity)
	$(RUN) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --long -m long tests

check: environment-dev lint
	$(call with_types,tests/unit)

lint: environment-dev
	$(RUN) -m ruff check $(SOURCE)

types: environment-dev
	$(RUN) -m mypy

unit: environment-dev
	$(RUN) -m pytest -q tests/unit

bench: environment-dev
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(RUN) $$script; done

clean:
	rm -rf $(VENV) models build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find trl_ray tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
