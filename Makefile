# `make help` lists the targets. The first one that needs it makes an environment in .venv and installs into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= gpu-check
DEVICE ?= cuda

.DEFAULT_GOAL := help
.PHONY: help install format lint typecheck test test-all test-oldest test-lmms-eval quickstart quickstart-lavi quickstart-concat quickstart-beside digits real lab lab-variants lab-gpu lab-large tensorboard tables verify-claims compare visor-scenes busy dataloader mutants gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed ## make the environment and install lavi into it

format: install ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

lint: install ## check format and style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install ## check types
	$(BIN)/mypy

test: install ## run the tests (ten to twenty minutes on two cores)
	$(BIN)/pytest -n 2

test-all: install ## run the tests that train, too
	$(BIN)/pytest -n 2 -m 'not gpu'

OLDEST := $(VENV)/oldest

test-oldest: ## run the tests with the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	$(OLDEST)/bin/python -m pytest -n 2 -p no:cacheprovider

HARNESS := $(VENV)/lmms-eval

test-lmms-eval: ## run the adapter's tests with lmms-eval itself, in an environment of its own (it wants an older PyAV than lavi)
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/pip install --quiet --disable-pip-version-check uv
	echo 'av>=17' > $(HARNESS)/overrides.txt
	$(HARNESS)/bin/uv pip install --quiet --python $(HARNESS)/bin/python --override $(HARNESS)/overrides.txt --editable '.[dev,lmms-eval]'
	$(HARNESS)/bin/python -m pytest -p no:cacheprovider tests/test_lmms_eval.py

# A run of recipe $(1) in folder $(2), with changes $(3) to it. One that was stopped goes on, a finished one is kept (with
# the recipe it had): remove its folder to train anew. One that was killed before its first checkpoint holds nothing yet.
begin-run = rm -f $(2)/* 2>/dev/null; rmdir $(2) 2>/dev/null; $(BIN)/python -m lavi.fit --recipe $(1) --run $(2) $(3)
trained-run = @echo "$(2) is trained: remove it to train anew"
begin-or-keep = $(if $(wildcard $(2)/trained.safetensors),$(call trained-run,$(1),$(2)),$(call begin-run,$(1),$(2),$(3)))
run-or-resume = $(if $(wildcard $(2)/last.ckpt),$(BIN)/python -m lavi.fit --resume $(2),$(call begin-or-keep,$(1),$(2),$(3)))

# The tower is frozen and the same for both: each scene passes it once. Features need no process of their own to be read, and
# scenes are small: more threads that decode them take cores from the tower.
SCENE_FEATURES := data/scenes-features
scenes-run = $(call run-or-resume,$(1),$(2),$(foreach split,train validation,data.$(split)=$(SCENE_FEATURES)/$(split)) data.workers=0)

# Small models gain little from a second core: together the two take less time than one after the other. LaVi's lines are
# on the terminal, concatenation's in a file.
half-the-threads = import torch; print(max(1, torch.get_num_threads() // 2))

quickstart: install ## draw data, train LaVi and concatenation, set them side by side (two to four minutes on two cores; stopped, it goes on)
	$(BIN)/python -m datamodules.scenes --out data/scenes
	$(BIN)/python -m lavi.cache_features --recipe recipes/quickstart.yaml --out $(SCENE_FEATURES) --splits train validation --batch-size 64 --threads 1
	OMP_NUM_THREADS=$$($(BIN)/python -c '$(half-the-threads)') $(MAKE) --no-print-directory --jobs 2 quickstart-lavi quickstart-beside
	$(BIN)/python -m lavi.evaluate --checkpoint runs/quickstart runs/concat

quickstart-lavi:
	$(call scenes-run,recipes/quickstart.yaml,runs/quickstart)

quickstart-concat:
	$(call scenes-run,recipes/scenes/concat.yaml,runs/concat)

quickstart-beside:
	@mkdir -p runs && echo "concatenation beside it: runs/concat.log"
	@$(MAKE) --no-print-directory quickstart-concat >> runs/concat.log 2>&1 || { tail -n 5 runs/concat.log; echo "concatenation stopped: runs/concat.log"; exit 1; }

digits: install ## your own data, shown on real scans: write, pack, train, score
	test -d data/digits || $(BIN)/python -m datamodules.digits --out data/digits
	for split in train validation test; do \
	  $(BIN)/python -m datamodules.pack --json data/digits/$$split.json \
	    --images data/digits/images --out data/digits/shards/$$split --per-shard 500 || exit 1; done
	$(call run-or-resume,recipes/digits.yaml,runs/digits)
	$(BIN)/python -m lavi.evaluate --checkpoint runs/digits

# The tower is frozen and the same for all: each photograph passes it once.
REAL_FEATURES := data/photographs-features
real-run = $(call run-or-resume,recipes/real/$(1).yaml,runs/real-$(1),$(foreach split,train validation test,data.$(split)=$(REAL_FEATURES)/$(split)))

real: install ## a released language model learns to see photographs: fetch, train three fusions, score (37 minutes on two quiet cores)
	$(BIN)/python -m lavi.parts fetch
	$(BIN)/python -m datamodules.photographs
	$(BIN)/python -m lavi.cache_features --recipe recipes/real/lavi.yaml --out $(REAL_FEATURES) --splits train validation test
	$(call real-run,lavi)
	$(call real-run,cross_attention)
	$(call real-run,concat)
	$(BIN)/python benchmarks/real.py --out benchmarks/results/real.jsonl

LAB_SCENES := --train 40000 --validation 400 --test 1600 --turns 8 --even
LAB_VIDEOS := --train 24000 --validation 200 --test 1600 --turns 6
LAB_QUESTIONS := --train 4000 --validation 1 --test 1 --turns 1 --even --seed 1
lab-features = $(BIN)/python -m lavi.cache_features --recipe recipes/lab/$(1).yaml --out $(2) --splits $(or $(3),train validation test)

lab = $(BIN)/python benchmarks/lab.py --out benchmarks/results/lab.jsonl

.PHONY: lab-scenes
lab-scenes: install
	$(BIN)/python -m datamodules.scenes --out data/lab $(LAB_SCENES)
	$(call lab-features,lavi,data/lab-features)

lab: lab-scenes ## accuracy against cost: concatenation, LaVi, VISOR, cross-attention on scenes and videos (three to four hours on two cores; stopped, it goes on)
	$(BIN)/python -m datamodules.moving --out data/lab-videos $(LAB_VIDEOS)
	$(call lab-features,video_lavi,data/lab-videos-features)
	$(BIN)/python -m datamodules.scenes --out data/lab-single $(LAB_QUESTIONS)
	$(call lab-features,visor,data/lab-single-features,train data.train=data/lab-single/train)
	$(lab) --processes 2
	$(lab) --time --picture docs/lab.png

lab-variants: lab-scenes ## what varies them: generators, targets, reducers, towers that merge tokens (five hours on two cores; stopped, it goes on)
	$(call lab-features,merged,data/lab-merged-features)
	$(lab) --part variants --processes 2
	$(lab) --time --picture docs/lab.png

LAB_GPU := lab-gpu

lab-gpu: lab-scenes ## the fusions with one seed each on a GPU, begun within eight minutes beside drawing the scenes (stopped, it goes on)
	mkdir -p $(LAB_GPU)
	$(BIN)/python benchmarks/lab.py --out $(LAB_GPU)/lab.jsonl --minutes 8 --seeds 0 --shares 1 \
	  --methods LaVi concatenation VISOR cross-attention
	$(BIN)/python benchmarks/lab.py --out $(LAB_GPU)/lab.jsonl --time --picture $(LAB_GPU)/lab.png

LAB_LARGE := --train 24000 --validation 400 --test 1600 --turns 8 --even --large

lab-large: install ## large pictures: LaVi and VISOR on all tiles beside concatenation, then with encoders that cost less (five hours on two cores; stopped, it goes on)
	$(BIN)/python -m datamodules.scenes --out data/lab-large $(LAB_LARGE)
	$(call lab-features,large,data/lab-large-features)
	$(call lab-features,large_levels,data/lab-large-levels-features)
	$(lab) --part large
	$(BIN)/python benchmarks/hybrids.py --out benchmarks/results/hybrids.jsonl --picture docs/hybrids.png

tensorboard: install ## look at all runs
	@echo "efficiency curves: http://localhost:6006/#custom_scalars"
	$(BIN)/tensorboard --logdir runs

tables: install ## write the README's tables from benchmarks/results
	$(BIN)/python benchmarks/tables.py

verify-claims: install ## LaVi-7B against LLaVA-OneVision-7B: do -94 % FLOPs, 3.1x and half the memory hold? (minutes)
	$(BIN)/python benchmarks/verify_claims.py --out benchmarks/results/verify_claims.jsonl

compare: install ## all methods against LLaVA-OneVision-0.5B: FLOPs, ceilings, time, memory, accuracy in the lab (minutes)
	$(BIN)/python benchmarks/compare.py --out benchmarks/results/compare.jsonl

# To train anew: remove runs/visor-scenes-* and data/visor-scenes.
visor-run = $(call run-or-resume,recipes/visor/scenes_$(1).yaml,runs/visor-scenes-$(subst _,-,$(1)))

visor-scenes: install ## train VISOR and concatenation on the scenes, and score them (two hours on two cores; stopped, it goes on)
	$(BIN)/python -m datamodules.scenes --out data/scenes
	$(BIN)/python -m datamodules.scenes --out data/scenes-single --turns 1 --test 4000
	$(call visor-run,concat)
	$(call visor-run,concat_longer)
	$(call visor-run,cross)
	$(call visor-run,refining)
	$(call visor-run,refining_both)
	$(call visor-run,stage1)
	$(call visor-run,universal)
	$(BIN)/python -m lavi.visor search --checkpoint runs/visor-scenes-universal --out data/visor-scenes/viable.json --keep 0.5
	$(BIN)/python -m lavi.visor label --checkpoint runs/visor-scenes-universal --configurations data/visor-scenes/viable.json \
	  --by likely --keep 0.8 --out data/visor-scenes/labels.jsonl data.train=data/scenes-single/train
	$(call visor-run,router)
	$(BIN)/python benchmarks/visor_scenes.py --out benchmarks/results/visor_scenes.jsonl

busy: install ## do ratios of times hold beside two busy processes? (a minute or two; the machine should have nothing else to do)
	$(BIN)/python benchmarks/busy.py --out benchmarks/results/busy.jsonl

dataloader: install ## is the data module a bottleneck? ratios to bare loops and other pipelines (seven minutes)
	$(BIN)/python benchmarks/dataloader.py --samples 1000 --out benchmarks/results/dataloader.jsonl

mutants: install ## do the tests notice a fault? small ones are planted in each module (about an hour on two cores; stopped, it goes on)
	$(BIN)/python benchmarks/mutants.py

gpu-check: ## on a machine with a GPU and its own Python: GPU tests and benchmarks, records into OUT=folder (DEVICE=cpu: small)
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT) --device $(DEVICE)

clean: ## remove what this Makefile made, except data and runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
