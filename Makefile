# make demo    train two small models with CoDistill-GRPO on real vLLM rollouts
# make test    the whole test suite
# make lint    ruff and mypy
# make bench   time, memory and error of the kernels against every peer; phases of a training step
# Each creates .venv and installs what it needs, once.

PYTHON ?= python3
BIN := .venv/bin
# One process on a GPU, two on a CPU.
PROCESSES ?= $(if $(shell command -v nvidia-smi),1,2)

.PHONY: demo test lint bench clean

demo: .venv/installed
	WORLD_SIZE=$(PROCESSES) $(BIN)/python -m codistill doctor --config configs/demo.yaml $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(PROCESSES) train.py --config configs/demo.yaml $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench kernels $(ARGS)
	$(BIN)/python -m bench step
	$(BIN)/python -m bench report

clean:
	rm -rf .venv build runs kernels/codistill_kernels/*.so *.egg-info

.venv/installed: tools/install.py setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py
	touch $@
