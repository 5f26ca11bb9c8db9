PYTHON ?= python3
export PROFILE ?= pocket
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test test-slow chat export notebooks report seeds benchmark lint format \
  address colab-check newest-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14
	@echo
	@echo "Knobs: PROFILE=pocket|llama_1b BASE_MODEL FIRST_AID_DATASET FINETOME_DATASET"
	@echo "       MAX_STEPS SEED RUN_DIR LOAD_IN_4BIT=1; PYTHON=python3.12 for .venv"
	@echo "       CHAT_ENGINE=openvino after make export"
	@echo "       PYTHON=python3.13 and TORCH=2.13.0 for the two checks"

run: $(READY) ## execute notebooks 01 to 06 in order; results go to data/runs/
	@$(BIN)/python -m utils.walk

test: $(READY) ## the test suite
	@$(BIN)/python -m pytest

test-slow: $(READY) ## the long proofs as well
	@$(BIN)/python -m pytest -m "slow or not slow"

chat: $(READY) ## the three models at http://127.0.0.1:7860
	@$(BIN)/python app.py

export: $(READY) ## BASE_MODEL for OpenVINO, FORMAT=int4|int8|fp16|fp32 (int4)
	@$(BIN)/python -m utils.export $(if $(FORMAT),--format $(FORMAT))

notebooks: $(READY) ## execute all six and save them in place, clean
	@$(BIN)/python -m utils.walk --in-place

report: $(READY) ## take the run's snapshot and render the README's results
	@$(BIN)/python -m utils.report

seeds: $(READY) ## fine-tune and compare again with two more seeds
	@$(BIN)/python -m utils.seeds

benchmark: $(READY) ## speed and memory, both sides of a pair in one run, as JSON
	@$(BIN)/python -m utils.benchmark

lint: $(READY) ## ruff, notebooks included, and what else keeps them out of a commit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m utils.hygiene

format: $(READY) ## let ruff format everything
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

colab-check: ## Colab's versions, the set-up cell on top, all six notebooks
	@$(PYTHON) -m utils.colab_check $(if $(TORCH),--torch $(TORCH))

newest-check: ## the newest releases that requirements.txt admits, all six notebooks
	@$(PYTHON) -m utils.colab_check --newest $(if $(TORCH),--torch $(TORCH))

address: $(READY) ## REPO=owner/name: stamp the repository's address everywhere
	@$(BIN)/python -m utils.colab --address "$(REPO)"

clean: ## remove the environment and every run
	rm -rf $(VENV) .venv-* data/runs

# Reinstalled only when one of the lists changes.
$(READY): requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) --version) is too old: this project needs 3.11 or newer."; \
	  echo "Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -c constraints.txt \
	  -r requirements.txt -r requirements-dev.txt
	@touch $@
