# Every command a person needs. `make` alone lists them.
PYTHON ?= python3
VENV   ?= .venv
PREFIX ?= /opt/orchestrator
ENGINE ?= $(PREFIX)/engine
DESTDIR ?=
BIN    := $(VENV)/bin
MODEL  ?= /models/qwen2.5-0.5b
JOBS   ?= 4  # more than cores: most of a test is waiting

.DEFAULT_GOAL := help
.PHONY: help venv demo run test check format planted fuzz chaos bench test-gpu engine install uninstall clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(VENV)/.installed  ## the daemon and its tools into .venv, for work on them

$(VENV)/.installed: pyproject.toml orchestrator/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: on Debian, apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv  ## two models share a simulated GPU: a minute, no GPU needed, leaves a picture in demo-output/
	$(BIN)/python -m bench demo

run: venv  ## the daemon in the foreground, on the GPUs it finds (simulated ones where there are none)
	ORCH_GPUS__SOURCE=$${ORCH_GPUS__SOURCE:-auto} $(BIN)/orchestratord serve --config config/orchestrator.yaml

test: venv  ## all tests that need no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: venv  ## ruff, mypy --strict; the import rules and docs-in-sync tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_docs.py

format: venv  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

planted: venv  ## bugs planted in a copy of the allocator, one at a time: which tests catch each (half an hour)
	$(BIN)/python -m tests.policy.planted --jobs $(JOBS)

fuzz: venv  ## the running daemon for MINUTES=10 (SEED=…): raw requests, its OpenAPI document, answers of engines
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

chaos: venv  ## seeded faults of every kind under load, for two hours; a violation says how to replay it
	$(BIN)/python -m bench chaos --seeds 1-24 --minutes 5

bench: venv  ## the names of all measurements
	$(BIN)/python -m bench

test-gpu: venv  ## the tests marked gpu, on a GPU box: real vLLM at ENGINE, serving MODEL, a folder of Qwen2.5-0.5B's shape
	ENGINE_PYTHON=$(ENGINE)/bin/python ENGINE_MODEL=$(MODEL) $(BIN)/python -m pytest -m gpu tests/contract

engine:  ## the engines' own venv at ENGINE=PREFIX/engine: vLLM, then kvcached built against its torch
	$(PYTHON) packaging/build_kvcached.py --check
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --upgrade pip setuptools wheel
	$(ENGINE)/bin/python -m pip install $$($(PYTHON) packaging/engine_pins.py vllm)
	$(ENGINE)/bin/python packaging/build_kvcached.py $$($(PYTHON) packaging/engine_pins.py kvcached)
	$(ENGINE)/bin/python -c 'import torch, vllm, kvcached; print("vllm", vllm.__version__, "torch", torch.__version__)'

install:  ## the daemon as a systemd service, in PREFIX=/opt/orchestrator (DESTDIR= stages it); again: an upgrade
	PYTHON='$(PYTHON)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' sh packaging/service.sh install

uninstall:  ## stop and remove the service and its program, the engines' venv included; config and state stay
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' sh packaging/service.sh uninstall

clean:  ## what was built here
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
