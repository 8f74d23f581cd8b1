# `make demo` and `make test` need Linux (x86-64 or arm64), make and Python >= 3.11, nothing else.
#   PYTHON=python3.12        the Python that .venv is made with (default: the newest found)
#   PIP_ARGS='...'           options for pip install, such as an index with CPU builds of torch
#   DEVICE=cpu               make demo: leave the GPUs alone
#   PYTEST_ARGS='-k ranks'   options for pytest
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-faults check bench clean

# deepspeed looks for its tools on PATH, and a bare .venv/bin/python does not put them there.
IN_VENV := export PATH="$(CURDIR)/.venv/bin:$$PATH" &&
PYTEST := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest

help:
	@echo 'make demo      train, resume, export, evaluate and fine-tune a small model'
	@echo 'make test      the tests, without network'
	@echo 'make test-all  the slow ones too'
	@echo 'make test-faults  runs that meet faults, and hostile files'
	@echo 'make check     ruff (lint and format) and pyright'
	@echo 'make bench     the benchmarks'
	@echo 'make venv      .venv with everything installed; the targets above do it by themselves'
	@echo 'make clean     remove caches and what the demo made; .venv stays'

# Always run: the script returns at once where what is installed matches pyproject.toml.
venv:
	@sh tools/make_venv.sh

demo: venv
	@$(IN_VENV) python launch/demo.py $(if $(DEVICE),--device $(DEVICE))

test: venv
	@$(IN_VENV) $(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: venv
	@$(IN_VENV) $(PYTEST) $(PYTEST_ARGS)

test-faults: venv
	@$(IN_VENV) $(PYTEST) tests/faults tests/crash tests/train/test_signals.py tests/train/test_watch.py \
		tests/train/test_nonfinite.py tests/train/test_run_folder.py tests/train/test_checkpoint_folder.py \
		tests/train/test_starting_again.py tests/test_supervise.py tests/hostile $(PYTEST_ARGS)

check: venv
	@$(IN_VENV) ruff check . && ruff format --check . && pyright

bench: venv
	@$(IN_VENV) python -m benchmarks

clean:
	rm -rf .demo build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
