# make train: set up, align, train the obvious alternative from the same base, compare (15 minutes)
# make reproduce: every method, five seeds, the paper's claims (start again to go on)
# make notebooks: run the course, refresh its outputs, print the minutes of each
# make gpu: all that a GPU should be asked, into results/gpu, with a PYTHON that has torch
# make test: set up and run the tests      make test-all: the long ones too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS := OMP_NUM_THREADS=2

.PHONY: train reproduce ablate notebooks gpu test test-all clean

# A half made environment (no pip in it) is made again.
$(BIN)/.runtime: requirements.txt
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(BIN)/.dev: requirements.txt requirements-dev.txt $(BIN)/.runtime
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

train: $(BIN)/.runtime
	$(BIN)/python train.py --out runs/lvrpo
	$(BIN)/python train.py --method unified --base runs/lvrpo --out runs/unified
	$(BIN)/python eval.py --compare runs/lvrpo runs/unified

reproduce: $(BIN)/.runtime
	$(BIN)/python results/reproduce.py

ablate: $(BIN)/.runtime
	for name in group kl reward; do $(BIN)/python results/ablate.py $$name --run runs/lvrpo || exit; done

notebooks: $(BIN)/.dev
	$(THREADS) $(BIN)/python notebooks/run.py

gpu:
	mkdir -p results/gpu
	-$(PYTHON) kernels.py --device cuda > results/gpu/kernels.txt
	-$(PYTHON) results/bench_kernels.py --device cuda > results/gpu/bench_kernels.txt
	-$(PYTHON) results/bench_trl.py --device cuda > results/gpu/step.txt
	-$(PYTHON) results/check_step.py --device cuda > results/gpu/check_step.txt
	$(PYTHON) train.py --device cuda --out runs/gpu
	cp runs/gpu/eval.json runs/gpu/timing.csv runs/gpu/metrics.csv runs/gpu/samples/before_after.png results/gpu

test: $(BIN)/.dev
	$(BIN)/ruff check .
	$(THREADS) $(BIN)/python -m pytest

test-all: $(BIN)/.dev
	$(BIN)/ruff check .
	$(THREADS) $(BIN)/python -m pytest -m "slow or not slow"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
