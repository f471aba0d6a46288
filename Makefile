# make train: a first model on this machine.   make compare: softmax beside softpick.   make test: everything that must
# hold.   All make .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE ?= recipes/softpick_tiny.yaml
PAIR ?= softmax_tiny softpick_tiny
REPORT ?= runs/comparison
WORKERS ?= 2
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

# transformers' own tests of a model: its source distribution alone has them.
TRANSFORMERS := $(shell sed -n 's/^transformers==/transformers-/p' requirements.txt)
CACHE := $(or $(HF_SOFTPICK_CACHE),$(HOME)/.cache/hf_softpick)
TRANSFORMERS_TESTS := $(CACHE)/$(TRANSFORMERS)/tests
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' setup.py)
OLDEST_TRANSFORMERS := $(CACHE)/transformers-$(OLDEST)

.DEFAULT_GOAL := help
.PHONY: help install train compare test transformers-tests oldest-transformers lint format clean

help:
	@echo "make install  make $(VENV) with everything that is tested, and this checkout"
	@echo "make train    train $(RECIPE) on this machine (at most 5 minutes on 2 cores)"
	@echo "make compare  train softmax_tiny and softpick_tiny, measure both, write $(REPORT)/comparison.html (at most 25 minutes)"
	@echo "make test     style and tests (at most 15 minutes on 2 cores)"
	@echo "make transformers-tests  transformers' own tests of a model into $(CACHE); make test runs them"
	@echo "make oldest-transformers  the tests of private names with the oldest transformers that is supported; make test does"
	@echo "make lint     style alone;  make format mends it"
	@echo "make clean    remove caches and builds, keep .venv and runs"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp is written last, so an interrupted installation is repeated and a finished one costs nothing.
$(STAMP): requirements.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

install: $(STAMP)

# accelerate gives a process one thread unless it is told otherwise; without a GPU that would waste the other cores.
train: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} $(BIN)/accelerate launch --config_file recipes/accelerate/single.yaml -m hf_softpick.train $(RECIPE) $(ARGS)

# A run that is finished is not trained again, and what is measured anew is written over.
compare: $(STAMP)
	for name in $(PAIR); do $(MAKE) --no-print-directory train RECIPE=recipes/$$name.yaml || exit; done
	$(BIN)/python eval/downstream.py $(PAIR:%=runs/%) --tasks offline_heldout,offline_cloze,offline_code
	$(BIN)/python eval/compare.py $(PAIR:%=runs/%) --measure statistics,quantization,passkey --out $(REPORT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The folder gets its name last, so an interrupted download is repeated. Its __init__.py is not distributed.
$(TRANSFORMERS_TESTS): | $(STAMP)
	rm -rf "$(CACHE)/.sdist" && mkdir -p "$(CACHE)/.sdist" "$(@D)"
	$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --no-build-isolation \
		--no-binary transformers --dest "$(CACHE)/.sdist" $(subst -,==,$(TRANSFORMERS))
	tar -xzf "$(CACHE)/.sdist/$(TRANSFORMERS).tar.gz" -C "$(CACHE)/.sdist" $(TRANSFORMERS)/tests
	touch "$(CACHE)/.sdist/$(TRANSFORMERS)/tests/__init__.py"
	mv "$(CACHE)/.sdist/$(TRANSFORMERS)/tests" "$@" && rm -rf "$(CACHE)/.sdist"

transformers-tests: $(TRANSFORMERS_TESTS)

# That version, and the hub client that it wants; what else it depends on is the same.
$(OLDEST_TRANSFORMERS): | $(STAMP)
	rm -rf "$@.part"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target "$@.part" \
		"transformers==$(OLDEST).0" "huggingface_hub>=1.5,<2"
	mv "$@.part" "$@"

oldest-transformers: $(OLDEST_TRANSFORMERS)
	PYTHONPATH="$(OLDEST_TRANSFORMERS)" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q \
		tests/modeling/test_compat.py tests/modeling/test_mask_parts.py tests/training/test_trainer_hooks.py tests/test_private_names.py

# One thread in each worker: more would fight over the cores.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 15

# Triton's interpreter is chosen for a whole process, so the tests of the kernels on CPU get processes of their own.
# Without a network the tests of transformers skip by name, except in CI.
test: lint
	@$(MAKE) --no-print-directory transformers-tests || echo "transformers' own tests could not be downloaded"
	$(PYTEST) $(ARGS)
ifeq ($(strip $(ARGS)),)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted
	@$(MAKE) --no-print-directory "$(OLDEST_TRANSFORMERS)" || test -z "$(CI)"
	test ! -d "$(OLDEST_TRANSFORMERS)" || $(MAKE) --no-print-directory oldest-transformers
endif

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
