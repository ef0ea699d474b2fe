# Needs Python 3.10 or later (with venv) and make; everything else is installed into .venv from the package index.
# Another Python: make run PYTHON=python3.13

PYTHON ?= python3
ARGS ?=

# Twice quiet: errors and nothing else.
PIP_INSTALL = bin/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run test test-fast crash mutants bench lint format dashboards frameworks headroom clean

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

run: .venv/.package ## serve the default store on http://127.0.0.1:9478 (ARGS="--demo" and others are passed on)
	@exec .venv/bin/savings-exporter serve $(ARGS)

# Makes headroom when a selected test needs it. That may not install on every Python; the run then ends by saying so.
test: .venv/.dev ## run every test that this machine can run (ARGS="-k name" and others go to pytest)
	@INSTALL_PEERS=1 .venv/bin/python -m pytest $(ARGS)

test-fast: .venv/.dev ## run the unit and storage tests, in under a minute: those marked slow are left out
	@.venv/bin/python -m pytest --fast tests/unit tests/storage $(ARGS)

# Redis and PostgreSQL are used where they are installed (apt-get install redis-server postgresql).
bench: .venv/.bench ## measure the store against its peers, half an hour (ARGS="threads --repeat 3" and others)
	-@$(MAKE) --no-print-directory headroom
	@.venv/bin/python -m benchmarks $(ARGS)

# What is part of every "make test", with more rounds and with every fault at every call.
crash: .venv/.dev ## lose power, fill disks, fail and kill for half an hour (root, Linux); build/crash-lab.json
	@CRASH_LAB=long REQUIRE_ALL=1 .venv/bin/python -m pytest tests/crash $(ARGS)

mutants: .venv/.dev ## take each rule of the storage out of the code: a test must fail (ARGS="gap key")
	@.venv/bin/python -m tests.mutants $(ARGS)

lint: .venv/.dev ## check style, format, types, and that modules import only layers below them
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache --no-logo

format: .venv/.dev ## put code in the project's format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

dashboards: .venv/.dev ## build Grafana's dashboards, and the pictures of them, from dashboards/grafana
	@.venv/bin/python dashboards/grafana/build.py

frameworks: .venv/.frameworks ## install the web frameworks that the examples of docs/embedding.md use

headroom: .venv-headroom/.installed ## install the Headroom that the interop tests talk to, apart from everything else

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-headroom .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made last, so an installation that broke off is done again, from an empty environment.
.venv/.package: pyproject.toml
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@echo "installing savings-exporter into .venv"
	@.venv/$(PIP_INSTALL) --upgrade pip
	@.venv/$(PIP_INSTALL) --editable .
	@touch $@

# pip knows dependency groups since 25.1, which is why it is upgraded above.
.venv/.dev: .venv/.package
	@echo "installing the development tools into .venv"
	@.venv/$(PIP_INSTALL) --group dev
	@touch $@

.venv/.bench: .venv/.dev
	@echo "installing the clients of the benchmarks' peers into .venv"
	@.venv/$(PIP_INSTALL) --group bench
	@touch $@

.venv/.frameworks: .venv/.dev
	@echo "installing the frameworks of the examples into .venv"
	@.venv/$(PIP_INSTALL) --group frameworks
	@touch $@

.venv-headroom/.installed: Makefile
	@echo "installing headroom-ai into .venv-headroom"
	@$(PYTHON) -m venv --clear .venv-headroom
	@.venv-headroom/$(PIP_INSTALL) headroom-ai==0.42.0
	@touch $@
