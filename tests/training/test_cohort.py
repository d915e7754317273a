"""Cohorts for training and calibration, from unusual tables of participants."""

from __future__ import annotations

import json

import pytest

from bids_uad.errors import InputError
from bids_uad.training.calibrate import _covariates_by_subject
from bids_uad.training.cohort import describe_cohorts, healthy_cohort

TABLE = """participant_id\tsession_id\tAge\tGender\tgroup\tScanner
1\t1\t408\t1\t0\t7
1\t2\t480\t1\t0\t8
2\t1\t89+\t2\t0\t7
3\t1\t600\tn/a\t1\t9
4\t1\t18-38\t2\t0\t-
"""
SIDECAR = {
    "age": {"Units": "months"},
    "gender": {"Levels": {"1": "Female", "2": "Male"}},
    "group": {"Levels": {"0": "Healthy control", "1": "Stroke"}},
}
SCANS = ("sub-1_ses-1", "sub-1_ses-2", "sub-2_ses-1", "sub-3_ses-1", "sub-4_ses-1")


@pytest.fixture
def folder(tmp_path):
    for stem in SCANS:
        subject, session = stem.split("_")
        anat = tmp_path / subject / session / "anat"
        anat.mkdir(parents=True)
        for name in ("desc-preproc_T1w", "desc-brain_mask"):
            (anat / f"{stem}_space-SRI24_{name}.nii.gz").touch()
    (tmp_path / "participants.tsv").write_text(TABLE)
    (tmp_path / "participants.json").write_text(json.dumps(SIDECAR))
    return tmp_path


def test_training_cohort_is_described_by_the_common_rules(folder, caplog):
    cohort = healthy_cohort(folder, "T1w")
    assert [scan.key for scan in cohort.scans] == [f"{stem}_T1w" for stem in SCANS if "sub-3" not in stem]
    description = describe_cohorts([cohort])
    assert (description["n_scans"], description["n_subjects"]) == (4, 3)
    assert description["age_range"] == pytest.approx([28 / 12, 40])
    assert description["sex"] == {"male": 2, "female": 1}  # participants, not scans
    assert description["scanners"] == ["7", "8"]
    assert "column Age: 2 of 5 ages are bounds or ranges (89+, 18-38)" in caplog.text


def test_reference_has_the_age_of_each_session(folder):
    people = _covariates_by_subject([healthy_cohort(folder, "T1w")])
    assert {key[1]: sorted(sessions) for key, sessions in people.items()} == {
        "sub-1": ["ses-1", "ses-2"],
        "sub-2": ["ses-1"],
        "sub-4": ["ses-1"],
    }
    assert people[folder, "sub-1"] == {"ses-1": {"age": 34, "sex": -0.5}, "ses-2": {"age": 40, "sex": -0.5}}
    assert people[folder, "sub-2"]["ses-1"] == {"age": 89 / 12, "sex": 0.5}


def test_groups_without_a_description_are_named(folder, caplog):
    (folder / "participants.json").unlink()
    with pytest.raises(InputError, match="none of the 5 T1w scans belongs to a healthy control"):
        healthy_cohort(folder, "T1w")
    assert "column group: 5 of 5 values are numbers without a description (0, 1)" in caplog.text


def test_scans_that_quality_control_excludes_are_left_out(folder, caplog):
    table = "sub-1/ses-1/anat/sub-1_ses-1_space-SRI24_desc-T1wPreproc_qc.tsv"
    (folder / table).write_text("exclude\texclude_reasons\nyes\tmotion\n")
    kept = [scan.key for scan in healthy_cohort(folder, "T1w").scans]
    assert kept == ["sub-1_ses-2_T1w", "sub-2_ses-1_T1w", "sub-4_ses-1_T1w"]
    assert "1 scan(s) excluded by *_qc.tsv: sub-1_ses-1_T1w" in caplog.text
    for stem in SCANS:
        path = next(folder.rglob(f"{stem}_*preproc*")).with_name(f"{stem}_space-SRI24_desc-T1wPreproc_qc.tsv")
        path.write_text("exclude\texclude_reasons\nyes\tn/a\n")
    with pytest.raises(InputError, match="all T1w scans are excluded"):
        healthy_cohort(folder, "T1w")
