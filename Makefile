# Duet. `make train` goes from nothing to a trained network and a report; `make test` checks all.

PYTHON ?= python3
VENV   ?= .venv
# Major release of CUDA for torch and DALI: 13 needs a driver from 580 on, 12 one from 525 on. The
# default is what .venv was made for; another one replaces both packages there.
present := $(if $(wildcard $(VENV)/.cuda12),12,13)
CUDA   ?= $(present)
ifeq ($(filter 12 13,$(CUDA)),)
$(error CUDA=$(CUDA): torch and DALI have builds for CUDA 12 and 13)
endif
# The registry's torch is built for CUDA 13; PyTorch's own index has the others. Of torch 2.13 there
# is one for CUDA 12, cu126. A mirror of it, or another build: make TORCH_INDEX=ADDRESS.
TORCH_INDEX ?= $(if $(filter 12,$(CUDA)),https://download.pytorch.org/whl/cu126)

# Your own images: a folder per class, a tar per class, or one tar of either.
TRAIN  ?=
VAL    ?=
HOLDOUT ?= 0.1
# More flags for cluster.train, for example --replicas 2.
FLAGS  ?=
# Times that `make soak` kills something.
KILLS  ?= 50
# More flags for pipeline.build_shards, for example --max-rejects 0.02.
PACK   ?=

ifeq ($(strip $(TRAIN)),)
NAME   ?= demo
CONFIG ?= demo
else
# cifar10/train -> cifar10, images -> images, archive.tar -> archive
folder := $(abspath $(TRAIN))
NAME   ?= $(or $(basename $(filter-out train,$(notdir $(folder)))),$(notdir $(patsubst %/,%,$(dir $(folder)))),own)
CONFIG ?= narrow
endif
DATA   ?= data/$(NAME)
RUN    ?= runs/$(NAME)

py      = $(VENV)/bin/python
# pip is silent: a line every half minute, as long as this shell lives.
install = (while sleep 30 > /dev/null 2>&1 && kill -0 $$$$ 2> /dev/null; do echo 'still installing'; done) & \
	trap "kill $$!" EXIT INT TERM; $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help install train test test-all run-tests quick check lint types pages docs bench soak format clean
.DELETE_ON_ERROR:

help:
	@echo 'make train                        draw a demo set, pack, train, evaluate, report'
	@echo 'make train TRAIN=DIR [VAL=DIR]    the same on your own images (VAL, or HOLDOUT=0.1)'
	@echo '           [CONFIG=narrow] [DATA=data/NAME] [RUN=runs/NAME]'
	@echo '           [FLAGS="flags of cluster.train"], for example --replicas 2'
	@echo '           [PACK="flags of pipeline.build_shards"], for example --max-rejects 0.02'
	@echo 'make install                      only make $(VENV) (CUDA=12 for a driver before 580)'
	@echo 'make test                         lint, types, import rules, tests'
	@echo 'make test-all                     that, and the long tests; half an hour'
	@echo 'make quick                        lint, types, and the tests that start no process'
	@echo 'make docs                         build the pages of docs/ as a site, site/index.html'
	@echo 'make bench                        the quick benchmarks, and what changed since the last time; ten minutes'
	@echo 'make soak                         kill a training [KILLS=50] times; half an hour'
	@echo 'make format                       let ruff format and fix'
	@echo 'make clean                        remove caches (data/, runs/ and .venv stay)'

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and "error: Duet needs Python 3.11 or newer, $(PYTHON) is %d.%d; make PYTHON=python3.11" % v)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

switch := $(if $(wildcard $(VENV)/.installed),$(if $(filter-out $(present),$(CUDA)),switch))
.PHONY: switch

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt $(switch)
	@echo 'installing into $(VENV) for CUDA $(CUDA) (once; some minutes)'
	@$(if $(switch),rm -f $@ && $(py) -m pip uninstall -qq -y torch nvidia-dali-cuda130 nvidia-dali-cuda120)
	@$(if $(filter 12,$(CUDA)),touch,rm -f) $(VENV)/.cuda12
	@$(install) $(if $(strip $(TORCH_INDEX)),--index-url $(TORCH_INDEX)) torch
	@$(install) -e '.[cuda$(CUDA)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(install) -e '.[cuda$(CUDA),dev]'
	@touch $@

install: $(VENV)/.installed

train: $(VENV)/.installed
ifeq ($(strip $(TRAIN)),)
	@echo 'drawing data/demo-images, packing $(DATA), training $(RUN)'
	@$(py) -m pipeline.demo_images data/demo-images
	@$(py) -m pipeline.build_shards $(DATA) --train data/demo-images/train --val data/demo-images/val $(PACK)
else
	@echo 'packing $(TRAIN) into $(DATA), training $(RUN)'
	@$(py) -m pipeline.build_shards $(DATA) --train $(TRAIN) $(if $(strip $(VAL)),--val $(VAL),--holdout $(HOLDOUT)) $(PACK)
endif
	@$(py) -m cluster.train $(CONFIG) --data $(DATA) --run $(RUN) $(FLAGS)
	@$(py) -m cluster.report $(RUN) --evaluate

check: lint types pages

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint Dockerfile

types: $(VENV)/.dev
	$(VENV)/bin/mypy

pages: $(VENV)/.dev
	$(site) --site-dir $(VENV)/site

# Warnings, such as a link that leads nowhere, are errors.
site = NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

docs: $(VENV)/.installed
	@$(install) -e '.[cuda$(CUDA),docs]'
	@$(site)
	@echo 'site/index.html'

# mypy takes a core for more than a minute: the tests run meanwhile.
test: lint
	@$(MAKE) --no-print-directory -j3 types pages run-tests SELECT='-m "not slow" --hypothesis-profile short' THREADS=OMP_NUM_THREADS=1

# With the tests that are marked slow: CONTRIBUTING lists them.
test-all: lint
	@$(MAKE) --no-print-directory -j3 types pages run-tests

THREADS ?= OMP_WAIT_POLICY=passive
run-tests: $(VENV)/.dev
	$(THREADS) $(py) -m pytest -n 3 --no-loadscope-reorder $(SELECT)

# Everything below Ray and below the start of a process: the loop while one writes.
quick: check
	OMP_WAIT_POLICY=passive $(py) -m pytest -n 2 -m "not ray and not slow" --quick -q

# Results lie in runs/benchmarks; BENCH="step loaders" runs these only.
bench: $(VENV)/.installed
	@$(py) benchmarks/run.py $(BENCH) --quick

# Not part of `make test`: half an hour, and it wants a quiet machine.
soak: $(VENV)/.dev
	@$(py) -m tests.end_to_end.soak runs/soak --kills $(KILLS)

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find pipeline model cluster tests -name __pycache__ -prune -exec rm -rf {} +
