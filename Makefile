# make demo | slurm-demo | test | test-slow | test-avx2 | test-slurm | gpu-check | lint | docs | docs-check | bench    each sets up .venv by itself
# make test PYTHON=python3.13    in .venv-python3.13, beside the .venv of python3
PYTHON ?= python3
VENV := $(if $(filter python3,$(notdir $(PYTHON))),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# one process per GPU (a power of two, so that it divides the batch of 16), or two on the CPU
NPROC ?= $(shell $(BIN)/python -c "import torch; n = torch.cuda.device_count(); \
	print(max(k for k in (1, 2, 4, 8, 16) if k <= n) if n else 2)" 2>/dev/null)
DEMO := runs/toy

.PHONY: demo demo-says slurm-demo venv test test-slow test-avx2 test-slurm gpu-check lint docs docs-check bench clean

demo: demo-says $(VENV)/.user
	$(BIN)/distseg prepare toy --out data/toy.h5
	$(BIN)/distseg pack data/toy.h5 --out data/toy
	$(BIN)/torchrun --standalone --nproc_per_node=$(NPROC) -m distseg.train preset=toy run_dir=$(DEMO)
	mkdir -p data/toy-pictures  # shards are plain tars
	tar -xf data/toy/val-000000.tar -C data/toy-pictures --wildcards 'val-0000[0-5].jpg'
	$(BIN)/distseg predict $(DEMO) data/toy-pictures --out $(DEMO)/predictions
	@echo "look at $(DEMO)/pictures/curves.png first: does the discriminator stay undecided? then at"
	@echo "$(DEMO)/pictures/samples, $(DEMO)/predictions and $(DEMO)/evaluation.json"

# before the installation, which may last
demo-says:
	@echo "make demo: installs into $(VENV), makes 460 scenes, trains for 240 steps with an adversary (two processes, or one a GPU) and draws."
	@echo "After the installation two to five minutes on two CPU cores with AVX512, up to twice that without ($$(getconf _NPROCESSORS_ONLN) cores here),"
	@echo "less on GPUs; from step 10 on each line says when training ends. Writes data/toy* and $(DEMO), and asks nothing."
	@echo "Ctrl-C stops it, and make demo goes on."

SHARDS ?= data/toy
slurm-demo: $(VENV)/.user  # as root, with Debian's slurmctld slurmd slurm-client munge; SHARDS=DIR: your own
	test -d $(SHARDS) || ($(BIN)/distseg prepare toy --out data/toy.h5 && $(BIN)/distseg pack data/toy.h5 --out data/toy)
	$(BIN)/python -m tests.slurm.cluster tests/slurm/demo.sh $(SHARDS)

venv: $(VENV)/.developer

# two tests at a time, each on up to three processes: most wait for something now and then. One thread each: threads that
# wait for one another spin, which took half of the time of all tests
JOBS ?= 2
test test-slow test-avx2: export OMP_NUM_THREADS = 1
test: $(VENV)/.developer
	$(BIN)/python -m pytest -q --ignore=tests/slurm -n $(JOBS) --dist worksteal

# all that the tests above leave out, on every core: each network exported and compiled, learned by heart, whole runs;
# hours on two cores. Tests of real data are skipped where it is not. SLOW=tests/test_vit.py: of these files
SLOW ?= tests
test-slow: $(VENV)/.developer
	$(BIN)/python -m pytest -q --ignore=tests/slurm -n $(shell getconf _NPROCESSORS_ONLN) --dist worksteal -m slow --durations=20 $(SLOW)

# as a CPU without AVX512 and bf16 computes; on such a CPU it is what `make test` does
test-avx2: $(VENV)/.developer
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -q --ignore=tests/slurm -n $(JOBS) -m 'cpu and not slow'

# a real cluster on this machine; as root, with slurmctld slurmd slurm-client munge from apt-get install
test-slurm: $(VENV)/.developer
	$(BIN)/python -m pytest -v tests/slurm

# on one GPU, in at most 8 minutes: docs/gpu_check.md; by $(PYTHON) itself where it has all that is needed
gpu-check:
	@if $(PYTHON) -m benchmarks.gpu --ready; then $(PYTHON) -m benchmarks.gpu; \
	else $(MAKE) $(VENV)/.developer && $(BIN)/python -m benchmarks.gpu; fi

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.developer  # docs/_build/html/index.html; a broken link or reference fails
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html

docs-check: $(VENV)/.developer  # runs what the pages say, in minutes; PAGES="training losses": these alone
	$(BIN)/python -m docs.check $(PAGES)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[pretrained]'
	@touch $@

$(VENV)/.developer: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[pretrained,deepspeed,dev]'
	@touch $(VENV)/.user $@

bench: $(VENV)/.developer  # half an hour on two CPU cores
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.loop
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.comm
	$(BIN)/python -m benchmarks.scaling

clean:
	rm -rf .venv .venv-* docs/_build $(DEMO) data/toy data/toy.h5 data/toy-pictures
