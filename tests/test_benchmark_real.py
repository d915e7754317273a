"""The benchmark on real scans: chosen participants, and figures that the group level does not give."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import median_filter
from sklearn.metrics import average_precision_score, f1_score

from benchmarks.real import baseline_rows, best_dice, best_of_each, choose, compare, intensity_baseline
from bids_uad.dataset.participants import read_participants, subject_hash
from bids_uad.dataset.sri24_scans import PreprocessedScan
from bids_uad.engine.bundle import Bundle
from bids_uad.evaluation.subjects import subject_row
from bids_uad.evaluation.tables import find_metrics_tables, read_unit
from tests.evaluation.fake_tables import write_cohort


@pytest.fixture
def brain_with_lesion():
    """A small noisy volume whose lesion is somewhat brighter, and its masks."""
    rng = np.random.default_rng(0)
    lesion = np.zeros((12, 14, 10), dtype=bool)
    lesion[3:7, 4:8, 2:6] = True
    brain = np.ones(lesion.shape, dtype=bool)
    brain[0] = brain[-1] = False
    volume = np.round(rng.normal(0.4, 0.2, lesion.shape) + 0.15 * lesion, 2)
    return volume.astype(np.float32), brain, lesion


@pytest.mark.parametrize(("modality", "sign"), [("T2w", 1), ("FLAIR", 1), ("T1w", -1)])
def test_baseline_equals_scikit_learn(brain_with_lesion, modality, sign):
    volume, brain, lesion = brain_with_lesion
    scores, truth = sign * median_filter(volume, 3)[brain], lesion[brain]
    best = max(f1_score(truth, scores >= threshold) for threshold in np.unique(scores))
    dice, precision = intensity_baseline(volume, brain, lesion, modality)
    assert dice == pytest.approx(best)
    assert precision == pytest.approx(average_precision_score(truth, scores))


def test_baseline_is_undefined_for_an_empty_mask(brain_with_lesion):
    volume, brain, lesion = brain_with_lesion
    assert np.isnan(intensity_baseline(volume, brain, lesion & ~brain, "T2w")).all()


def test_best_dice_by_hand():
    # Above the second edge: 3 of 4 lesion voxels and 1 other, 2 * 3 / (4 + 4).
    assert best_dice(np.array([90, 1, 0]), np.array([1, 1, 2])) == pytest.approx(0.75)


def test_lesions_and_healthy_ones_of_every_site_are_chosen(tmp_path):
    rows = ["participant_id\tgroup\tsite"]
    rows += [f"sub-a{k}\tcontrol\tA" for k in range(3)] + ["sub-b0\tcontrol\tB", "sub-p0\tpatient\tA"]
    rows += ["sub-p1\tpatient\tB"]
    (tmp_path / "participants.tsv").write_text("\n".join(rows) + "\n")
    folder = tmp_path / "derivatives" / "lesions" / "sub-p0" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-p0_label-lesion_mask.nii.gz").touch()
    (folder / "sub-p1_label-lesionchange_mask.nii.gz").touch()
    people = read_participants(tmp_path)
    assert choose(tmp_path, people, 3, []) == ["sub-a0", "sub-a1", "sub-b0", "sub-p0"]
    (tmp_path / "dataset_description.json").write_text('{"Name": "Two sites"}')
    met = {"training": {"subjects": [subject_hash("Two sites", "sub-a0")]}}
    assert choose(tmp_path, people, 3, [Bundle(tmp_path, met, {"cohort": {}})]) == [
        "sub-a1",
        "sub-a2",
        "sub-b0",
        "sub-p0",
    ]


def test_rows_of_the_baseline(tmp_path, brain_with_lesion):
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tgroup\tpathology\nsub-1\tpatient\tstroke\nsub-2\tpatient\ttumour\nsub-3\tcontrol\tn/a\n"
    )
    volume, brain, lesion = brain_with_lesion
    files = {}
    for name, array in zip(("image", "brain", "lesion"), brain_with_lesion, strict=True):
        files[name] = tmp_path / f"{name}.nii.gz"
        nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4)).to_filename(files[name])
    scans = [PreprocessedScan(f"sub-{k}", **files, tissue=None) for k in (1, 2, 3)]
    rows = {row["cohort"]: row for row in baseline_rows(scans, read_participants(tmp_path), "T2w")}
    assert set(rows) == {"all", "stroke", "tumour"}
    assert rows["all"]["n_lesion_scans"] == 2
    assert rows["tumour"]["dice_each"] == pytest.approx(intensity_baseline(volume, brain, lesion, "T2w")[0])


def test_each_scan_has_its_own_best_threshold(tmp_path):
    """The mean over scans is above that at the fixed threshold; of one scan it is a plain search's."""
    write_cohort(tmp_path / "out", tmp_path / "raw", n_voxels=5_000)
    people = read_participants(tmp_path / "raw")
    units = [read_unit(path, people) for path in find_metrics_tables(tmp_path / "out")]
    table = best_of_each(units).set_index(["detector", "modality", "cohort"])["dice_each"]
    judged = [(unit, subject_row(unit)["dice"]) for unit in units if subject_row(unit)["role"] == "lesion"]
    for (detector, modality, cohort), value in table.items():
        of_row = [
            (unit, dice)
            for unit, dice in judged
            if (unit.detector, unit.modality) == (detector, modality) and cohort in ("all", unit.cohort)
        ]
        searched = []
        for unit, _ in of_row:
            found = [
                2
                * unit.n_lesion[k:].sum()
                / (unit.n_lesion[k:].sum() + unit.n_nonlesion[k:].sum() + unit.n_lesion.sum())
                for k in range(len(unit.edges))
            ]
            searched.append(max(found))
        assert value == pytest.approx(np.mean(searched))
        assert value >= np.mean([dice for _, dice in of_row])


def scan_table(values: dict[str, float], cohort: str) -> pd.DataFrame:
    """Return a table of one detector, as `scans_of` reads it."""
    rows = [("T2w", cohort, name, "n/a", "pls", value, value) for name, value in values.items()]
    columns = ["modality", "cohort", "participant_id", "session_id", "detector", "dice", "marked"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:5])


def test_comparison_is_that_of_the_common_scans():
    before = scan_table({"sub-1": 0.2, "sub-2": 0.4, "sub-3": 0.9}, "stroke")
    after = scan_table({"sub-1": 0.3, "sub-2": 0.7, "sub-4": 0.1}, "stroke")
    (row,) = compare(before, after).to_dict("records")
    assert (row["measure"], row["scans"]) == ("dice", 2)
    assert [row["before"], row["after"], row["difference"]] == pytest.approx([0.3, 0.5, 0.2])


def test_comparison_of_healthy_scans_has_the_median_of_the_marked_share():
    names = [f"sub-{k}" for k in range(9)]
    before = scan_table(dict.fromkeys(names, 0.01), "healthy")
    after = scan_table({name: 0.001 * k for k, name in enumerate(names)}, "healthy")
    (row,) = compare(before, after).to_dict("records")
    assert [row["before"], row["after"]] == pytest.approx([0.01, 0.004])
    assert row["difference"] == pytest.approx(-0.006)
    assert row["low"] < row["difference"] < row["high"]
