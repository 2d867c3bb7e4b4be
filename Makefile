# One study, two commands: `make reproduce` and `make test`. `make` alone lists the rest.
PROFILE ?= tiny
MODELS ?=
NB ?=
DRY ?=
PAIRS ?= 5
GPU ?=
GPUS ?=
SAMPLING ?=
TRAINING ?=
ENGINE ?= local
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
# Large pages for tensors: a training step takes a tenth less (glibc only, nothing elsewhere).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
VENV := .venv
PEERS := .venv-peers
VLLM := .venv-vllm
# math-verify's own test cases, which its wheel does not hold; `make test` asks ours of them
CASES := $(VENV)/math-verify/PKG-INFO
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
M2RL := $(BIN)/python -m m2rl_core

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test vllm ray lab report status why estimate clean bench bubblewrap

help: ## show this list
	@echo "usage: make TARGET [PROFILE=tiny] [MODELS=rl-math,rl-if] [NB=3.3]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) bubblewrap ## make .venv with the pinned packages (done by itself when needed)

$(READY): requirements.txt requirements-nodeps.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed: make setup PYTHON=/path/to/it"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --ignore-requires-python -r requirements-nodeps.txt -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (m2rl)" >/dev/null
	@touch $(READY)

bubblewrap:
	@if command -v bwrap >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing bubblewrap, the sandbox for programs that a model wrote"; \
		{ apt-get update -qq && apt-get install -y -qq bubblewrap >/dev/null; } || \
		echo "bubblewrap could not be installed; the restricted interpreter serves instead"; \
	else \
		echo "bubblewrap is missing, so the restricted interpreter serves; to have the sandbox, type:"; \
		echo "  sudo apt-get install bubblewrap"; \
	fi

reproduce: setup $(if $(filter ray,$(ENGINE)),ray) ## run the study, write reports/PROFILE (a part: MODELS= NB=; DRY=1 what is missing; ENGINE=ray a cluster)
	$(M2RL) reproduce --profile "$(PROFILE)" --models "$(MODELS)" --nb "$(NB)" --engine "$(ENGINE)" $(if $(RAY_ADDRESS),--address "$(RAY_ADDRESS)")$(if $(filter-out 0,$(DRY)), --dry)

test: setup ray $(CASES) $(if $(filter Linux,$(shell uname -s)),vllm) ## run all tests
	$(BIN)/python -m pytest

vllm: $(VLLM)/.ready ## make .venv-vllm, where `engine: vllm` runs without a GPU (3 minutes, 3.5 GB)

$(VLLM)/.ready: requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-vllm.txt)"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(CASES): requirements.txt $(READY)
	@rm -rf $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary math-verify --dest $(@D) \
		"$$(sed -n 's/^\(math-verify\)\[.*\]\(==[^ ]*\).*/\1\2/p' requirements.txt)"
	tar -xzf $(@D)/*.tar.gz -C $(@D) --strip-components=1
	@touch $@

ray: $(VENV)/.ready-ray ## add Ray to .venv, for ENGINE=ray (10 seconds, 245 MB; on every node)

$(VENV)/.ready-ray: requirements-ray.txt $(READY)
	$(PIP) -r requirements-ray.txt
	@touch $@

lab: setup ## open JupyterLab on the notebooks
	$(BIN)/python -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

report: setup ## write the HTML pages again from the executed notebooks
	$(M2RL) report --profile "$(PROFILE)"

status: setup ## what is made and what is left
	$(M2RL) status --profile "$(PROFILE)"

why: setup ## why a notebook or a stage would run again (NB=3.3 or NB=rl-math)
	@test -n "$(NB)" || { echo "usage: make why NB=3.3   (a notebook or a stage)"; exit 2; }
	$(M2RL) why "$(NB)" --profile "$(PROFILE)"

estimate: setup ## what PROFILE costs here (or on GPUS=8 of GPU=h100): time, tokens, disk, memory, GPU hours
	$(M2RL) estimate --profile "$(PROFILE)" $(if $(GPU),--gpu "$(GPU)") $(if $(GPUS),--gpus "$(GPUS)") \
		$(if $(SAMPLING),--sampling "$(SAMPLING)") $(if $(TRAINING),--training "$(TRAINING)")

bench: setup $(if $(filter analysis,$(NB)),,$(PEERS)/.ready) $(if $(filter engine,$(NB)),vllm) ## measure against other tools (NB=merge, engine or analysis, PAIRS=5; goes on where it stopped)
	@test "$(NB)" = merge -o "$(NB)" = engine -o "$(NB)" = analysis || { echo "usage: make bench NB=merge PAIRS=5   (or NB=engine, NB=analysis)"; exit 2; }
	$(if $(filter analysis,$(NB)),,$(PEERS)/bin/python tests/golden/make_$(if $(filter merge,$(NB)),mergekit,trl).py --check)
	$(M2RL) bench $(NB) --pairs $(PAIRS)

$(PEERS)/.ready: requirements-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements-peers.txt)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	@touch $@

clean: setup ## remove what was computed for PROFILE (artifacts only; the report stays)
	$(M2RL) clean --profile "$(PROFILE)"
