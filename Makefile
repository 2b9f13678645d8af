# make demo: compile a persona and compare. make test: lint and tests. Both make the environment.
PYTHON ?= python3
BIN := .venv/bin
# llama-cpp-python compiles from source. Without its multimodal library and llama.cpp's own
# programs it has 127 source files to compile instead of 178.
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_APP=OFF
# Built for its own CPU, llama.cpp uses AMX where the CPU names it, and the process ends where the
# system does not permit its use (virtual machines). AVX-512 does as well for batches of this size.
ifneq (,$(shell grep -m1 -o amx_int8 /proc/cpuinfo 2>/dev/null))
CMAKE_ARGS += -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8
endif
SOURCES := pyproject.toml $(wildcard plugin/* converters/* personas/*)

.PHONY: all demo test lint bench clean
all: test

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "pip>=24" "setuptools>=77" wheel
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[demo,dev]" --config-settings editable_mode=strict
	touch $@

# A strict editable install, which mypy can see, links files: new ones need it again.
.venv/linked: .venv/installed $(SOURCES)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e . --config-settings editable_mode=strict
	touch $@

demo: .venv/linked
	$(BIN)/python benchmarks/demo.py

lint: .venv/linked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

bench: .venv/linked
	$(BIN)/python benchmarks/ways.py --docs

clean:
	rm -rf .venv build
