# Everything a newcomer needs: `make demo`, then `make test`. No GPU, nvcc or download beyond pip packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
OUT ?= benchmarks/results
# -P: kernels/ at the top must not shadow other packages' `kernels`
GPU_PYTHON ?= python3
RUN := $(BIN)/python -P
IN_TIME := timeout -s INT -k 20 450

CPP := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh benchmarks/candidates/*)
NVCC ?= nvcc

.PHONY: demo test lint format bench figures gpu gpu-check gpu-bench gpu-compile gpu-candidates clean

demo: $(VENV)/.installed-cli
	$(RUN) examples/demo.py

test: $(VENV)/.installed-test
	$(RUN) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

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
gpu: gpu-check gpu-bench gpu-compile gpu-candidates

build/.gpu-installed: $(SOURCES)
	SR3FAST_BUILD_CUDA=1 SR3FAST_CUDA_ARCHITECTURES=native \
	  $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	mkdir -p build && touch $@

gpu-check: build/.gpu-installed
	$(GPU_PYTHON) benchmarks/gpu_check.py --out $(OUT)

# an interrupt, so that pytest prints what it has; each record is in its file as soon as it is measured
gpu-bench: build/.gpu-installed
	OUT=$(OUT) SR3FAST_BENCH_COMPILE=0 $(IN_TIME) $(GPU_PYTHON) -P -m pytest benchmarks --benchmark-only

# the networks first
gpu-compile: build/.gpu-installed
	OUT=$(OUT) SR3FAST_BENCH_COMPILE=1 $(IN_TIME) $(GPU_PYTHON) -P -m pytest --benchmark-only -k torch_compile \
	  benchmarks/test_sampling.py benchmarks/test_training.py benchmarks/test_ops.py

# kernels that may replace one of csrc's, beside it
CANDIDATES := $(patsubst benchmarks/%.cu,build/%,$(wildcard benchmarks/candidates/*.cu))

build/candidates/%: benchmarks/candidates/%.cu benchmarks/candidates/candidate.cuh $(SOURCES)
	mkdir -p $(@D)
	$(NVCC) -O3 -std=c++17 -arch=native -o $@ $<

gpu-candidates: $(CANDIDATES)
	mkdir -p $(OUT)
	for candidate in $^; do \
	  OUT=$(OUT) SR3FAST_COMMIT=$${SR3FAST_COMMIT:-$$(git rev-parse --short HEAD)} timeout -k 5 120 $$candidate || exit; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info sr3fast/_C*.so
