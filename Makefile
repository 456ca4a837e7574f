# `make help` lists the targets. Only Python 3.11, pip, make and git are needed beforehand.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.DEFAULT_GOAL := help
.PHONY: help install demo test bench docs lint format lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create .venv with the pinned dependencies and the cmran command

$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: Python 3.11 is needed, found $$($(PYTHON) --version 2>&1): set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/pip check
	@touch $@

demo: install ## run the whole pipeline on synthetic features, both modes, on the CPU or the GPU
	@test -d $(DEMO)/data || $(BIN)/cmran synth $(DEMO)/data --videos 540 --background-videos 60 --dtype float32 --seed 0
	$(BIN)/cmran pipeline $(DEMO)/data --out $(DEMO)/runs --recipe demo --trials 3 --search-epochs 2 --precision auto

test: install ## run all tests, including the slow ones
	$(BIN)/python -m pytest

bench: install ## run the benchmarks that suit this machine, under 10 minutes on 2 cores
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.waiting
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.packing
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m benchmarks.cuda; else echo "no usable CUDA device: skipping the CUDA benchmarks"; fi

docs: install ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

lint: install ## run ruff, mypy, import-linter, codespell and the word list
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files -z | xargs -0 $(BIN)/codespell
	.ci/words

format: install ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install ## write constraints.txt from the installed packages
	@{ echo '# What requirements.txt and requirements-dev.txt bring with them, as tested; written by `make lock`.'; \
	   $(BIN)/pip freeze --exclude-editable --all | grep -vE '^(pip|torch|nvidia-(cublas|cuda|cudnn|cufft|curand|cusolver|cusparse|nccl|nvjitlink|nvshmem|nvtx|cufile)[^=]*|triton)==' | sed 's/+cpu//'; \
	 } > constraints.txt.tmp && mv constraints.txt.tmp constraints.txt

clean: ## remove the virtual environment and caches (never data, runs or databases)
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
