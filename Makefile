# make demo        install, train on the shapes data set, evaluate, draw (two to five minutes)
# make test        install, lint, run the tests (six to nine minutes on two cores)
# make test-slow   the tests that `make test` leaves out
# make test-tpu    what the TPU's own compiler makes of the programs; no TPU is needed
# make test-consumers  annotations read by the programs that they are made for
# make docs        the pages of docs/ as a site
PYTHON ?= python3
VENV := .venv
VENV_TPU := .venv-tpu
VENV_CONSUMERS := .venv-consumers
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow test-tpu test-consumers lint docs ablations study bench bench-data shapes-clip clean

demo: $(VENV)/.run
	$(RUN) main.py --config=configs/shapes.py --workdir=runs/shapes

test: $(VENV)/.dev lint
	$(RUN) -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m slow

# In an environment of its own, since libtpu is a few hundred MB. K=… picks some, M=slow those of full size.
test-tpu: $(VENV_TPU)/.dev
	$(VENV_TPU)/bin/python -m pytest tests/tpu $(if $(K),-k "$(K)") $(if $(M),-m "$(M)")

# supervision and labelme are in an environment of their own, since Qt and others make it 0.8 GB.
test-consumers: $(VENV)/.dev $(VENV_CONSUMERS)/.dev
	$(RUN) -m pytest tests/annotations/test_consumers.py -s

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# docs/ as a site in build/site; the page of config fields is written anew first.
docs: $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	$(RUN) -m configs.reference
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# The ablations of docs/results.md: every row of every table, three seeds; hours on two cores.
ablations: $(VENV)/.run
	$(RUN) -m rpn_jax sweep all --jobs=2

# docs/study.md: towers, rates, runs, then tables and figures; a day and more on two cores. What has
# ended is kept in docs/study/runs.json, here or on another machine, and is not repeated. On a GPU:
# make study JOBS=16 TOGETHER=24
JOBS ?= 2
TOGETHER ?= 1
study: $(VENV)/.run
	$(RUN) -m rpn_jax sweep all --config=configs/study.py --tune-lr --tune-steps=1000 \
	  --jobs=$(JOBS) --together=$(TOGETHER) \
	  --root=runs/study --keep=docs/study/runs.json --config.steps=3000 --config.eval_every=1000
	mkdir -p runs/study/towers/base  # whose weights are shipped
	for tower in runs/study/towers/*; do \
	  clip=$$tower/clip.safetensors; test $$(basename $$tower) != base || clip=shapes_clip.safetensors; \
	  test -f $$tower/locality.json || \
	    $(RUN) -m rpn_jax locality --clip=$$clip --json=$$tower/locality.json || exit 1; \
	done
	$(RUN) -m rpn_jax study docs/study/runs.json

# Speed and memory of the networks; TORCH=a Python that has torch, OPENVINO=one that has openvino,
# too, to compare with.
bench: $(VENV)/.run
	$(RUN) -m benchmarks.speed --torch=$(TORCH) --openvino=$(OPENVINO) --rounds=3 --seconds=5
	$(RUN) -m benchmarks.speed --torch=$(TORCH) --openvino=$(OPENVINO) --rounds=3 --seconds=5 --dtype=bfloat16
	$(RUN) -m benchmarks.speed --torch=$(TORCH) --cases=voc_l14 --batches=1 --what=train --seconds=5
	$(RUN) -m benchmarks.cat_seg --torch=$(TORCH) --seconds=5
	$(RUN) -m benchmarks.first_picture

# Speed of the training pipeline on generated pictures of VOC's size.
bench-data: $(VENV)/.run
	$(RUN) -m benchmarks.data

# The shipped weights of the shapes data set: half an hour or more on two cores.
shapes-clip: $(VENV)/.run
	$(RUN) main.py --config=configs/shapes_clip.py --workdir=runs/shapes_clip

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	@echo "Installing the packages (a minute or two) ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV_TPU)/.dev: requirements.txt
	$(PYTHON) -m venv $(VENV_TPU)
	$(VENV_TPU)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest "jax[tpu]"
	@touch $@

$(VENV_CONSUMERS)/.dev: requirements-consumers.txt
	$(PYTHON) -m venv $(VENV_CONSUMERS)
	$(VENV_CONSUMERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-consumers.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) data runs
