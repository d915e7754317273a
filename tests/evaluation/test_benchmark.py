"""The benchmark table against values by hand and scikit-learn."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from bids_uad.dataset.participants import read_participants
from bids_uad.errors import InputError
from bids_uad.evaluation.benchmark import COLUMNS, _names, evaluate
from bids_uad.evaluation.scores import read_scores
from bids_uad.evaluation.tables import find_metrics_tables
from tests.evaluation.fake_tables import Scan, write_cohort, write_participants

EDGES = np.array([0.0, 0.2, 0.4, 0.6])


def counts(*numbers):
    return np.array(numbers)


def scan(subject, **options):
    return Scan(subject, edges=EDGES, **{"threshold": 0.4, **options})


def run(root, seed=0):
    return evaluate(root, find_metrics_tables(root), read_participants(root), seed=seed)


@pytest.fixture
def cohort(tmp_path):
    """Two patients, a third whose mask is empty, two controls, one patient without a mask."""
    groups = [
        ("1", "MS"),
        ("2", "MS"),
        ("3", "MS"),
        ("4", "control"),
        ("5", "control"),
        ("6", "MS"),
    ]
    write_participants(tmp_path, [{"participant_id": f"sub-{who}", "group": group} for who, group in groups])
    lesions = {"n_lesions": 4, "n_lesions_detected": 1, "n_false_components": 3}
    scan("1", n_nonlesion=counts(80, 10, 6, 4), n_lesion=counts(0, 2, 2, 6), **lesions).write(tmp_path)
    lesions = {"n_lesions": 1, "n_lesions_detected": 1, "n_false_components": 0}
    scan("2", n_nonlesion=counts(90, 6, 0, 4), n_lesion=counts(5, 5, 0, 20), **lesions).write(tmp_path)
    nothing = {"n_lesions": 0, "n_lesions_detected": 0, "n_false_components": 0, "n_components": 0}
    scan("3", n_nonlesion=counts(90, 10, 0, 0), n_lesion=counts(0, 0, 0, 0), **nothing).write(tmp_path)
    scan("4", n_nonlesion=counts(95, 4, 1, 0), n_components=1).write(tmp_path)
    scan("5", n_nonlesion=counts(90, 5, 2, 3), n_components=4).write(tmp_path)
    scan("6", n_nonlesion=counts(0, 0, 0, 100)).write(tmp_path)
    return tmp_path


def test_evaluate_agrees_with_metrics_computed_by_hand(cohort):
    result = run(cohort)
    assert list(result.benchmark.columns) == list(COLUMNS)
    row = result.benchmark.iloc[0]
    assert len(result.benchmark) == 1
    assert row["cohort"] == "all"
    assert (row["n_lesion_scans"], row["n_healthy_scans"], row["n_missing_mask"]) == (3, 2, 1)
    assert (row["n_empty_mask"], row["n_both_empty"], row["n_participants"]) == (1, 1, 6)
    first = 2 * 8 / (2 * 8 + 10 + 2)
    second = 2 * 20 / (2 * 20 + 4 + 10)
    assert row["dice_mean"] == pytest.approx((first + second + 1) / 3)
    assert row["dice_nonempty_mean"] == pytest.approx((first + second) / 2)
    assert row["sensitivity_mean"] == pytest.approx((0.8 + 20 / 30) / 2)
    assert row["precision_mean"] == pytest.approx((8 / 18 + 20 / 24) / 2)
    assert row["fpr_healthy_mean"] == pytest.approx((0.01 + 0.05) / 2)
    assert row["fpr_healthy_median"] == pytest.approx(0.03)
    assert row["fpr_lesion_mean"] == pytest.approx((0.10 + 0.04 + 0) / 3)
    assert row["lesion_sensitivity"] == pytest.approx(2 / 5)
    assert row["false_lesions_per_lesion_scan"] == pytest.approx(1)
    assert row["false_lesions_per_healthy_scan"] == pytest.approx(2.5)
    assert row["prevalence"] == pytest.approx(40 / 340)
    assert np.isnan(row[["dice_ci_low", "fpr_healthy_mean_ci_low"]].astype(float)).all()  # few participants
    assert row["min_lesion_volume_mm3"] == 3
    assert row["n_lesions"] == 5
    assert row["lesion_precision"] == pytest.approx(2 / (2 + 3))
    assert row["lesion_f1"] == pytest.approx(2 * 2 / (2 * 2 + 3 + 3))  # found, missed, false
    scans = result.subjects.set_index("participant_id")
    wise = scans[["lesion_sensitivity", "lesion_precision", "lesion_f1"]]
    assert wise.loc["sub-1"].tolist() == pytest.approx([1 / 4, 1 / 4, 2 / 8])
    assert wise.loc["sub-2"].tolist() == [1, 1, 1]
    assert wise.loc[["sub-3", "sub-4", "sub-6"]].isna().all(axis=None)


def test_lesion_wise_metrics_and_intervals_agree_with_scikit_learn(tmp_path):
    """Each lesion and each false-positive component is one sample for scikit-learn."""
    rng = np.random.default_rng(8)
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "MS"} for k in range(12)])
    truth, found, owner = [], [], []
    for k in range(12):
        n, false = rng.integers(0, 9), rng.integers(0, 5)
        detected = rng.binomial(n, 0.6)
        items = {"n_lesions": n, "n_lesions_detected": detected, "n_false_components": false}
        scan(str(k), n_nonlesion=counts(80, 10, 6, 4), n_lesion=counts(0, 2, 2, 6), **items).write(tmp_path)
        truth += [1] * n + [0] * false
        found += [1] * detected + [0] * (n - detected) + [1] * false
        owner += [k] * (n + false)
    row = run(tmp_path).benchmark.iloc[0]
    precision, sensitivity, f1, _ = precision_recall_fscore_support(truth, found, average="binary")
    names = ("lesion_precision", "lesion_sensitivity", "lesion_f1")
    assert [row[name] for name in names] == pytest.approx([precision, sensitivity, f1])
    truth, found, owner = map(np.array, (truth, found, owner))
    drawn = []
    for _ in range(1500):
        chosen = np.concatenate([np.flatnonzero(owner == who) for who in rng.choice(12, 12)])
        drawn.append(precision_recall_fscore_support(truth[chosen], found[chosen], average="binary")[:3])
    for name, ends in zip(names, np.quantile(drawn, [0.025, 0.975], axis=0).T, strict=True):
        assert [row[f"{name}_ci_low"], row[f"{name}_ci_high"]] == pytest.approx(ends, abs=0.03)


def test_tables_with_another_minimum_lesion_volume_raise(cohort):
    scan("2", n_lesion=counts(5, 5, 0, 20), n_nonlesion=counts(9, 0, 0, 1), min_lesion_volume=50.0).write(
        cohort
    )
    with pytest.raises(
        InputError, match=r"sub-2_.*minimum lesion volume of 50 mm3, but 3 mm3 in sub-1_.*--min-c"
    ):
        run(cohort)


def test_tables_without_a_minimum_lesion_volume_are_excluded_from_lesion_wise_metrics(cohort):
    lesions = {"n_lesions": 40, "n_lesions_detected": 1, "n_false_components": 3}
    options = {"n_nonlesion": counts(80, 10, 6, 4), "n_lesion": counts(0, 2, 2, 6), **lesions}
    before = run(cohort).benchmark.iloc[0]
    scan("1", min_lesion_volume=None, **options).write(cohort)
    result = run(cohort)
    row = result.benchmark.iloc[0]
    assert (row["n_lesions"], row["lesion_sensitivity"], row["n_lesion_scans"]) == (1, 1, 3)
    assert row["dice_mean"] == before["dice_mean"]
    (warning,) = [text for text in result.warnings if "without a minimum lesion volume" in text]
    assert "lesion-wise metrics: sub-1. Run the participant level again" in warning
    assert result.lesions.without == 1 + 1  # sub-2 has no lesion table, either
    for who in "23456":
        path = next((cohort / f"sub-{who}").rglob("*_metrics.tsv"))
        table = pd.read_csv(path, sep="\t").drop(columns=["min_lesion_volume_mm3", "n_counted_components"])
        table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    row = run(cohort).benchmark.iloc[0]
    assert row[["n_lesions", "lesion_sensitivity", "false_lesions_per_healthy_scan"]].isna().all()


def test_dice_optimal_uses_one_threshold_for_the_cohort(cohort):
    row = run(cohort).benchmark.iloc[0]
    # The scan with an empty mask is left out, since it would favour a threshold above all scores.
    at_06 = (2 * 6 / (2 * 6 + 4 + 4) + 2 * 20 / (2 * 20 + 4 + 10)) / 2
    assert row["dice_optimal"] == pytest.approx(at_06)
    assert row["dice_optimal_threshold"] == 0.6
    assert row["dice_optimal"] >= row["dice_nonempty_mean"]


def test_auprc_pooled_agrees_with_scikit_learn_on_all_voxels(cohort):
    lesion, nonlesion = counts(5, 7, 2, 26), counts(260, 26, 6, 8)
    truth = np.repeat([1, 0], [lesion.sum(), nonlesion.sum()])
    scores = np.concatenate([np.repeat(EDGES, lesion), np.repeat(EDGES, nonlesion)])
    # Scores are uniform within their bin, except for the zeros.
    draws = np.random.default_rng(0).random((400, len(scores))) * 0.2 * (scores > 0)
    expected = np.mean([average_precision_score(truth, scores + draw) for draw in draws])
    assert run(cohort).benchmark.iloc[0]["auprc_pooled"] == pytest.approx(expected, abs=4e-3)


def test_scan_without_a_lesion_mask_does_not_change_the_metrics(cohort):
    result = run(cohort)
    row = result.subjects.set_index("participant_id").loc["sub-6"]
    assert row["role"] == "missing_mask"
    assert row[["dice", "auprc", "fpr", "n_lesion_voxels"]].isna().all()
    assert any("sub-6" in text and "no lesion mask" in text for text in result.warnings)
    before = result.benchmark.iloc[0]
    for file in (cohort / "sub-6").rglob("*_m*.tsv"):
        file.unlink()
    after = run(cohort).benchmark.iloc[0]
    for column in ("dice_mean", "dice_optimal", "auprc_pooled", "fpr_healthy_mean"):
        assert after[column] == before[column]
    assert after["n_missing_participants"] == 1


def test_healthy_control_with_a_lesion_mask_remains_healthy(cohort):
    scan("4", n_nonlesion=counts(95, 4, 1, 0), n_lesion=counts(0, 0, 0, 9)).write(cohort)
    result = run(cohort)
    row = result.benchmark.iloc[0]
    assert (row["n_lesion_scans"], row["n_healthy_scans"]) == (3, 2)
    assert row["fpr_healthy_mean"] == pytest.approx(0.03)
    assert any("Healthy by participants.tsv, but" in text for text in result.warnings)


def test_tables_of_different_bundles_raise(cohort):
    scan("7", sha256="f" * 64).write(cohort)
    with pytest.raises(InputError, match=f"another model bundle.*{'f' * 64} and {'d' * 64}"):
        run(cohort)
    Scan("7", edges=EDGES * 2, threshold=0.8, sha256="f" * 64).write(cohort)
    with pytest.raises(InputError, match=f"other score bins.*{'f' * 64} and {'d' * 64}"):
        run(cohort)
    scan("7", min_component_volume=30.0).write(cohort)
    with pytest.raises(InputError, match=r"components of at least 30 mm3, but 0 mm3 in .*--min-lesion-size"):
        run(cohort)
    scan("7", threshold=0.6, min_component_volume=None).write(cohort)
    with pytest.raises(InputError, match=r"another threshold \(0\.6 instead of 0\.4\)"):
        run(cohort)
    scan("7", detector="patchcore", sha256="f" * 64).write(cohort)
    for file in (cohort / "sub-7").rglob("*Disyre*"):
        file.unlink()
    assert len(run(cohort).benchmark) == 2


@pytest.mark.parametrize(
    ("marked", "words"),
    [
        ({"1": 70, "2": 5, "3": 5, "4": 0, "5": 5, "6": 5}, None),  # one large lesion
        ({"1": 70, "2": 30, "3": 5, "4": 0, "5": 5, "6": 5}, "2 of 6 .* 0 of 2 .* have large lesions, or"),
        ({"1": 5, "2": 5, "3": 5, "4": 40, "5": 70, "6": 5}, "2 of 6 .* 2 of 2 .* not hold for this cohort"),
    ],
)
def test_marked_fractions_far_above_those_of_healthy_scans_are_reported(cohort, marked, words):
    for subject, percent in marked.items():
        lesion = None if subject in "456" else counts(0, 0, 0, 0)
        table = counts(100 - percent, 0, percent, 0)
        scan(subject, n_nonlesion=table, n_lesion=lesion, healthy_p95=0.06).write(cohort)
    result = run(cohort)
    excess = result.subjects.set_index("participant_id")["marked_excess"]
    assert excess.to_dict() == {f"sub-{subject}": percent > 18 for subject, percent in marked.items()}
    (row,) = result.benchmark.to_dict("records")
    assert row["marked_limit"] == pytest.approx(0.18)
    assert row["excess_share"] == pytest.approx(excess.mean())
    assert row["excess_share_healthy"] == excess[["sub-4", "sub-5"]].mean()
    found = [text for text in result.warnings if "far more than" in text]
    assert [bool(re.search(words, text)) for text in found] == [True] if words else not found


def test_names_of_many_participants_are_truncated():
    subjects = [f"sub-{number:02d}" for number in range(25)]
    assert _names(reversed(subjects[:3])) == "sub-00, sub-01, sub-02"
    assert _names([*subjects, "sub-00"]).endswith(", sub-18, sub-19 and 5 more")


def test_different_app_versions_cause_a_warning(cohort):
    scan("7", version="0.2.0").write(cohort)
    result = run(cohort)
    assert "0.1.0 (6 participants), 0.2.0 (1 participant)" in result.warnings[0]
    assert result.benchmark.iloc[0]["app_version"] == "0.1.0, 0.2.0"
    assert any("Not listed in participants.tsv" in text and "sub-7" in text for text in result.warnings)


def test_threshold_between_bin_edges_is_reported_as_unreadable(cohort):
    scan("6", threshold=0.5).write(cohort)
    result = run(cohort)
    assert len(result.unreadable) == 1
    assert "threshold 0.5 is not one of the score bin edges" in result.unreadable[0]
    assert result.benchmark.iloc[0]["n_scans"] == 5


def test_missing_data_have_reasons(cohort):
    subjects = (cohort / "participants.tsv").read_text() + "sub-8\tMS\nsub-9\tMS\n"
    (cohort / "participants.tsv").write_text(subjects)
    log = cohort / "sub-8" / "log" / "run"
    log.mkdir(parents=True)
    (log / "crash-detect.txt").write_text("out of memory")
    anat = cohort / "sub-8" / "anat"
    anat.mkdir()
    (anat / "sub-8_space-SRI24_desc-preproc_T1w.nii.gz").touch()
    found = {missing.subject: missing for missing in run(cohort).missing_data}
    assert set(found) == {"sub-8", "sub-9"}
    assert found["sub-9"].reason == "no outputs at all"
    assert found["sub-8"].reason == "preprocessed, but no score table"
    assert found["sub-8"].crash_files == ("sub-8/log/run/crash-detect.txt",)
    row = run(cohort).benchmark.iloc[0]
    assert (row["n_missing_participants"], row["n_failed_scans"]) == (2, 1)


def test_modality_without_any_tables_is_not_missing(cohort):
    anat = cohort / "sub-1" / "anat"
    (anat / "sub-1_space-SRI24_desc-preproc_T2w.nii.gz").touch()
    assert run(cohort).missing_data == []
    for file in (cohort / "sub-1").rglob("*Disyre*"):
        file.unlink()
    (missing,) = run(cohort).missing_data
    assert (missing.modality, missing.detector) == ("T2w", None)
    assert missing.reason == "preprocessed, but no score table of any detector"


def write_quality(root, subject, exclude, reason="n/a"):
    path = root / f"sub-{subject}" / "anat" / f"sub-{subject}_space-SRI24_desc-T1wPreproc_qc.tsv"
    path.write_text(f"exclude\texclude_reasons\n{exclude}\t{reason}\n")


def test_images_excluded_by_quality_control_are_counted(cohort):
    before = run(cohort)
    write_quality(cohort, "1", "yes", "The head was turned.")
    write_quality(cohort, "2", "no")
    write_quality(cohort, "3", "Yes")
    result = run(cohort)
    left_out = {"sub-1", "sub-3"}
    kept = before.subjects[~before.subjects["participant_id"].isin(left_out)].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.subjects, kept)
    row = result.benchmark.iloc[0]
    assert (row["n_scans"], row["n_excluded_scans"]) == (before.benchmark.iloc[0]["n_scans"] - 2, 2)
    assert (row["n_missing_participants"], row["n_failed_scans"]) == (0, 0)
    assert row["dice_mean"] == pytest.approx(kept["dice"].mean())
    assert {missing.subject: missing.reason for missing in result.missing_data} == {
        "sub-1": "excluded by quality control: The head was turned.",
        "sub-3": "excluded by quality control: no reason given",
    }


def test_damaged_quality_table_is_reported(cohort):
    write_quality(cohort, "1", "no\tno")
    result = run(cohort)
    assert len(result.unreadable) == 1
    assert "sub-1/anat/sub-1_space-SRI24_desc-T1wPreproc_qc.tsv: rows of different" in result.unreadable[0]
    assert result.benchmark.iloc[0]["n_excluded_scans"] == 0


def test_benchmark_has_a_row_for_each_pathology(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=6, n_healthy=3, n_voxels=20_000)
    benchmark = run(tmp_path).benchmark
    rows = benchmark[(benchmark["detector"] == "disyre") & (benchmark["modality"] == "T1w")]
    assert list(rows["cohort"]) == ["all", "MS", "stroke", "tumour"]
    assert list(rows["n_lesion_scans"]) == [6, 2, 2, 2]
    assert list(rows["n_healthy_scans"]) == [3, 0, 0, 0]
    parts = rows.iloc[1:]["dice_mean"].mean()
    assert rows.iloc[0]["dice_mean"] == pytest.approx(parts)


def test_evaluate_ranks_the_better_detector_first_and_is_repeatable(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=12, n_healthy=4, n_voxels=50_000)
    one, two = run(tmp_path).benchmark, run(tmp_path).benchmark
    assert one.equals(two)
    means = one[one["cohort"] == "all"].set_index(["detector", "modality"])["auprc_mean"]
    assert means["disyre", "T1w"] > means["patchcore", "T1w"]
    assert means["disyre", "T2w"] > means["disyre", "T1w"]


def test_metrics_are_nan_without_healthy_controls_or_lesions(tmp_path):
    scan("1", n_nonlesion=counts(8, 1, 1, 0), n_lesion=counts(0, 0, 1, 4)).write(tmp_path)
    result = run(tmp_path)
    row = result.benchmark.iloc[0]
    assert row["dice_mean"] == pytest.approx(10 / 11)
    assert np.isnan([row["dice_ci_low"], row["fpr_healthy_mean"]]).all()
    assert any("No participants.tsv" in text for text in result.warnings)
    write_participants(tmp_path, [{"participant_id": "sub-1", "group": "hc"}])
    scan("1", n_nonlesion=counts(8, 1, 1, 0)).write(tmp_path)
    result = run(tmp_path)
    row = result.benchmark.iloc[0]
    assert row["fpr_healthy_mean"] == pytest.approx(0.1)
    assert np.isnan([row["dice_mean"], row["dice_optimal"], row["auprc_pooled"]]).all()
    assert any("No lesion mask contains a lesion" in text for text in result.warnings)


def test_memory_does_not_grow_with_the_histograms(tmp_path):
    edges = np.arange(4_000.0)

    def peak(folder, n_subjects):
        for subject in range(n_subjects):
            ones = np.ones(len(edges), int)
            Scan(f"{subject}", edges=edges, n_nonlesion=ones, n_lesion=ones).write(folder)
        paths, subjects = find_metrics_tables(folder), read_participants(folder)
        tracemalloc.start()
        read_scores(paths, subjects, {})
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(tmp_path / "first", 1)  # edges are read once
    per_table = (peak(tmp_path / "large", 12) - peak(tmp_path / "small", 4)) / 8
    assert per_table < 20_000  # the counts of one table take 64 kB
