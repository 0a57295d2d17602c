# `make demo` and `make test` set up .venv by themselves; `make dev` is the quick loop of a developer.
PYTHON ?= python3
DEV_PYTHON ?= $(PYTHON)

.PHONY: dev
dev:  ## builds the libraries into python/sparsekit, for PYTHONPATH=python
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$(command -v $(DEV_PYTHON)) > build/dev-configure.log || (cat build/dev-configure.log; false)
	cmake --build build/dev -j 2
	cp build/dev/_sparsekit*.so python/sparsekit/
