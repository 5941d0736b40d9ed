# Every command of the project. All of them first make .venv and install what is pinned.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
#: What training needs, and what tests and measurements need beside it.
BASE := $(VENV)/.installed
STAMP := $(VENV)/.installed-dev

.PHONY: install check check-kernels architecture docs docs-check site train test test-distributed test-single test-slow \
    test-faults test-latest test-gpu test-docker lock lint \
    report study study-kinds language-model theory bench-kernels bench-host bench-zoo bench-data bench-memory \
    bench-checkpoint bench-context bench-loss bench-runtime bench-gpu check-layouts goodput

install: $(STAMP)

# DS_BUILD_OPS=0: DeepSpeed's CUDA extensions are not compiled ahead; none of them is used.
PIP = DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
    --constraint $(CONSTRAINTS) --editable

$(BASE): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "PYTHON ($(PYTHON)) must be Python 3.11 or newer"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) .
	touch $@

$(STAMP): $(BASE)
	$(PIP) '.[dev]'
	touch $@

data/embedded: | $(STAMP)
	$(BIN)/linclip shards make digits $@

# Train the embedded model on handwritten digits, score it zero-shot, print a table.
train: $(BASE)
	$(BIN)/linclip train embedded $(if $(RANKS),--ranks $(RANKS))

# Style, types and the quick tests of one process, in four minutes.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not distributed and not long"; tests=$$?; \
	wait $$types && exit $$tests

# Everything that needs no GPU and is not marked slow: what starts several processes one by one, and
# beside it all that does not, shown at the end. (Two of the first kind at once would wait for each
# other's ranks.)
test: $(STAMP)
	@nice -n 19 $(MAKE) --no-print-directory test-single > $(VENV)/test-single.log 2>&1 & single=$$!; \
	$(MAKE) --no-print-directory test-distributed; distributed=$$?; \
	wait $$single; single=$$?; cat $(VENV)/test-single.log; exit $$((distributed || single))

test-distributed: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and distributed"

test-single: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not distributed"

# The same with the newest versions of everything, in an environment of its own.
test-latest:
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=constraints-latest.txt

# The documentation as a site, in site/: pages of docs/ and the reference of the Python interface.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# docs/configuration.md, from the config dataclasses.
docs: $(STAMP)
	$(BIN)/python -m ds_linclip.config.docs docs/configuration.md

# docs/architecture.md, from the imports; prints the figures of the structure.
architecture: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m helpers.architecture --draw docs/architecture.md

# What the documentation says is so: keys, messages and links, and its commands are run (12 minutes).
docs-check: $(STAMP)
	$(BIN)/python -m pytest tests/test_docs.py tests/integration/test_docs_commands.py -m ""

# Every evaluation on the embedded data, in small, as one page: runs/report/report.html (15 minutes
# on two idle cores).
report: $(STAMP) | data/embedded
	$(BIN)/python -m experiments.report

# The convergence study of docs/experiments.md: 36 runs, 40 minutes on two idle cores. Runs recorded
# in docs/results/convergence are shown and not repeated.
study: $(STAMP) | data/embedded
	$(BIN)/python -m experiments.convergence docs/results/convergence train.global_batch_size=64 train.steps=400

# The same for the kinds of attention, at one length, with parameters and time: 51 runs, half an hour on
# two idle cores.
study-kinds: $(STAMP) | data/embedded
	$(BIN)/python -m experiments.convergence docs/results/zoo/accuracy train.global_batch_size=64 train.steps=200 --design kinds --image-sizes 32

# The statements of docs/theory.md, measured and drawn (under a minute of CPU time).
theory: $(STAMP)
	$(BIN)/python -m experiments.theory

# A causal language model with every attention: bits per byte, recall, speed, memory (20 minutes on two
# idle cores): docs/results/language_model/<device>.
language-model: $(STAMP)
	$(BIN)/python -m experiments.language_model

# Kills, signals, full disks, hangs: all of them; make test has a part (15 minutes).
test-faults: $(STAMP)
	$(BIN)/python -m pytest -m faults

# Counts of the machine code of the training kernels against compiled/ceilings.csv, without a GPU (3
# minutes of CPU time). A change of a count is written with: make check-kernels WRITE=--write
check-kernels: $(STAMP)
	$(BIN)/python -m linclip_kernels.linear_attention.compiled.ceilings $(WRITE)

# The Triton kernels on a real GPU.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# The operator against SDPA on the GPU, or on one CPU core (5 minutes): docs/results/kernels/<device>.
bench-kernels: $(STAMP)
	$(BIN)/python -m benchmarks.attention.bench_attention

# The operator's time on the host, on one CPU core without a GPU (1 minute).
bench-host: $(STAMP)
	$(BIN)/python -m benchmarks.attention.bench_host

# Every kind of attention: parameters, FLOPs, time and memory against softmax, on the GPU or on one CPU
# core (7 minutes): docs/results/zoo/<device>.
bench-zoo: $(STAMP)
	$(BIN)/python -m benchmarks.attention.bench_zoo

# Training data against open_clip_train's loader, 1 worker (10 minutes): docs/results/data/<device>.
bench-data: $(STAMP) | data/embedded
	$(BIN)/python -m benchmarks.data.bench_data

# One tiny model in every parallel layout against the single process, and traffic against the plan
# (10 minutes).
check-layouts: $(STAMP) | data/embedded
	$(BIN)/python -m benchmarks.layouts.check_layouts --out docs/results/layouts

# The tokens of an image over 1, 2, 4 ranks: time, memory and bytes (5 minutes).
bench-context: $(STAMP)
	$(BIN)/python -m benchmarks.context.bench_context

# Peak memory of the loss in tiles and in one piece, up to 32k pairs (15 minutes, 20 GiB).
bench-loss: $(STAMP)
	$(BIN)/python -m benchmarks.bench_loss

# Memory of a rank against the plan, ViT-B/16 on 1 and 4 CPU ranks (15 minutes, 9 GiB):
# docs/results/memory/<device>.
bench-memory: $(STAMP)
	$(BIN)/python -m benchmarks.memory.bench_memory

# Saving and loading against DeepSpeed's own checkpoints, ViT-B/16 on two CPU ranks (5 minutes, 14
# GiB): docs/results/checkpoint/<device>.
bench-checkpoint: $(STAMP)
	$(BIN)/python -m benchmarks.bench_checkpoint

# Training under random kills, two CPU ranks (40 minutes): docs/results/goodput/<device>.
goodput: $(STAMP) | data/embedded
	$(BIN)/python -m benchmarks.goodput

# Layers, blocks and whole towers, softmax against linear attention, over the number of tokens (8
# minutes): docs/results/runtime/<device>.
bench-runtime: $(STAMP)
	$(BIN)/linclip eval runtime

# Every measurement that needs a GPU, in 8 minutes.
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.attention.bench_attention --device cuda --budget-seconds 210
	$(BIN)/linclip eval runtime --device cuda --budget-seconds 180
	$(BIN)/python -m benchmarks.bench_loss --device cuda

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m "hypothesis and not slow" --hypothesis-profile=thorough

# The image: built, run as containers with two nodes (15 minutes, 30 GB of disk for the time). As
# root, with podman, runc, netavark, aardvark-dns, iptables and debootstrap; without a GPU.
test-docker: $(STAMP)
	$(BIN)/python -m pytest tests/docker

# Locked versions: uv.lock; the newest ones in constraints-latest.txt; every wheel of the image with its
# hash, in the versions of constraints.txt.
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --upgrade --no-annotate \
    --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock: $(STAMP)
	$(BIN)/uv lock
	$(BIN)/uv pip compile --quiet --no-annotate --no-header --python-version 3.13 --extra dev \
	    pyproject.toml -o constraints-latest.txt
	$(COMPILE) pyproject.toml --extra eval --extra s3 --constraint constraints.txt -o docker/requirements.lock
	echo 'setuptools>=77' | $(COMPILE) - --constraint docker/requirements.lock -o docker/build.lock

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose*.yaml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/shellcheck -x launch/*.sh launch/*.sbatch .ci/run
	$(BIN)/kubernetes-validate --strict --quiet launch/k8s.yaml
