# Every target but help and clean makes or checks .venv first: `make submit` and `make test` need nothing
# before them. make itself ends with 2 whatever a command ends with; where the difference matters (3: a gate
# or a data check stopped the line) call .venv/bin/tuneyard, which these targets only wrap.

.DEFAULT_GOAL := help
.PHONY: help setup lock submit advise compile schedule unschedule up down status ui runs ask promote rollback history gc images test test-unit test-cluster test-containers lint bench bench-train clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# Values given on make's command line reach the commands through the environment, so that quotes and spaces
# in them mean nothing to make or the shell. What a shell happens to export under these names is not meant.
$(foreach name,EXTRA PIPELINE SET TARGET JSON CRON RUN MODEL VERSION Q DELETE KEEP_DAYS \
  REGISTRY BASE BUILDER PUSH ONLY DEBOOTSTRAP GPU DOLLARS EXAMPLES,\
  $(if $(filter command,$(firstword $(origin $(name)))),,$(eval unexport $(name))))

need-%:
	@test -n "$${$*}" || { echo 'make: $*=... is missing; `make help` shows how it is given' >&2; exit 2; }

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup:  ## make .venv from the lock; EXTRA=gpu for CUDA, PYTHON=... for another Python
	@sh requirements/setup.sh $${EXTRA:+--extra "$$EXTRA"}

submit: need-PIPELINE setup  ## run a pipeline: PIPELINE=sft_legal [SET="train.max_steps=20 ..."] [JSON=1] [TARGET=kfp]
	@set -f; set --; for change in $$SET; do set -- "$$@" --set "$$change"; done; \
	exec $(BIN)/tuneyard submit "$$PIPELINE" $${TARGET:+--target "$$TARGET"} $${JSON:+--json} "$$@"

advise: need-PIPELINE setup  ## predict memory, steps, time, disk, cost: PIPELINE=... [GPU=h100] [DOLLARS=2.5] [EXAMPLES=...]
	@set -f; set --; for change in $$SET; do set -- "$$@" --set "$$change"; done; \
	exec $(BIN)/tuneyard advise "$$PIPELINE" $${GPU:+--gpu "$$GPU"} $${DOLLARS:+--dollars-per-hour "$$DOLLARS"} \
	  $${EXAMPLES:+--examples "$$EXAMPLES"} $${JSON:+--json} "$$@"

compile: setup  ## write the KFP IR of PIPELINE=..., or of every file in pipelines/
	@for spec in $${PIPELINE:-pipelines/*.yaml}; do $(BIN)/tuneyard compile "$$spec" || exit; done

images: setup  ## build the images: [ONLY=cpu] [REGISTRY=... PUSH=1] [BASE=... or DEBOOTSTRAP=1] [BUILDER=podman]
	@set -f; set --; for image in $$ONLY; do set -- "$$@" --only "$$image"; done; \
	exec $(BIN)/tuneyard images $${REGISTRY:+--registry "$$REGISTRY"} $${PUSH:+--push} \
	  $${BASE:+--base "$$BASE"} $${DEBOOTSTRAP:+--base-from-debootstrap} \
	  $${BUILDER:+--builder "$$BUILDER"} $${JSON:+--json} "$$@"

schedule: setup  ## make a cluster's schedules those of the files; or PIPELINE=sft_legal [CRON="0 3 1 * *"]
	@exec $(BIN)/tuneyard schedule $${PIPELINE:+"$$PIPELINE"} $${CRON:+--cron "$$CRON"} $${JSON:+--json}

unschedule: need-PIPELINE setup  ## stop a cluster from starting PIPELINE=... by itself
	@exec $(BIN)/tuneyard unschedule "$$PIPELINE"

up: setup  ## start the embedded platform: S3, model server
	@exec $(BIN)/tuneyard up

down: setup  ## stop it, leaving no process; data stays
	@exec $(BIN)/tuneyard down

status: setup  ## show what runs, and where
	@exec $(BIN)/tuneyard status

ui: setup  ## serve MLflow's page of runs and models
	@exec $(BIN)/tuneyard ui

runs: setup  ## list the runs, or watch one of the cluster: RUN=<id>
	@exec $(BIN)/tuneyard runs $${RUN:+attach "$$RUN"}

ask: need-MODEL need-Q setup  ## ask the served model: MODEL=sft_legal Q="..."
	@exec $(BIN)/tuneyard ask "$$MODEL" "$$Q"

promote: need-MODEL setup  ## make a version the champion: MODEL=sft_legal [VERSION=3, else the candidate]
	@exec $(BIN)/tuneyard promote "$$MODEL" $${VERSION:+--version "$$VERSION"}

history: need-MODEL setup  ## say who made which version champion, when, why: MODEL=sft_legal
	@exec $(BIN)/tuneyard history "$$MODEL" $${JSON:+--json}

rollback: need-MODEL setup  ## bring the champion before this one back: MODEL=sft_legal
	@exec $(BIN)/tuneyard rollback "$$MODEL"

gc: setup  ## show what the store could drop; DELETE=1 drops it, KEEP_DAYS=30
	@exec $(BIN)/tuneyard gc $${DELETE:+--delete} $${KEEP_DAYS:+--keep-days "$$KEEP_DAYS"}

# Two files of tests at a time, in the order they are collected: the longest are then not left to the end.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: setup  ## run all tests
	@exec $(PYTEST)

test-unit: setup  ## run the tests that need no server and no patience
	@exec $(PYTEST) -m "not (e2e or server or slow)"

test-cluster: setup  ## drive a real cluster, the one of TUNEYARD_KFP_ENDPOINT (docs/kubernetes.md)
	@exec $(BIN)/python -m pytest tests/cluster -rs

test-containers: setup  ## build images and run stages and server in containers; needs root, buildah, runc
	@TUNEYARD_TEST_CONTAINERS=1 exec $(BIN)/python -m pytest tests/containers --log-cli-level=INFO

lint: setup  ## ruff, mypy, the import contracts and hadolint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile

bench: setup  ## run the benchmarks
	@exec $(BIN)/python -m benchmarks

bench-train: setup  ## tokens/s of fine-tuning beside transformers.Trainer, TRL and LLaMA-Factory; JSON=1 prints one object
	@exec $(BIN)/python -m benchmarks train $${JSON:+--json}

lock: setup  ## pin the dependencies of pyproject.toml again (for maintainers)
	@exec $(BIN)/python requirements/lock.py

clean:  ## remove caches; .venv, runs and models stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find components pipelines serving tests benchmarks requirements -name __pycache__ -prune -exec rm -rf {} +
