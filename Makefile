# Every target is what a person could type by hand. The environment is .venv; a second run reuses it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ARGS ?=

.PHONY: serve test test-next check bench doctor clean

serve: .venv/.runtime      ## serve the embedded demo model, or: make serve ARGS='MODEL --port 8100 ...'
	$(BIN)/whipstaff serve $(ARGS)

doctor: .venv/.runtime     ## show that every site of the model obeys an edit, in the mode it would be served in
	$(BIN)/whipstaff doctor $(ARGS)

test: .venv/.dev           ## all tests, real engines included
	$(BIN)/python -m pytest $(ARGS)

test-next: .venv/.dev      ## the engine tests over the newest supported vLLM: its Python files, the lock's compiled CPU library
	test -d .venv/next || $(BIN)/python requirements/next_vllm.py .venv/next
	PYTHONPATH=.venv/next VLLM_TARGET_DEVICE=cpu $(BIN)/python -m pytest -m engine tests/server/engine $(ARGS)

check: .venv/.dev          ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.runtime      ## ratios against stock vLLM and transformers, as JSON lines
	$(BIN)/python benchmarks/serving.py $(ARGS)

clean:                     ## remove the environment and everything built
	rm -rf .venv build whipstaff.egg-info cuda_ext/*.so

# --no-deps: the lock is complete. torch comes from pip's own settings (PyTorch's CPU index, or a folder of wheels). A CPU
# environment loads no CUDA library, so none is built here; cuda_ext/check_cuda_build.sh compiles it.
.venv/.runtime: requirements/cpu.lock setup.py pyproject.toml $(wildcard cuda_ext/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/cpu.lock
	WHIPSTAFF_BUILD_CUDA=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv/.dev: requirements/dev.lock .venv/.runtime
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/dev.lock
	touch $@
