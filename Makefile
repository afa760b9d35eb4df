# Each target sets up its own .venv first. Everything runs without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo build test test-oldest test-matrix bench gpu-check inspect readme lint clean

$(VENV)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools wheel ninja pybind11
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "torch==2.13.0" || $(BIN)/pip install -q "torch>=2.10"
	$(BIN)/pip install -q --no-build-isolation -e ".[hf]"
	touch $@

$(VENV)/.test-tools: $(VENV)/.installed
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	touch $@

build: $(VENV)/.installed
	IVL_BUILD_CPU=1 $(BIN)/python setup.py -q build_ext --inplace

# The demo compiles CUDA kernels only where there is a GPU for them.
demo: export IVL_BUILD_CUDA := $(or $(IVL_BUILD_CUDA),$(if $(wildcard /dev/nvidia0 /dev/dxg),,0))
demo: build
	$(BIN)/ivl-kernels demo

test: $(VENV)/.test-tools build lint
	$(BIN)/python -m pytest -q -n 2

bench: $(VENV)/.test-tools build
	$(BIN)/ivl-kernels bench

# Proves and times every op on this machine's GPU; DEVICE=cpu rehearses the same code.
gpu-check: $(VENV)/.test-tools build
	$(BIN)/ivl-kernels gpu-check --device $(or $(DEVICE),cuda)

# What the compiled GPU kernels cost, without a GPU. OP, ARCH, SHAPE and DTYPE narrow it (SHAPE: see --help); all takes about an hour on two cores.
inspect: $(VENV)/.test-tools build
	$(BIN)/python -m bench.inspect $(OP:%=--op %) $(ARCH:%=--arch %) $(SHAPE:%=--shape %) $(DTYPE:%=--dtype %)

# The generated tables of README and docs.
readme: $(VENV)/.test-tools
	$(BIN)/python -m bench.readme

# The oldest supported transformers and Triton, after the newest.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q --upgrade pip setuptools wheel ninja pybind11
	$(OLDEST)/bin/pip install -q "torch==2.13.0" || $(OLDEST)/bin/pip install -q "torch>=2.10"
	$(OLDEST)/bin/pip install -q --no-build-isolation -e ".[test]"
	$(OLDEST)/bin/pip install -q "transformers==4.57.*" "triton==3.6.*"
	touch $@

# OLDEST_PYTHON=... takes an environment that is already there.
OLDEST_PYTHON ?= $(OLDEST)/bin/python
test-oldest: $(if $(filter file,$(origin OLDEST_PYTHON)),$(OLDEST)/.installed)
	$(OLDEST_PYTHON) -m pytest -q -n 2 tests/integrations tests/models tests/nn tests/ops

test-matrix: test test-oldest

lint: $(VENV)/.test-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info ivl_kernels/_C*.so ivl_kernels/_C_cuda
