# hostler: every task of the repository. `make` alone lists them.
PORT ?= 8000
MODEL ?=
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev serve test check bench sim soak chaos prove fuzz gpu proto format clean

help: ## list the targets
	@printf 'make TARGET\n\n'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-10s %s\n", $$1, $$2}'

setup: ## make .venv with everything that serving needs (fast when nothing changed)
	@deploy/setup.sh run

setup-dev:
	@deploy/setup.sh dev

serve: setup ## set up, then serve on PORT=8000; MODEL=name, ARGS='--help' for more
	@exec $(BIN)/hostler serve --port $(PORT) $(ARGS) $(MODEL)

test: setup-dev ## run every test; ARGS='-k name' for some
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: setup-dev ## format, lint, types, import fences, proto lint and drift, docs
	@exec deploy/check.sh

bench: setup-dev ## measure against the peers on this machine; ARGS=--quick for the short form
	@exec $(BIN)/python -m tests.bench $(ARGS)

soak: setup-dev ## five models on devices for three, 2,000 requests, everything checked; ARGS='--minutes 20'
	@exec $(BIN)/python -m tests.soak $(ARGS)

chaos: setup-dev ## processes killed and frozen under load, every byte of every reply checked; ARGS='--requests 30000'
	@exec $(BIN)/python -m tests.chaos $(ARGS)

prove: setup-dev ## the scheduler through a million random steps; ARGS='--steps 10000'
	@exec $(BIN)/python -m tests.orchestrator.proof $(ARGS)

sim: setup-dev ## the placement policy beside LRU, LFU, Ollama and a clairvoyant; ARGS='--traces team --seeds 5'
	@exec $(BIN)/python -m tests.sim $(ARGS)

fuzz: setup-dev ## schemathesis on our own OpenAPI document, five minutes; ARGS='--seconds 60'
	@exec $(BIN)/python -m tests.fuzz $(ARGS)

# An interpreter given as `make gpu PYTHON=python3` is taken as it is: nothing is set up, what it lacks is named.
GIVEN := $(if $(filter command line,$(origin PYTHON)),$(PYTHON))
gpu: $(if $(GIVEN),,setup-dev) ## correctness and speed on a CUDA device, if there is one; ARGS='--only speed'; PYTHON=python3 to set up nothing
	@exec $(or $(GIVEN),$(BIN)/python) -m tests.bench.gpu $(ARGS)

proto: setup-dev ## generate the Python code of the .proto contracts
	@deploy/proto.sh

format: setup-dev ## format the code and apply the linter's safe fixes
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

clean: ## remove .venv and every cache of the tools
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
