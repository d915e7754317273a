"""Exclusion of images by quality control, and of images that depend on them."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from bids_uad.evaluation.missing import NO_REASON, find_exclusions
from bids_uad.levels.participant.interfaces import quality_table

FAILED = {"failures": ["The brain overlaps the reference brain by only 0.40 (Dice): check the registration."]}


def write_quality(root: Path, image: str, quality: dict, depends_on: str = "n/a", **by_hand: str) -> Path:
    """Write the quality table of an image as the participant level does, then change some cells."""
    prefix, modality = image.rsplit("_", 1)
    session = next((part for part in prefix.split("_") if part.startswith("ses-")), "")
    path = (
        root / prefix.split("_")[0] / session / "anat" / f"{prefix}_space-SRI24_desc-{modality}Preproc_qc.tsv"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"source_image": "bids:raw:x", "modality": modality, "depends_on": depends_on}
    quality_table(quality, facts).assign(**by_hand).to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path


@pytest.mark.parametrize(
    ("anchor", "left_out"),
    [
        pytest.param((FAILED, {}), True, id="registration or brain mask failed"),
        pytest.param(({}, {}), False, id="nothing failed"),
        pytest.param(
            ({}, {"exclude": "yes", "exclude_reasons": "noise"}), False, id="excluded by hand for noise"
        ),
        pytest.param(
            ({}, {"exclude": "yes", "exclude_reasons": "mask", "exclude_dependents": "yes"}),
            True,
            id="excluded by hand with what depends on it",
        ),
        pytest.param((FAILED, {"exclude": "no"}), False, id="failed, but accepted by hand"),
        pytest.param(
            (FAILED, {"exclude_dependents": "no"}), False, id="failed, but the T2w accepted by hand"
        ),
    ],
)
@pytest.mark.parametrize("anchor_image", ["sub-01_ses-a_T1w", "sub-01_ses-b_acq-x_run-1_T1w"])
def test_t2w_is_excluded_with_the_t1w_it_was_registered_to(tmp_path, anchor, left_out, anchor_image):
    quality, by_hand = anchor
    write_quality(tmp_path, anchor_image, quality, **by_hand)
    write_quality(tmp_path, "sub-01_ses-a_T2w", {}, depends_on=anchor_image)
    write_quality(tmp_path, "sub-01_ses-a_run-2_T2w", {})  # registered to the atlas directly
    found, unreadable = find_exclusions(tmp_path)
    assert unreadable == []
    assert (("sub-01_ses-a", "T2w") in found) == left_out
    assert ("sub-01_ses-a_run-2", "T2w") not in found
    if left_out:
        reason = found["sub-01_ses-a", "T2w"]
        assert reason.startswith(f"depends on {anchor_image}, which is excluded: ")
        assert reason.endswith(found[tuple(anchor_image.rsplit("_", 1))])


def test_image_is_excluded_with_the_images_its_lesion_mask_depends_on(tmp_path):
    """The lesion mask of a T1w is on a T2w of another session, which is registered through a T1w."""
    write_quality(tmp_path, "sub-01_ses-b_T1w", FAILED)
    write_quality(tmp_path, "sub-01_ses-b_T2w", {}, depends_on="sub-01_ses-b_T1w")
    write_quality(tmp_path, "sub-01_ses-a_T1w", {}, depends_on="sub-01_ses-b_T2w")
    write_quality(tmp_path, "sub-01_ses-c_T1w", {}, depends_on="sub-01_ses-d_T2w")  # not there
    found, _ = find_exclusions(tmp_path)
    assert found["sub-01_ses-a", "T1w"].startswith(
        "depends on sub-01_ses-b_T1w, which is excluded: The brain"
    )
    assert len(found) == 3


def test_mutual_dependencies_end(tmp_path):
    write_quality(tmp_path, "sub-01_T1w", {}, depends_on="sub-01_T2w")  # its lesion mask
    write_quality(tmp_path, "sub-01_T2w", {}, depends_on="sub-01_T1w")  # its registration
    assert find_exclusions(tmp_path) == ({}, [])
    write_quality(tmp_path, "sub-01_T2w", FAILED, depends_on="sub-01_T1w")
    assert set(find_exclusions(tmp_path)[0]) == {("sub-01", "T1w"), ("sub-01", "T2w")}


def test_tables_of_early_versions_are_read_and_damaged_ones_reported(tmp_path):
    path = write_quality(tmp_path, "sub-01_T1w", {})
    path.write_text("exclude\texclude_reasons\nYes\tn/a\n")
    damaged = write_quality(tmp_path, "sub-02_T1w", FAILED)
    damaged.write_text("exclude\n")
    found, unreadable = find_exclusions(tmp_path)
    assert found == {("sub-01", "T1w"): NO_REASON}
    assert len(unreadable) == 1
    assert damaged.name in unreadable[0]
    assert find_exclusions(tmp_path, frozenset({"sub-03"})) == ({}, [])


def test_quality_table_states_the_exclusion():
    facts = {"source_image": "x", "modality": "T1w", "depends_on": "n/a"}
    row = quality_table(FAILED, facts).iloc[0]
    assert (row["exclude"], row["exclude_dependents"]) == ("yes", "yes")
    assert pd.isna(row["snr_total"])


def test_exclusions_of_a_participant_are_found_without_searching_the_others(tmp_path, monkeypatch):
    for number in range(1, 5):
        write_quality(tmp_path, f"sub-0{number}_T1w", FAILED)
    searched = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": searched.append(Path(path)) or scandir(path))
    found, _ = find_exclusions(tmp_path, frozenset({"sub-02"}))
    assert list(found) == [("sub-02", "T1w")]
    assert searched == [tmp_path / "sub-02", tmp_path / "sub-02" / "anat"]
