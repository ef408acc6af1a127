# Everything runs in .venv, which each target makes where it is missing. Needs Python 3.11+ and nothing else.
PYTHON ?= python3
PORT ?= 50051
BIN := .venv/bin

.PHONY: serve test test-slow bench check format proto clean

serve: .venv/serve.stamp ## a local cluster of the bundled checkpoint; ^C stops it
	@$(BIN)/trimode serve --port $(PORT)

test: .venv/dev.stamp ## everything that needs no system package, no GPU and no network
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: .venv/dev.stamp ## soaks, long fuzzing, containers
	$(BIN)/python -m pytest -m slow --timeout 1800

bench: .venv/serve.stamp ## every mode at every load, on the bundled checkpoint: bench.json and bench.png
	$(BIN)/trimode bench

check: .venv/dev.stamp ## formatter, linter, type checker, proto lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd proto && ../$(BIN)/buf lint

format: .venv/dev.stamp ## apply the formatter and the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/dev.stamp ## regenerate the committed stubs
	$(BIN)/python -m grpc_tools.protoc -Itrimode/proto=proto --python_out=.typing \
		--pyi_out=.typing --grpc_python_out=.typing trimode/proto/inference.proto

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trimode needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv

# A stamp says which set of dependencies is installed; it is older than what it was made from when those change.
.venv/serve.stamp: .venv/bin/python pyproject.toml ci/constraints.txt
	@echo "installing trimode into .venv (a minute or two, once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c ci/constraints.txt -e .
	@touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml ci/constraints.txt
	@echo "installing trimode and its test tools into .venv (a minute or two, once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c ci/constraints.txt -e '.[dev]'
	@touch $@ .venv/serve.stamp
