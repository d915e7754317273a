"""Benchmarks on real scans: chosen participants, figures beside the group level, normalised scores."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.ndimage import median_filter
from sklearn.metrics import average_precision_score, f1_score

from benchmarks.normalisation import (
    CENTRES,
    NONE,
    NORMALISATIONS,
    Counts,
    _edge,
    count_scan,
    outcomes,
    quantile,
    summarise,
)
from benchmarks.real import baseline_rows, best_dice, best_of_each, choose, compare, intensity_baseline
from bids_uad.calibration.thresholds import FINE_EDGES, count_scores
from bids_uad.dataset.participants import read_participants, subject_hash
from bids_uad.dataset.sri24_scans import PreprocessedScan
from bids_uad.engine.bundle import PACKAGED, Bundle, load_bundle
from bids_uad.evaluation.subjects import subject_row
from bids_uad.evaluation.tables import find_metrics_tables, read_unit
from bids_uad.space import SHAPE, to_image
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


def histogram(scores):
    return count_scores(np.ravel(scores), FINE_EDGES)


def test_normalisations_equal_scipy_and_do_not_depend_on_scale_and_offset():
    scores = np.random.default_rng(0).gamma(2, 0.1, 999)
    counts = histogram(scores)
    for level in (0.1, 0.5, 0.9):
        expected = np.quantile(scores, level, method="inverted_cdf")
        assert quantile(counts, level) == pytest.approx(expected, rel=6e-4)
    spread = stats.median_abs_deviation(scores, scale="normal")
    near = np.searchsorted(CENTRES, [0.05, 0.2, 0.5, 0.9])
    expected = (CENTRES[near] - np.median(scores)) / spread
    assert NORMALISATIONS["median and MAD"](counts)[near] == pytest.approx(expected, rel=5e-3, abs=5e-3)
    tied = np.round(scores, 2)[:50]
    bins = np.searchsorted(FINE_EDGES[:-1], tied) - 1
    ranks = NORMALISATIONS["rank"](histogram(tied))[bins]
    assert ranks == pytest.approx((stats.rankdata(tied, "min") - 1) / tied.size)
    for name in ("median and MAD", "median and 90th percentile", "rank"):
        one = NORMALISATIONS[name](counts)[histogram(scores) > 0]
        other = NORMALISATIONS[name](histogram(3 * scores + 2))[histogram(3 * scores + 2) > 0]
        assert [one.min(), one.max()] == pytest.approx([other.min(), other.max()], rel=0.02, abs=0.02)


def random_scan(subject, scale=1.0, size=0):
    """4000 random scores, of which the first `size` are those of a lesion."""
    scores = np.random.default_rng(subject).gamma(2, 0.1, 4000)
    lesion = np.arange(4000) < size
    scores = scale * (scores + 1.5 * lesion)
    parts = histogram(scores[~lesion]), histogram(scores[lesion]) if size else None
    return scores, lesion, Counts(f"sub-{subject}", "stroke" if size else "healthy", *parts)


def test_marked_fractions_and_dice_are_those_of_the_voxels():
    scores, lesion, counts = random_scan(1, size=300)
    mask = scores > FINE_EDGES[_edge(0.5)]
    assert counts.marked(0.5) == pytest.approx(mask[~lesion].mean())
    assert counts.marked(0.5, lesions=True) == pytest.approx(mask.mean())
    assert counts.dice(0.5) == pytest.approx(f1_score(lesion, mask))
    assert np.isnan(random_scan(2)[2].dice(0.5))


def test_thresholds_of_normalised_scores_hold_for_scans_of_another_scale():
    def cohort(start, scale):
        lesions = [random_scan(k, scale, 300)[2] for k in range(start + 6, start + 12)]
        return [random_scan(k, scale)[2] for k in range(start, start + 6)] + lesions

    table = outcomes(cohort(0, 1), cohort(12, 5))
    rows = summarise(table).set_index("normalisation")
    assert list(rows.index) == list(NORMALISATIONS)
    assert (rows[["healthy_scans", "lesion_scans"]] == 6).all(axis=None)
    assert rows.loc[NONE, "healthy_median"] > 0.1
    assert rows.loc[NONE, "healthy_excess"] == rows.loc[NONE, "lesion_excess"] == 1
    assert rows.loc[NONE, ["dice_difference", "dice_low", "dice_high"]].tolist() == [0, 0, 0]
    for name in ("median and MAD", "median and 90th percentile"):
        assert rows.loc[name, "healthy_median"] < 0.02
        assert rows.loc[name, "healthy_excess"] == 0
        assert rows.loc[name, "dice"] > 0.9
        assert rows.loc[name, "dice_low"] > 0.1
        assert rows.loc[name, "marked_high"] < 0
    assert np.ptp(table.query("normalisation == 'rank' and kind == 'healthy'")["marked"]) < 2e-3


def test_histograms_of_a_scan_are_those_of_its_map_without_the_mask_of_a_control(tmp_path):
    bundle = load_bundle(PACKAGED / "intensity-T2w-lite")
    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, np.float32)
    brain[100:110, 100:110, 60:68] = 1
    lesion = brain * (np.arange(SHAPE[0]) < 105)[:, None, None]
    files = {"image": brain * rng.random(SHAPE), "brain": brain, "lesion": lesion}
    for name, volume in files.items():
        to_image(volume.astype(np.float32)).to_filename(tmp_path / f"{name}.nii.gz")
    scan = PreprocessedScan("sub-1", *(tmp_path / f"{name}.nii.gz" for name in files), None)
    for healthy in (True, False):
        count_scan(scan, [bundle], tmp_path / str(healthy), healthy=healthy, every=4)
    (control,), (patient,) = (list((tmp_path / str(healthy)).rglob("*.npz")) for healthy in (True, False))
    with np.load(control) as one, np.load(patient) as other:
        assert "lesion" not in one
        assert one["rest"].tolist() == other["rest"].tolist()
        assert other["lesion"].sum() == one["rest"].sum() == 5 * 10 * 2  # slices 60 and 64
