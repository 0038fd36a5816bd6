# Every target is what a person could type by hand. The environment is .venv; a second run reuses it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do $$p -c '' 2>&- && echo $$p && exit; done; echo python3)
BIN := .venv/bin
ARGS ?=
# tests/conftest.py makes the groups; ARGS='-n 4' takes more cores, ARGS='-n 0' one process
ON_TWO_CORES := -n 2 --dist loadgroup

.PHONY: serve test test-fast test-next check bench docs support vendor doctor wheel clean

serve: .venv/.runtime      ## serve the embedded demo model, or: make serve ARGS='MODEL --port 8100 ...'
	$(BIN)/whipstaff serve $(ARGS)

doctor: .venv/.runtime     ## show that every site of the model obeys an edit, in the mode it would be served in
	$(BIN)/whipstaff doctor $(ARGS)

test: .venv/.dev           ## all tests, real engines included
	$(BIN)/python -m pytest $(ON_TWO_CORES) $(ARGS)

test-fast: .venv/.dev      ## the tests that start neither an engine nor a server
	$(BIN)/python -m pytest $(ON_TWO_CORES) -m 'not engine' $(ARGS)

test-next: .venv/.dev      ## the engine tests over the newest supported vLLM: its Python files, the lock's compiled CPU library
	test -d .venv/next || $(BIN)/python requirements/next_vllm.py .venv/next
	PYTHONPATH=.venv/next VLLM_TARGET_DEVICE=cpu $(BIN)/python -m pytest $(ON_TWO_CORES) -m engine tests/server/engine $(ARGS)

check: .venv/.dev          ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev           ## what is generated in docs/: the picture of the rooms, the HTTP reference, the errors
	$(BIN)/python docs/draw.py
	$(BIN)/python docs/reference.py

support: .venv/.dev        ## docs/models.md: which sites each architecture of the installed vLLM shows; ARGS=NAME tries one anew
	$(BIN)/python docs/support.py $(ARGS)

vendor: .venv/.runtime     ## the libraries of the playground's page, anew from npm by server/playground/package-lock.json
	$(BIN)/python -m whipstaff.server.playground.vendor

bench: .venv/.runtime      ## ratios against stock vLLM and transformers, as JSON lines
	$(BIN)/python benchmarks/serving.py $(ARGS)

wheel: .venv/.dev          ## dist/*.whl with both libraries, for machines without compilers; ARGS=--cpu-only needs no nvcc
	$(BIN)/python requirements/wheel.py $(ARGS)

clean:                     ## remove the environment and everything built
	rm -rf .venv build whipstaff.egg-info cuda_ext/*.so

# install.py says what the machine lacks before it downloads anything. A CPU environment loads no CUDA library, so none is
# built here; cuda_ext/check_cuda_build.sh compiles it.
.venv/.runtime: requirements/cpu.lock requirements/install.py setup.py pyproject.toml $(wildcard cuda_ext/csrc/*)
	$(PYTHON) requirements/install.py
	touch $@

.venv/.dev: requirements/dev.lock .venv/.runtime
	$(PYTHON) requirements/install.py --dev --packages-only
	touch $@
