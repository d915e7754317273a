"""Methods text for each preprocessing pathway and model: sentences that must and must not occur."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bids_uad.preprocessing.brain_extraction.masks import PROGRAMS
from bids_uad.reports.bibliography import cited_keys
from bids_uad.reports.boilerplate import UsedModel, bibliography, methods_text
from bids_uad.reports.pathways import (
    ANCHOR,
    BACKGROUND,
    BY_TRANSFORM,
    EXTRACTED,
    GIVEN,
    ON_ATLAS,
    ON_OTHER,
    ON_SCAN,
    OTHER_SESSION,
    SAME_SESSION,
    Pathway,
    preprocessing_text,
)


def pathway(modality: str = "T1w", **changes) -> Pathway:
    """Return the pathway of a whole-head image that was registered to the SRI24 atlas, with changes."""
    usual = {"mask_origin": EXTRACTED, "skull_stripped": False, "extraction": "combined"}
    return Pathway(modality, **usual | changes)


def t2w(**changes) -> Pathway:
    """Return the pathway of a whole-head T2w image registered to a T1w image of its session, with changes."""
    return pathway("T2w", **{"mask_origin": ANCHOR, "anchor": SAME_SESSION} | changes)


N4, SYN, NETWORK = "with N4 [@n4]", "[@ants_syn]", "[@synthstrip]"
TO_ATLAS, TO_STAND_IN = "to the SRI24 atlas [@sri24]", "to the ICBM152 template [@icbm152]"
OF_SAME, OF_OTHER = "a T1w image of the same session", "a T1w image of another session"
CARRIED, CUT = "mask of the T1w image was transformed to the T2w", "restricted to the brain of the T2w image"
RIGID, GIVEN_XFM, ON_GRID = "registered rigidly", "provided transform", "on the grid of a T1w image"
TRUTH, ANTS, TORCH = "**Ground truth.**", "*ANTsPy*", "*PyTorch*"

PATHWAYS = {
    "whole head": (
        pathway(),
        {N4, SYN, NETWORK, TO_ATLAS, RIGID, ANTS, "extracted brains by registration and corrected"},
        {OF_SAME, CARRIED, "[@icbm152]", "[@mp2rage]", TRUTH},
    ),
    "stand-in": (pathway(stand_in=True), {TO_STAND_IN, "Nonlinear Symmetric"}, {TO_ATLAS, "own images"}),
    "MP2RAGE": (pathway(mp2rage=True), {"[@mp2rage]", SYN, N4}, set()),
    "by template": (pathway(extraction="template"), {SYN}, {NETWORK, "halfway"}),
    "by network": (pathway(extraction="network"), {NETWORK}, {SYN, "halfway"}),
    "by program": (pathway(extraction="hd-bet"), {"[@hdbet]"}, {SYN, NETWORK}),
    "skull-stripped": (
        pathway(mask_origin=BACKGROUND, skull_stripped=True),
        {"already skull-stripped; the brain mask was derived from their background", N4},
        {SYN, NETWORK, "Unless"},
    ),
    "mask given": (
        pathway(mask_origin=GIVEN),
        {"mask was that of an earlier pipeline", N4},
        {SYN, "background"},
    ),
    "image given": (
        pathway(mask_origin=GIVEN, image_given=True),
        {
            "had been corrected for intensity non-uniformity by an earlier pipeline",
            RIGID,
        },
        {N4, ANTS},
    ),
    "all given": (
        pathway(mask_origin=GIVEN, image_given=True, transform_given=True),
        {"by a provided rigid transform"},
        {N4, RIGID, "[@migradient]", ANTS},
    ),
    "T2w alone": (
        pathway("T2w"),
        {"of T2w images (n = 1)", TO_ATLAS},
        {"T2w channel", OF_SAME, OF_OTHER, CARRIED},
    ),
    "T2w channel": (pathway("T2w", t2w_reference=True), {f"{TO_ATLAS}, T2w channel"}, set()),
    "T2w with T1w": (
        t2w(),
        {OF_SAME, CARRIED, N4, "mutual information", "[@migradient]"},
        {OF_OTHER, CUT, SYN, "extracted brains", ON_GRID},
    ),
    "T2w of a session without T1w": (t2w(anchor=OTHER_SESSION), {OF_OTHER, CARRIED}, {"same session"}),
    "T2w skull-stripped": (t2w(skull_stripped=True), {OF_SAME, CARRIED, CUT}, {"their background"}),
    "FLAIR": (
        replace(t2w(skull_stripped=True), modality="FLAIR"),
        {"mask of the T1w image was transformed to the FLAIR", "the brain of the FLAIR image", OF_SAME},
        {"T2w"},
    ),
    "FLAIR without T1w": (pathway("FLAIR"), {TO_ATLAS, "clipped at their 15th percentile"}, {"T1w", "T2w"}),
    "T2w aligned": (
        t2w(aligned=True, image_given=True),
        {f"{ON_GRID} of the same session"},
        {RIGID, N4, ANTS},
    ),
    "T2w aligned, other session": (
        t2w(aligned=True, anchor=OTHER_SESSION),
        {f"{ON_GRID} of another"},
        {RIGID},
    ),
    "T2w transform given": (t2w(transform_given=True), {f"to {OF_SAME} by a {GIVEN_XFM}"}, {RIGID}),
    "mask on the scan": (
        pathway(lesion=ON_SCAN),
        {TRUTH, "with the transform of the scan"},
        {"as provided"},
    ),
    "mask on the atlas": (pathway(lesion=ON_ATLAS), {TRUTH, "as provided"}, {"transform of the scan."}),
    "mask by transform": (pathway(lesion=BY_TRANSFORM), {TRUTH, GIVEN_XFM}, {"as provided"}),
    "mask on another image": (
        pathway(lesion=ON_OTHER),
        {TRUTH, "Images on which lesion masks were drawn"},
        {GIVEN_XFM},
    ),
}


@pytest.mark.parametrize("name", PATHWAYS)
def test_text_describes_the_preprocessing_and_no_more(name):
    way, expected, excluded = PATHWAYS[name]
    text = methods_text([], pathways={way: 1}).replace("\n", " ")
    assert {part for part in expected if part not in text} == set()
    assert {part for part in excluded if part in text} == set()
    assert "[0, 1]" not in text
    assert TORCH not in text
    assert "$" not in text
    assert set(cited_keys(text)) <= set(bibliography())


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_that_extracts_brains_is_cited(program):
    text = preprocessing_text({pathway(extraction=program): 1})
    assert f"extracted by {PROGRAMS[program].title} [@{PROGRAMS[program].citation}]" in text


def test_pathways_are_counted_separately_in_any_order():
    ways = {pathway(): 3, pathway(lesion=ON_SCAN): 2, pathway(mask_origin=BACKGROUND): 1, t2w(): 4}
    text = preprocessing_text(ways)
    assert text == preprocessing_text(dict(reversed(ways.items())))
    titles = [f"**Preprocessing of {which}.**" for which in ("T1w images (n = 5)", "T1w images (n = 1)")]
    assert all(title in text for title in (*titles, "**Preprocessing of T2w images (n = 4).**"))
    assert text.count("**Preprocessing") == 3


PLS = UsedModel(
    "pls+normative",
    "T1w",
    "default",
    3.5,
    "max_dice",
    training={
        "n_scans": 23,
        "n_subjects": 20,
        "n_held_out_subjects": 2,
        "source": "Site A",
        "anatomies": None,
    },
    post_processing="Gaussian of 2 mm standard deviation across slices, then median",
    precision="fp32",
    covariates=("age", "sex"),
)
NOT_TUNED = "No threshold was tuned on the data reported here."


def changed(**changes) -> UsedModel:
    return UsedModel(**{name: getattr(PLS, name) for name in PLS.__dataclass_fields__} | changes)


MODELS = {
    "usual": (
        [PLS],
        {
            TORCH,
            "Gaussian of 2 mm standard deviation across slices, then median",
            "23 scans of 20 subjects (Site A; 2 of them held out to monitor the training): ",
            "controls (validation scans) on age, sex and brain volume, with a variance linear in age, fitted",
            NOT_TUNED,
        },
        {
            "bfloat16",
            "replaced by the mean of the reference",
            "Participants of this dataset",
            "[@synthseg]",
            "also",
        },
    ),
    "bfloat16": ([changed(precision="bf16")], {"Networks were evaluated in bfloat16"}, set()),
    "seen in validation": (
        [changed(seen_in=("validation",))],
        {"Participants of this dataset were among the validation scans of"},
        {NOT_TUNED, "among the training data"},
    ),
    "seen in training": (
        [changed(seen_in=("training",))],
        {"Participants of this dataset were among the training data of", NOT_TUNED},
        {"among the validation scans"},
    ),
    "age not known to the reference": (
        [changed(covariates=())],
        {"(validation scans) on brain volume, fitted"},
        {"linear in age", "age, sex"},
    ),
    "sex alone": ([changed(covariates=("sex",))], {"on sex and brain volume, fitted"}, {"linear in age"}),
    "age of a participant not known": (
        [changed(imputed=True)],
        {"replaced by the mean of the reference"},
        set(),
    ),
    "other healthy controls": (
        [changed(normative_cohort="Site B")],
        {"(validation scans and Site B)"},
        set(),
    ),
    "scores": (
        [changed(detector="pls", covariates=())],
        {"were turned into masks"},
        {"**Normative reference.**", "linear in age"},
    ),
    "trained elsewhere": ([changed(training={})], set(), {"**Training.**"}),
    "simulated": (
        [changed(training=PLS.training | {"anatomies": ["training_seg_01"]})],
        {"[@synthseg]"},
        set(),
    ),
    "two filters": (
        [PLS, changed(detector="rd", post_processing="median of 3 x 3 x 3", covariates=())],
        {"median of 3 x 3 x 3 for "},
        set(),
    ),
    "two precisions": ([changed(precision="bf16"), changed(modality="T2w")], {"Networks of "}, set()),
}


@pytest.mark.parametrize("name", MODELS)
def test_text_describes_the_models_and_no_more(name):
    models, expected, excluded = MODELS[name]
    text = " ".join(methods_text(models).split())
    assert {part for part in expected if part not in text} == set()
    assert {part for part in excluded if part in text} == set()
    assert "**Preprocessing" not in text
    assert "$" not in text
