# Everything runs in .venv, which the first target sets up from requirements.lock.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; \
	done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo starter test lint bench chaos bench-gpu bench-gpu-wheels bench-training lock audit clean

help:
	@echo 'make demo   the whole system on this machine: 2,000 real comments, a retrain, a hot swap'
	@echo 'make starter  hours: train the version that ships, by samples/starter/recipe.yaml, and measure it (ARGS=--encoder=DIR)'
	@echo 'make test   linters, types, import rules, container files and every test'
	@echo 'make lint   all of that but the tests'
	@echo 'make bench  half an hour on an idle machine: speed, latency, and what one could run instead (see ARGS=--help)'
	@echo 'make chaos  ten minutes of kills, freezes, full disks and nonsense: is a comment lost or decided twice? (ARGS=--help)'
	@echo 'make bench-gpu         measure on a GPU; needs torch and transformers, and .venv or the wheels of the next line'
	@echo 'make bench-training    time a training beside the settings that transformers.Trainer has by itself (ARGS=--help)'
	@echo 'make bench-gpu-wheels  download into bench/wheels what a machine without a package registry lacks for it'
	@echo 'make audit  look every package of requirements.lock up among the known vulnerabilities'
	@echo 'make lock   resolve pyproject.toml into requirements.lock anew'
	@echo 'make clean  remove .venv, .venv-audit, .venv-rivals and var, with the demo database and trained versions'

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'moderato needs Python 3.11 or 3.12 with venv; name one: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@echo 'Setting up .venv from requirements.lock; this takes some minutes once.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	$(BIN)/moderato demo

NAME ?= starter-new
TESTS := samples/starter/test_natural.csv.gz samples/starter/test_balanced.csv.gz

# Every measurement on the test files is kept: who looks often enough, and goes by what he sees, has trained on them.
starter: install
	$(BIN)/moderato train --config samples/starter/recipe.yaml --name $(NAME) --weights int8 --resume $(ARGS)
	for file in $(TESTS); do \
		$(BIN)/moderato evaluate $$file --version $(NAME) --json >> samples/starter/test_evaluations.jsonl || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile Dockerfile.gpu
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml

test: lint
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

bench: install .venv-rivals/installed
	$(BIN)/python -m bench $(ARGS)

chaos: install
	$(BIN)/python -m bench.chaos $(ARGS)

# What moderato is measured against has an environment of its own: some of it needs an older Celery.
.venv-rivals/installed: bench/rivals/requirements.txt
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --disable-pip-version-check -q -r bench/rivals/requirements.txt
	@touch $@

# Without .venv: a machine with a GPU often has a torch of its own, and no way to a package registry.
ANY_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

bench-gpu:
	$(ANY_PYTHON) -m bench.gpu $(ARGS)

bench-training:
	$(ANY_PYTHON) -m bench.training $(ARGS)

bench-gpu-wheels:
	$(ANY_PYTHON) -m bench.gpu_wheels bench/wheels $(ARGS)

# pip-tools writes the file; a CPU-only build of torch must not end up in everyone's lock.
lock: install
	$(BIN)/python -m pip install -q pip-tools
	$(BIN)/pip-compile -q --extra embedded --extra hub --extra parquet --extra bench --extra test --strip-extras --allow-unsafe --no-annotate --no-header \
		--no-emit-options -o requirements.lock pyproject.toml
	sed -i -e 's/^\(torch==[0-9.]*\)+.*/\1/' -e '/^#/d' -e '/^$$/d' requirements.lock
	sed -i '1i # Every package at the version the tests passed with; made from pyproject.toml by `make lock`.' requirements.lock

# In an environment of its own: its dependencies are not ours to pin. Strict: a package it cannot look up fails it.
audit: .venv-audit/installed
	.venv-audit/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip -r requirements.lock

.venv-audit/installed:
	@test -n '$(PYTHON)' || { echo 'make audit needs Python 3.11 or 3.12 with venv' >&2; exit 1; }
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --disable-pip-version-check -q pip-audit
	@touch $@

clean:
	rm -rf .venv .venv-audit .venv-rivals var
