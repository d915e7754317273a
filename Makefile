# Everything a checkout answers. Needs python3 (3.11 to 3.13); a GPU is used where there is one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
MODELS ?= models
NPROCS ?= 2

.PHONY: demo test test-slow bench models lint format clean

# torch first and by its exact version, so that nothing pulls another build in.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"bids_uad needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; call make with PYTHON=python3.12 or the like")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m bids_uad.simulation $(DEMO)/data --healthy 3 --stroke 1 --ms 1 --tumour 1 --seed 7 \
	    --nprocs $(NPROCS)
	$(BIN)/bids_uad $(DEMO)/data $(DEMO)/derivatives participant group --nprocs $(NPROCS) \
	    -d lesions=$(DEMO)/data/derivatives/lesions -w $(DEMO)/work
	@echo
	@echo "Group report:    $(DEMO)/derivatives/group.html"
	@echo "Subject reports: $(DEMO)/derivatives/sub-*.html"

test: $(VENV)/installed lint
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(NPROCS) --dist loadfile

test-slow: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.detectors
	$(BIN)/python -m benchmarks.options

# How the packaged models were made; LABELMAPS is a folder of whole-head *_dseg.nii.gz (SynthSeg's training maps).
models: $(VENV)/installed
	$(BIN)/python -m bids_uad.simulation $(MODELS)/train --healthy 64 --labelmaps $(LABELMAPS) --seed 1 \
	    --derivatives --nprocs $(NPROCS)
	$(BIN)/python -m bids_uad.simulation $(MODELS)/validation --healthy 8 --lesion 8 --labelmaps $(LABELMAPS) --seed 2 \
	    --derivatives --nprocs $(NPROCS)
	for modality in T1w T2w; do \
	    for detector in disyre patchcore intensity; do \
	        $(BIN)/bids_uad $(MODELS)/train $(MODELS)/bundles train --detector $$detector \
	            --modality $$modality --preset lite --random-seed 1 -w $(MODELS)/work && \
	        $(BIN)/bids_uad $(MODELS)/validation $(MODELS)/bundles calibrate --detector $$detector \
	            --modality $$modality --preset lite || exit 1; \
	    done; \
	done

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist
