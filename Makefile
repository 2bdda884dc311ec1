# Set-up, tests and demo of codir_fast. Every target sets up what it needs in .venv; a second run finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what it imports, which is a small part of what is installed.
INSTALL := $(PIP) install --no-compile
CXX_FILES := $(wildcard $(foreach dir,csrc csrc/* tests/csrc,$(dir)/*.cpp $(dir)/*.h $(dir)/*.cu))
BUILD_FILES := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py pyproject.toml codir_fast/version.py

comma := ,
# The C++ tests in folder $(1), built with the sanitizers $(2).
define run_ctest
$(BIN)/cmake -G Ninja -S . -B $(1) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
  -DCODIR_FAST_BUILD_EXTENSION=OFF -DCODIR_FAST_BUILD_TESTS=ON -DCODIR_FAST_SANITIZE=$(2)
$(BIN)/cmake --build $(1)
$(BIN)/ctest --test-dir $(1) --output-on-failure -j $(shell nproc 2>/dev/null || echo 2)
endef

.PHONY: help install demo study test ctest sanitize bench static-gpu test-gpu bench-gpu backends-gpu lint format clean

help:
	@echo "make install   .venv with pinned packages, codir_fast built into it"
	@echo "make demo      fine-tune a teacher on real text, distil two students, compare them (QUICK=1: a subset)"
	@echo "make study     distillations side by side, hours of them; what is finished is kept (ARGS=--trials)"
	@echo "make test      the Python tests"
	@echo "make ctest     the C++ tests, without Python or torch"
	@echo "make sanitize  the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench     the kernels beside their peers, to benchmarks/results/OUT (OUT=mine)"
	@echo "make static-gpu  every GPU kernel compiled, without a GPU: cubins and figures to OUT (OUT=build/static-gpu)"
	@echo "make test-gpu  the GPU tests, with PYTHON's own torch, nothing fetched; PYTHON=python3, QUICK=1: what tells most, REST=1: the rest, SANITIZE=1: compute-sanitizer"
	@echo "make bench-gpu  the kernels beside their peers on the GPU, likewise, to benchmarks/results/OUT (OUT=gpu, or a"
	@echo "                path from /); SHAPE=clip: that one, QUICK=1: fewer peers"
	@echo "make backends-gpu  the hand-written kernel beside Triton's on a Hopper GPU, likewise; QUICK=1"
	@echo "make lint      style, formatting and types; make format mends the first two"
	@echo "make clean     remove builds and .venv, keep runs/"

$(VENV)/.torch: requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "codir_fast needs Python >= 3.10, and $(PYTHON) is not: give one with PYTHON=..." >&2; exit 1; }
	@# Without ensurepip, venv leaves a Python that has no pip: so pip is what is asked for.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) >/dev/null || \
	  { echo "$(PYTHON) can't make a virtual environment: install its venv package (python3-venv)" >&2; exit 1; }
	$(INSTALL) -r requirements/torch.txt
	@touch $@

$(VENV)/.packages: requirements/dev.txt requirements/test-peers.txt $(VENV)/.torch
	$(INSTALL) -r requirements/torch.txt -r requirements/dev.txt
	$(INSTALL) --no-deps -r requirements/test-peers.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.packages $(BUILD_FILES)
	$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.demo: requirements/demo.txt $(VENV)/.packages
	$(INSTALL) --no-deps --require-hashes -r requirements/demo.txt
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/python examples/demo.py $(if $(QUICK),--quick)

study: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/python examples/study.py $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

ctest: $(VENV)/.packages
	$(call run_ctest,build/ctest,)

sanitize: $(VENV)/.packages
	$(call run_ctest,build/sanitize,address$(comma)undefined)

$(VENV)/.bench: requirements/bench.txt $(VENV)/.packages
	$(INSTALL) --no-deps -r requirements/bench.txt
	@touch $@

bench: $(VENV)/.installed $(VENV)/.bench
	$(BIN)/codir-fast bench --shape all --sweep K B --train_step 120 --out benchmarks/results/$(or $(OUT),mine)

static-gpu: $(VENV)/.installed
	$(BIN)/python csrc/static_gate.py --out $(or $(OUT),build/static-gpu)
	$(BIN)/python -m codir_fast.kernels.static_gate --out $(or $(OUT),build/static-gpu)

# On a machine with a GPU: built for its own Python and torch, into a folder that only these two look into.
GPU_BUILD := build/gpu
THEIR_PYTHON = $(abspath $(shell command -v $(PYTHON)))
WORKERS := 16
GPU_ENV := PYTHONPATH=$(abspath $(GPU_BUILD))
# What the CUDA runtime asks the driver in vain is no error: PyTorch raises those that are.
SANITIZER := compute-sanitizer --error-exitcode 1 --tool
MEMCHECK := memcheck --report-api-errors no

.PHONY: gpu
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  f"torch {torch.__version__} of {sys.executable} sees no CUDA GPU: give another with PYTHON=...")'
	@$(PYTHON) -c 'import sys; from importlib import metadata; \
	  found = next((d.version for d in metadata.distributions(name="setuptools")), "no"); \
	  sys.exit(None if found != "no" and int(found.split(".")[0]) >= 77 else \
	  f"{sys.executable} has {found} setuptools: the build needs setuptools>=77")'

$(GPU_BUILD)/.installed: $(BUILD_FILES) $(wildcard codir_fast/*.py codir_fast/*/*.py kernels/*.py benchmarks/*.py benchmarks/*/*.py)
	rm -rf $(GPU_BUILD)
	$(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --target $(GPU_BUILD) .
	@git describe --always --dirty >$(GPU_BUILD)/codir_fast/benchmarks/commit 2>/dev/null || true
	@touch $@

# At most $(1) seconds of the command $(3) in the environment $(2), and of all that it starts, which
# Ctrl-C ends too: timeout has taken them out of its reach.
limited = { $(2) timeout -k 10 $(1) $(3) & pid=$$!; \
  trap 'kill $$pid; wait $$pid; exit 130' INT TERM; wait $$pid; }

# What a run finds, written as it goes: in benchmarks/results, or where OUT is an absolute path.
GPU_OUT = $(if $(filter /%,$(OUT)),$(OUT),$(abspath benchmarks/results)/$(or $(OUT),gpu))
# Workers are as many as there are cores: torch.compile starts none of its own.
GPU_PYTEST = $(call limited,$(1),$(GPU_ENV) TORCHINDUCTOR_COMPILE_THREADS=1 CODIR_FAST_GPU_TEST_LOG=$(GPU_OUT)/tests.jsonl $(4),\
  $(2) $(THEIR_PYTHON) -m pytest -q $(3)) || failed="$$failed, $(strip $(2) $(3))"
# Seconds that a part may take, and its tests.
gpu_part = $(call GPU_PYTEST,$(1),,$$workers $(2))
# The address of each allocation is checked only where PyTorch makes no large ones to cut up.
gpu_sanitize = $(call GPU_PYTEST,150,$(SANITIZER) $(1),test_sanitizer.py $(2),\
  CODIR_FAST_GPU_TEST_SECONDS=120 PYTORCH_NO_CUDA_MEMORY_CACHING=1)

# Kernels compile on first use: several processes share the GPU where pytest-xdist is there, and a
# new one comes for each that a kernel ended, as often. What tells most comes first: QUICK=1 is that
# alone, REST=1 the other tests and SANITIZE=1 compute-sanitizer's checks; they add to QUICK's log.
test-gpu: gpu $(GPU_BUILD)/.installed
	@mkdir -p $(GPU_OUT) && cd tests/gpu$(if $(REST)$(SANITIZE),, && rm -f $(GPU_OUT)/tests.jsonl); failed=; \
	workers=$$($(THEIR_PYTHON) -c 'import xdist' 2>/dev/null && \
	  printf %s "-n $(WORKERS) --max-worker-restart $(WORKERS)"); set -x; \
	$(if $(REST)$(SANITIZE),,$(call gpu_part,120,test_sanitizer.py); \
	$(call gpu_part,180,test_named_shapes.py); \
	$(call gpu_part,150,test_cuda.py test_loss.py test_in_batch.py);) \
	$(if $(QUICK)$(SANITIZE),,$(call gpu_part,120,test_launches.py test_pool_and_update.py); \
	$(call gpu_part,300,test_contrast.py);) \
	$(if $(QUICK)$(REST),,if $(SANITIZER) $(MEMCHECK) $(THEIR_PYTHON) -c 'import torch; torch.ones(1).cuda()' >/dev/null 2>&1; then \
	  $(call gpu_sanitize,$(MEMCHECK)); \
	  $(call gpu_sanitize,racecheck); \
	  $(call gpu_sanitize,synccheck,-k cuda); \
	else echo "compute-sanitizer is not there or does not work on this machine: its checks were not run"; fi;) \
	set +x; [ -z "$$failed" ] || { echo "test-gpu: failed or out of time$$failed; see $(GPU_OUT)/tests.jsonl" >&2; exit 1; }

# Quick: ours and what any user would write, at each shape.
QUICK_BENCH := --peers codir_fast-triton codir_fast-triton-graph codir_fast-cuda-graph codir_fast-graph eager eager-graph \
  gathered gathered-graph --budget 0.2
BENCH_SECONDS := $(if $(QUICK),270,480)
# All is compiled first, by several processes; then the named shapes are timed, and after them the
# curve, each written at once. Nothing compiles any more then: what takes half a minute hangs.
bench-gpu: gpu $(GPU_BUILD)/.installed
	cd $(GPU_BUILD) && $(call limited,$(BENCH_SECONDS),,$(THEIR_PYTHON) -m codir_fast bench --device cuda --limit 30 \
	  --shape $(or $(SHAPE),all) $(if $(QUICK),$(QUICK_BENCH),--sweep K --budget 0.2) --out $(GPU_OUT)) || { code=$$?; \
	  [ $$code -ne 124 ] || echo "bench-gpu: out of time; what was timed until then is in $(GPU_OUT)" >&2; exit $$code; }

# The hand-written kernel of bank_contrast beside Triton's, on a Hopper GPU.
backends-gpu: gpu $(GPU_BUILD)/.installed
	cd $(GPU_BUILD) && $(call limited,$(BENCH_SECONDS),,$(THEIR_PYTHON) -m codir_fast.benchmarks.backends \
	  $(if $(QUICK),--quick) --out $(GPU_OUT))

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy codir_fast

format: $(VENV)/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info codir_fast/*.so $(VENV)
