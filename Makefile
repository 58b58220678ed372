# Everything a newcomer needs: `make demo`, then `make test`. No GPU, nvcc or download beyond pip packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
OUT ?= benchmarks/results
# -P: kernels/ at the top must not shadow other packages' `kernels`
GPU_PYTHON ?= python3
RUN := $(BIN)/python -P
GPU_RUN := $(GPU_PYTHON) -P

.PHONY: demo test lint format bench figures gpu gpu-build gpu-check gpu-bench gpu-compile clean

demo: $(VENV)/.installed-cli
	$(RUN) examples/demo.py

test: $(VENV)/.installed-test
	$(RUN) -m pytest tests

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

bench: $(VENV)/.installed-test
	OUT=$(OUT) $(RUN) -m pytest benchmarks --benchmark-only

# tables and plots anew from benchmarks/results/
figures: $(VENV)/.installed-test
	$(RUN) benchmarks/plots.py
	$(RUN) benchmarks/tables.py --readme README.md
	$(RUN) benchmarks/tables.py --readme docs/performance.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip

# torch first and pinned: a plain `torch` would bring gigabytes
$(VENV)/.installed-%: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

# ---- with a GPU: the machine's own python3, torch and compilers; each under 9 minutes
gpu: gpu-check gpu-bench gpu-compile

gpu-build:
	SR3FAST_BUILD_CUDA=1 SR3FAST_CUDA_ARCHITECTURES=native \
	  $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .

gpu-check: gpu-build
	$(GPU_RUN) benchmarks/gpu_check.py --out $(OUT)

gpu-bench: gpu-build
	OUT=$(OUT) SR3FAST_BENCH_COMPILE=0 timeout 530 $(GPU_RUN) -m pytest benchmarks --benchmark-only

gpu-compile: gpu-build
	OUT=$(OUT) SR3FAST_BENCH_COMPILE=1 timeout 530 $(GPU_RUN) -m pytest benchmarks --benchmark-only -k "compile"

clean:
	rm -rf $(VENV) build dist *.egg-info sr3fast/_C*.so
