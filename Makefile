# The PyTorch build to install first. On a machine with CUDA: `make demo TORCH=torch DEVICE=gpu`.
TORCH ?= torch==2.13.0
DEVICE ?= cpu
SEED ?= 0
METHODS ?= plain,replay

PYTHON ?= python3
VENV ?= .venv
# The leg with the oldest versions that pyproject.toml allows: an environment of its own.
OLDEST_PYTHON ?= python3.10
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONUNBUFFERED ?= 1

.PHONY: demo test test-all test-oldest lint wheel clean

$(BIN)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@

$(BIN)/.test: $(BIN)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,demo]"
	touch $@

# Train four tasks plainly and with replay on SmolLM2-135M; tables, plots, JSON and CSV in runs/demo.
demo: $(BIN)/.test
	$(BIN)/python examples/assets.py
	$(BIN)/python examples/demo.py --device $(DEVICE) --seed $(SEED) --methods $(METHODS)

# What CI runs: everything but the tests marked slow.
test: $(BIN)/.test
	$(BIN)/python -m pytest -q -m "not slow"

test-all: $(BIN)/.test
	$(BIN)/python -m pytest -q

$(OLDEST)/.test: pyproject.toml .ci/oldest.py
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e ".[test,demo]"
	touch $@

# The same tests with every dependency at its lower bound.
test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python -m pytest -q -m "not slow"

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(BIN)/.test
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) $(OLDEST) build dist runs examples/assets
