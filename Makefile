# Everything from a fresh clone. Needs python3.11 or newer, make and git; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN := runs/digits
CONFIG := configs/experiment/digits.yaml

.PHONY: help install demo demo-data test lint bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version), expected Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@# torch in a step of its own, by its exact version: a range would take the newest CUDA build, gigabytes large
	$(PIP) setuptools torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --no-build-isolation --editable '.[demo,notebook,lora,dev]'
	@touch $@

install: $(VENV)/.installed  ## Create .venv with pinned versions

data/digits/.written: $(VENV)/.installed
	$(BIN)/python -m lightning_vlm.data.synthetic data/digits
	@touch $@

demo-data: data/digits/.written  ## Write the digits demo data

demo: data/digits/.written  ## Train on digits, evaluate on held-out scans, leave a run folder
	$(BIN)/lightning-vlm check --config $(CONFIG)
	$(BIN)/lightning-vlm plan --config $(CONFIG)
	$(BIN)/lightning-vlm fit --config $(CONFIG)
	$(BIN)/lightning-vlm test --config $(CONFIG) --ckpt_path $(RUN)/checkpoints/last.ckpt
	@echo "Open $(RUN)/predictions_test.html"

test: $(VENV)/.installed  ## Run the tests
	@# two processes of one thread each: the suite's tensors are tiny, and threads only get in each other's way
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## Measure the claims, each beside its peer
	$(BIN)/python benchmarks/loss_head.py
	$(BIN)/python benchmarks/image_path.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/video_memory.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/strategies.py

clean:  ## Remove the environment, data and runs
	rm -rf $(VENV) data runs
