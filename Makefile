# make train: set up, align, train the obvious alternative from the same base, compare
# make reproduce: every method, five seeds, the paper's claims (97 minutes on two cores; start again to go on)
# make notebooks: run the course, refresh its outputs, print the minutes of each (4 minutes)
# make gpu: all that a GPU should be asked, into results/gpu, with a PYTHON that has torch (written for 8 minutes, never run yet)
# make test: set up and run the tests      make test-all: the long ones too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS := OMP_NUM_THREADS=2

.PHONY: train reproduce ablate notebooks gpu test test-all clean

$(BIN)/.runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
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
	for name in group kl reward pairs; do $(BIN)/python eval.py --run runs/lvrpo --ablate $$name || exit; done

notebooks: $(BIN)/.dev
	$(THREADS) $(BIN)/python notebooks/run.py

gpu:
	mkdir -p results/gpu
	-$(PYTHON) kernels.py --device cuda > results/gpu/kernels.txt
	-$(PYTHON) results/bench_trl.py --device cuda > results/gpu/step.txt
	$(PYTHON) train.py --device cuda --out runs/gpu
	cp runs/gpu/eval.json runs/gpu/timing.csv runs/gpu/metrics.csv runs/gpu/curves.png runs/gpu/samples/before_after.png results/gpu

test: $(BIN)/.dev
	$(BIN)/ruff check .
	$(THREADS) $(BIN)/python -m pytest

test-all: $(BIN)/.dev
	$(BIN)/ruff check .
	$(THREADS) $(BIN)/python -m pytest -m "slow or not slow"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
