# make demo    train two small models with CoDistill-GRPO on real vLLM rollouts
# make test    the whole test suite
# make faults  the tests that disturb a run: signals to it, processes that die or hang
# make lint    ruff and mypy
# make bench   time, memory and error of the kernels against every peer; phases of a training step
# make study   the paper's claims at toy scale: the runs that are missing, then docs/study.md
# make docs    the documentation's site, build/docs/index.html
# Each creates .venv and installs what it needs, once; make docs a .venv-docs of its own.

PYTHON ?= python3
BIN := .venv/bin
# One process on a GPU, two on a CPU.
PROCESSES ?= $(if $(shell command -v nvidia-smi),1,2)

# A signal lets the run finish its step and save: torchrun waits for that and passes SIGUSR1 on, too.
TORCHRUN := $(BIN)/torchrun --shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1

.PHONY: demo test faults lint bench study docs clean

demo: .venv/installed
	WORLD_SIZE=$(PROCESSES) $(BIN)/python -m codistill doctor --config configs/demo.yaml $(ARGS)
	OMP_NUM_THREADS=1 $(TORCHRUN) --nproc-per-node $(PROCESSES) train.py --config configs/demo.yaml $(ARGS)

# Two workers, a file of tests on one of them: what its tests share is made once.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

faults: .venv/installed
	$(BIN)/python -m pytest -m "long or not long" tests/codistill/test_signals.py tests/codistill/test_failures.py \
		tests/codistill/test_watching.py tests/codistill/test_saving.py tests/codistill/test_checkpoint.py \
		tests/codistill/test_real_servers.py tests/codistill/test_child.py $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m bench kernels $(ARGS)
	$(BIN)/python -m bench step
	$(BIN)/python -m bench report

study: .venv/installed
	$(BIN)/python -m study run $(ARGS)

docs: .venv-docs/installed
	.venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-docs build runs kernels/codistill_kernels/*.so *.egg-info

.venv/installed: tools/install.py setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python tools/install.py
	touch $@

.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r docs/requirements.txt
	touch $@
