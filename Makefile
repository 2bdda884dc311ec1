# Set-up, tests and demo of codir_fast. Every target sets up what it needs in .venv; a second run finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/simd/* tests/csrc/*.cpp tests/csrc/*.h)
BUILD_FILES := $(wildcard csrc/*.* csrc/simd/*) CMakeLists.txt setup.py pyproject.toml

.PHONY: help install demo test ctest lint format clean

help:
	@echo "make install   .venv with pinned packages, codir_fast built into it"
	@echo "make demo      fine-tune a teacher on real text, distil two students, compare them (QUICK=1: a subset)"
	@echo "make test      the Python tests"
	@echo "make ctest     the C++ tests, without Python or torch"
	@echo "make lint      style, formatting and types; make format mends the first two"
	@echo "make clean     remove builds and .venv, keep runs/"

$(VENV)/.torch: requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "codir_fast needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1); give one with PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) can't make a virtual environment; install its venv package (python3-venv)"; exit 1; }
	$(PIP) install -r requirements/torch.txt
	@touch $@

$(VENV)/.packages: requirements/dev.txt $(VENV)/.torch
	$(PIP) install -r requirements/torch.txt -r requirements/dev.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.packages $(BUILD_FILES)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.demo: requirements/demo.txt $(VENV)/.packages
	$(PIP) install --no-deps --require-hashes -r requirements/demo.txt
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/python examples/demo.py $(if $(QUICK),--quick)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

ctest: $(VENV)/.packages
	$(BIN)/cmake -G Ninja -S . -B build/ctest -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCODIR_FAST_BUILD_EXTENSION=OFF -DCODIR_FAST_BUILD_TESTS=ON
	$(BIN)/cmake --build build/ctest
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

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
