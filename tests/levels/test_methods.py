"""Methods text of a dataset from the completion records of its images."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.dataset.participants import image_hash
from bids_uad.files import file_sha256
from bids_uad.levels.participant.completion_records import (
    CompletionRecord,
    ModelRecord,
    add_measured_methods,
    describe_methods,
    read_records,
)
from bids_uad.reports.boilerplate import UsedModel
from bids_uad.reports.pathways import (
    ANCHOR,
    BACKGROUND,
    EXTRACTED,
    GIVEN,
    SAME_SESSION,
    Pathway,
)
from tests.dataset.skeleton import write_mask
from tests.levels.fakes import add_reference, fake_bundle
from tests.levels.test_participant_run import Bench, reference, stand_ins  # noqa: F401

T1W, T2W = "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz"


@pytest.mark.parametrize(
    ("before", "quality", "origin"),
    [
        ({}, {"skull_stripped": False}, EXTRACTED),
        ({}, {"skull_stripped": True}, BACKGROUND),
        ({"mask_origin": GIVEN}, {"skull_stripped": True}, GIVEN),
        ({"anchor": SAME_SESSION}, {"skull_stripped": True}, ANCHOR),
        ({"mask_origin": GIVEN}, {"skull_stripped": False, "brain_mask_origin": EXTRACTED}, EXTRACTED),
    ],
)
def test_add_measured_methods_replaces_planned_values(before, quality, origin):
    static = asdict(Pathway("T1w", "", skull_stripped=False, extraction="combined")) | before
    found = add_measured_methods(static, quality)
    assert found["mask_origin"] == origin
    assert found["skull_stripped"] == quality["skull_stripped"]


def record(key: str, *models: UsedModel, version: str = "1.0", **changes) -> CompletionRecord:
    way = asdict(replace(Pathway("T1w", EXTRACTED, False, "combined"), **changes)) | {"parcellations": []}
    own = {model.detector: ModelRecord(model.detector, "x", methods=asdict(model)) for model in models}
    return CompletionRecord(key, "run", "x", {"app_version": version}, ["file"], own, methods=way)


def test_methods_text_accepts_records_without_parcellations():
    present = record("sub-01_T1w")
    early = replace(present, methods={k: v for k, v in present.methods.items() if k != "parcellations"})
    assert describe_methods([early]) == describe_methods([present]) != ""


def test_methods_text_does_not_depend_on_the_order_of_records():
    model = UsedModel("pls+normative", "T1w", "default", 3.0, "max_dice", covariates=("age",))
    met = replace(model, seen_in=("validation",), imputed=True)
    records = [
        record("a", model),
        record("b", met, version="2.0"),
        record("c"),
        record("d", skull_stripped=True),
    ]
    records = [CompletionRecord(**{**vars(one), "models": one.models}) for one in records]
    # As they are read back.
    again = [json.loads(json.dumps(asdict(one))) for one in records]
    for one in again:
        one["models"] = {name: ModelRecord(**sidecar) for name, sidecar in one["models"].items()}
    read = [CompletionRecord(**one) for one in again]
    text = describe_methods(read)
    assert text == describe_methods(reversed(read)) == describe_methods(records)
    assert "*bids_uad* 1.0 and 2.0" in text
    assert "T1w images (n = 4)" in text
    assert text.count("validation scans of") == 1
    assert "replaced by the mean of the reference" in text
    withdrawn = replace(records[0], outputs=[], models={}, fingerprint={})
    assert describe_methods([withdrawn]) == ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stand_ins):  # noqa: F811
    """A run on a T2w image of a session without T1w image; its model was calibrated on this participant."""
    bench = Bench(tmp_path_factory.mktemp("methods"))
    bench.dataset(T1W, T2W)
    bundle = Path(bench.models[1])
    add_reference(bundle)
    calibration = json.loads((bundle / "calibration.json").read_text())
    calibration["cohort"] = {
        "subjects": [image_hash(file_sha256(bench.raw / T2W))],
        "source": "Here",
    }
    (bundle / "calibration.json").write_text(json.dumps(calibration))
    assert bench.run("--modalities", "T2w", "--deviation", "normative") == 0
    return bench


def test_generated_texts_say_what_this_run_did(finished):
    text = " ".join((finished.out / "logs" / "CITATION.md").read_text().split())
    assert "a T1w image of another session" in text
    assert "same session" not in text
    assert "among the validation scans of" in text
    assert "No threshold was tuned" not in text
    assert "replaced by the mean of the reference" in text  # nobody's age is known
    assert "Disyre on T1w" not in text
    assert "Ground truth" not in text
    labels = set(pd.read_csv(finished.out / "descriptions.tsv", sep="\t")["desc_id"])
    assert {"desc-T2wBrain", "desc-T2wDisyreNormative"} <= labels
    assert not {"desc-manual", "desc-T1wDisyre", "desc-T2wDisyre"} & labels
    readme = (finished.out / "README.md").read_text()
    assert "scaled to [0, 1]" not in readme
    assert "not part of this dataset" not in readme
    assert "Every T1w" not in readme


def test_sidecars_say_what_this_run_did(finished):
    anat = finished.out / "sub-01" / "ses-b" / "anat"
    for path in anat.glob("*desc-T2wDisyreNormative_*.json"):
        sidecar = json.loads(path.read_text())
        assert "not on this dataset" not in sidecar["ThresholdSource"]
        assert sidecar["ThresholdCohort"] == "Here"
    sidecar = json.loads(
        (anat / "sub-01_ses-b_space-SRI24_desc-T2wDisyreNormative_anomalymap.json").read_text()
    )
    assert "of the same age" not in sidecar["Description"]
    assert sidecar["NormativeRemarks"]
    sidecar = json.loads((anat / "sub-01_ses-b_space-SRI24_desc-preproc_T2w.json").read_text())
    assert "may exceed 1" in sidecar["Description"]


def test_methods_text_describes_all_images_of_the_dataset(tmp_path, stand_ins):  # noqa: F811
    bench = Bench(tmp_path)
    name = "sub-01/anat/sub-01_T1w.nii.gz"
    bench.dataset(name)
    assert bench.run() == 0
    citation = bench.out / "logs" / "CITATION.md"
    assert "Ground truth" not in citation.read_text()
    patchcore = str(fake_bundle(bench.folder / "patchcore-T1w", "patchcore", "T1w"))
    assert bench.run(models=[patchcore]) == 0
    text = citation.read_text()
    assert "Disyre on T1w" in text
    assert "PatchCore on T1w" in text
    write_mask(bench.folder / "lesions" / "sub-01" / "anat" / "sub-01_label-lesion_mask.nii.gz")
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}", models=[patchcore]) == 0
    text = citation.read_text()
    assert "Lesion masks on the grid of a scan" in text
    assert "Disyre on T1w" not in text  # its outputs are of the run without mask, and gone
    assert describe_methods(read_records(bench.out, "sub-01")) == text


def test_methods_text_that_a_killed_run_did_not_write_is_written_by_the_next_run(tmp_path, stand_ins):  # noqa: F811
    bench = Bench(tmp_path)
    bench.dataset("sub-01/anat/sub-01_T1w.nii.gz")
    assert bench.run() == 0
    citation = bench.out / "logs" / "CITATION.md"
    text = citation.read_text()
    citation.unlink()
    assert bench.run() == 0
    assert citation.read_text() == text
    citation.write_text("methods of an earlier run")
    os.utime(citation, ns=(0, 0))
    assert bench.run() == 0
    assert citation.read_text() == text
    current = citation.stat().st_mtime_ns
    assert bench.run() == 0
    assert citation.stat().st_mtime_ns == current
