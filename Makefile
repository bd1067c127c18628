SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# `=` and not `?=`: a DATA or OUT that happens to be in the environment must not change a run.
RECIPE = recipes/quickstart.yaml
DATA =
WEIGHTS =
OUT =
SET =
ARGS =
RANKS = 1
NODES = 1
HEAD =
BUNDLE = runs/quickstart/bundle
RUN = runs/quickstart
BASELINE = baselines
SEARCH = recipes/search/quickstart.yaml
STORAGE =
PYTHON =
VENV = .venv

# make passes any name on; one that is unknown here would change nothing, in silence.
VARIABLES = RECIPE DATA WEIGHTS OUT SET ARGS RANKS NODES HEAD BUNDLE RUN BASELINE SEARCH STORAGE PYTHON VENV
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(filter-out $(VARIABLES) MAKE% SHELL .SHELLFLAGS,$(GIVEN))
ifneq ($(UNKNOWN),)
$(error $(UNKNOWN): no such variable; known, in capitals: $(VARIABLES))
endif

# A value as one word of the shell, whatever quotes, spaces and $ are in it.
quoted = '$(subst ','\'',$(value $(1)))'
option = $(if $(value $(1)),--$(2) $(call quoted,$(1)))

# The OpenVINO plugin has wheels for x86-64 Linux; without it all works but its provider.
COMMA := ,
EXTRAS := dev$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(COMMA)openvino)

READY := $(VENV)/.ready
BIN := $(VENV)/bin
# Each machine runs the same command; they meet at HEAD, one of them.
ifneq ($(NODES),1)
ifeq ($(HEAD),)
$(error NODES=$(NODES): the machines need a place to meet: HEAD=HOST:29500, one of them)
endif
endif
MEET = $(if $(filter-out 1,$(NODES)),--nnodes=$(NODES) --rdzv-backend=c10d --rdzv-id=compress --rdzv-endpoint=$(call quoted,HEAD),--standalone)
LAUNCH = $(if $(filter-out 1,$(RANKS) $(NODES)),$(BIN)/torchrun $(MEET) --nproc-per-node=$(RANKS) --no-python) $(BIN)/compress
EXIT_CODES = 1: a target is missed, 2: something to correct above, 70: a crash, 130: interrupted

.PHONY: help setup init compress test acceptance check bench report search names zoo overhead latency providers results recovery gate trials elsewhere fuzz clean

help: ## list the targets and their variables
	@awk -F ' ## ' '/^[a-z]+:.* ## / { split($$1, target, ":"); printf "  make %-10s %s\n", target[1], $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv and install the tested versions (PYTHON=python3.12)

init: $(READY) ## write a recipe for your network and images (WEIGHTS= DATA= ARGS="--arch timm:NAME -o mine.yaml")
	@$(BIN)/compress init $(call option,WEIGHTS,weights) $(call option,DATA,data) $(ARGS)

compress: $(READY) ## run a recipe (RECIPE= DATA= WEIGHTS= OUT= SET="path=value ..." RANKS=8 NODES=2 HEAD=host:29500 ARGS="--trust-code -v")
	@$(LAUNCH) run $(call quoted,RECIPE) $(call option,DATA,data) $(call option,WEIGHTS,weights) $(call option,OUT,out) \
		$(foreach item,$(value SET),--set $(call quoted,item)) $(ARGS) \
		|| { code=$$?; echo "compress: exit code $$code ($(EXIT_CODES))" >&2; exit $$code; }

test: $(READY) ## run all tests but the longest (ARGS="-k words")
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not acceptance' $(ARGS)

acceptance: $(READY) ## run the longest tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m acceptance $(ARGS)

check: $(READY) ## format, lint, types, and the quick tests
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not acceptance'

bench: $(READY) ## time a bundle's files in ONNX Runtime (BUNDLE=runs/quickstart/bundle ARGS=...)
	@$(BIN)/python -m export.bench $(call quoted,BUNDLE) $(ARGS)

report: $(READY) ## draw a finished run's report again (RUN=runs/quickstart)
	@$(BIN)/compress report $(call quoted,RUN)

search: $(READY) ## try a recipe's variants and show the best trade-offs (SEARCH= DATA= WEIGHTS= OUT= STORAGE= ARGS='--pick "latency < 5"')
	@$(BIN)/compress search $(call quoted,SEARCH) $(call option,DATA,data) $(call option,WEIGHTS,weights) $(call option,OUT,out) \
		$(call option,STORAGE,storage) $(ARGS)

names: $(READY) ## list the installed libraries' networks for `compress check`
	@PYTHONPATH=tests $(BIN)/python tools/names.py

zoo: $(READY) ## take the smallest network of every family through the chain, renew docs/models.md (ARGS="--seconds 600")
	@PYTHONPATH=tests $(BIN)/python tools/zoo.py $(ARGS)

overhead: $(READY) ## measure what of a training's time is not the model's (DATA=/path/to/images ARGS=...)
	@PYTHONPATH=tests $(BIN)/python tools/loop_overhead.py $(call quoted,DATA) $(ARGS)

latency: $(READY) ## prune untrained networks to fractions of their INT8 time, say how near the clock comes (ARGS="resnet18 --keep 0.5")
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tools/latency_study.py $(ARGS)

providers: $(READY) ## time untrained networks, whole and cut to half, in every provider and arithmetic here (ARGS="resnet50 --cut-in openvino")
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tools/provider_study.py $(ARGS)

results: $(READY) ## run the recipes, write the tables of recipes/README.md (DATA=/folder/of/tin20,bccd,camvid ARGS="quickstart no_training")
	@PYTHONPATH=tests $(BIN)/python tools/results.py $(call option,DATA,data) $(ARGS)

recovery: $(READY) ## cut a trained network, say what each recovery gives (WEIGHTS= DATA= ARGS="torchvision:resnet18 --keep 0.5")
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tools/recovery_study.py $(call option,WEIGHTS,weights) $(call option,DATA,data) $(ARGS)

gate: $(READY) ## judge a bundle against its baseline (BUNDLE= BASELINE=baselines DATA= ARGS="--update-baseline")
	@$(BIN)/python -m export.gate $(call quoted,BUNDLE) --baseline $(call quoted,BASELINE) $(call option,DATA,data) $(ARGS)

trials: $(READY) ## try the gate on a quiet machine and renew the table of docs/gate.md
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tools/trials.py --write

elsewhere: $(READY) ## install the other runtimes and servers that the tests need
	@tools/elsewhere/setup.sh

fuzz: $(READY) ## give a bundle's readers random input, led by coverage (ARGS="--runs 100000 --seconds 600")
	@tools/elsewhere/setup.sh fuzz
	@.elsewhere/fuzz/bin/python tests/fuzz/loop.py $(ARGS)

clean: ## remove caches and build leftovers; runs and .venv stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find compress export tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The first interpreter of 3.11 or newer that can make virtual environments.
define find_python
	for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.13); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python cannot make virtual environments (on Debian: apt install $$(basename "$$python")-venv); looking further" >&2; \
		fi; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "no Python 3.11 or newer with its venv module$(if $(PYTHON), at PYTHON=$(PYTHON)); install one, or name one: make setup PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi
endef

# Large downloads are named as they come; the rest of pip's talk goes to pip.log.
$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
		$(find_python); \
		echo "making $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV): several GB and some minutes the first time"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]' 2>&1 \
		| tee $(VENV)/pip.log | awk '/(Downloading|Using cached) .* MB\)/ { print "  " $$0; fflush() } /^Installing/ { print "  Installing"; fflush() }' \
		|| { grep -i -A 20 error $(VENV)/pip.log >&2 || tail -20 $(VENV)/pip.log >&2; echo "pip failed; all it said is in $(VENV)/pip.log" >&2; exit 1; }
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "  a GPU is here: onnxruntime-gpu takes onnxruntime's place (both at once overwrite each other's files)"; \
		$(BIN)/python -m pip uninstall -q -y onnxruntime onnxruntime-gpu 2>/dev/null; \
		$(BIN)/python -m pip install -q --disable-pip-version-check --progress-bar off -c constraints.txt onnxruntime-gpu; \
	fi
	@touch $@
