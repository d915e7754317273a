"""Summary of the group report, for cohorts of every kind."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.subjects import add_participant_columns
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.reports.group_summary import (
    _nominal_rate,
    count,
    join_words,
    summarise,
)
from tests.evaluation.fake_tables import EDGES, Scan, write_cohort, write_participants

NOTHING = np.zeros(len(EDGES), int)


def summary_of(root):
    people = read_participants(root)
    evaluation = evaluate(root, find_metrics_tables(root), people, seed=0)
    subjects, _ = add_participant_columns(evaluation.subjects, people)
    return dict(summarise(evaluation, analyse(subjects, evaluation.cohort_curves, ("sex",), seed=0)))


def counts(edge, n=1000):
    """Return a histogram with `n` voxels in one bin."""
    found = NOTHING.copy()
    found[edge] = n
    return found


def test_summary_of_a_complete_cohort(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=12, n_healthy=10, n_voxels=20_000)
    text = summary_of(tmp_path)
    assert text["Data"] == (
        "2 detectors, 44 images (T1w and T2w) of 22 participants: 12 with a lesion mask, 10 healthy controls."
    )
    for modality in ("T1w", "T2w"):
        lesions = text[f"Lesions, {modality}"]
        assert lesions.startswith("Highest mean Dice: Disyre, 0.")
        assert "; 12 participants with lesions), followed by PatchCore with 0." in lesions
        assert lesions.endswith("The difference between the two is significant.")
    assert text["Excluded or missing"] == "None."
    assert "Sample size" not in text


def test_a_detector_with_fewer_scans_is_not_compared(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=12, n_healthy=10, n_voxels=20_000)
    # Disyre is the better one; it keeps the scan of one participant.
    for table in tmp_path.rglob("*T1wDisyre*"):
        if not table.name.startswith("sub-01"):
            table.unlink()
    lesions = summary_of(tmp_path)["Lesions, T1w"]
    assert lesions.startswith("Mean Dice: PatchCore, 0.")
    assert lesions.endswith("Disyre scored fewer scans.")


def test_small_samples_are_reported(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=4, n_healthy=2, n_voxels=20_000)
    text = summary_of(tmp_path)
    assert text["Sample size"].startswith("Only 4 participants with a lesion mask and 2 healthy controls:")
    assert "Too few participants to test differences" in text["Lesions, T1w"]
    assert text["Bias"].startswith("No model could be fitted")


def test_one_detector_and_one_participant(tmp_path):
    Scan("1", n_nonlesion=counts(100), n_lesion=counts(350)).write(tmp_path)
    write_participants(tmp_path, [{"participant_id": "sub-1", "group": "patient"}])
    text = summary_of(tmp_path)
    assert text["Data"] == (
        "1 detector, 1 image (T1w) of 1 participant: 1 with a lesion mask, 0 healthy controls."
    )
    assert text["Lesions, T1w"] == (
        "Mean Dice: Disyre, 1.000 (too few participants for an interval; 1 participant with lesions)."
    )
    assert text["False positives, T1w"].startswith("No healthy controls:")
    assert "Only 1 participant with a lesion mask:" in text["Sample size"]


def test_healthy_controls_alone(tmp_path):
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "hc"} for k in range(3)])
    for k in range(3):
        Scan(str(k), n_nonlesion=counts(100, 980) + counts(350, 20)).write(tmp_path)
    text = summary_of(tmp_path)
    assert text["Lesions, T1w"].startswith("No lesion mask with a voxel in the brain:")
    assert text["False positives, T1w"] == "Disyre marks 2 % of the brain on average (3 healthy controls)."


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.02, 0.03, 0.04, 0.02, 0.03), "exceeded (its 95 % interval lies above it)."),
        ((0.0, 0.001, 0.06, 0.0, 0.0), "exceeded (its 95 % interval includes it)."),
        ((0.02, 0.03, 0.04), "exceeded (too few participants for an interval)."),
        ((0.0, 0.001, 0.004), "not exceeded."),
    ],
)
def test_rate_of_the_threshold_is_compared_with_that_of_controls(tmp_path, shares, words):
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "hc"} for k in range(len(shares))])
    for k, share in enumerate(shares):
        found = round(10_000 * share)
        path = Scan(str(k), n_nonlesion=counts(100, 10_000 - found) + counts(350, found)).write(tmp_path)
        path.write_text(path.read_text().replace("max_dice", "fpr_1pct"))
    text = summary_of(tmp_path)["False positives, T1w"]
    assert text.endswith(f"The threshold was fixed at 1 % on validation data; this rate is {words}")


def test_scans_with_an_empty_mask_are_counted_apart(tmp_path):
    """Their Dice of 1 does not count as a detected lesion."""
    Scan("1", n_nonlesion=counts(100), n_lesion=counts(200)).write(tmp_path)
    Scan("2", n_nonlesion=counts(100), n_lesion=NOTHING, n_lesions=0, n_lesions_detected=0).write(tmp_path)
    text = summary_of(tmp_path)
    assert text["Data"].endswith("2 with a lesion mask (empty in 1 image), 0 healthy controls.")
    assert text["Lesions, T1w"] == (
        "Disyre does not mark any lesion voxel at the fixed threshold (1 participant with lesions)."
    )
    Scan("3", n_nonlesion=counts(100), n_lesion=counts(350)).write(tmp_path)
    lesions = summary_of(tmp_path)["Lesions, T1w"]
    assert "; 2 participants with lesions and 1 scan with an empty mask)" in lesions


def test_images_without_mask_are_counted(tmp_path):
    Scan("1", n_nonlesion=counts(100), n_lesion=counts(200)).write(tmp_path)
    Scan("2").write(tmp_path)
    text = summary_of(tmp_path)
    assert text["Data"].endswith("1 with a lesion mask, 0 healthy controls, 1 neither.")
    reason = "without lesion mask, of participants not known to be healthy"
    assert text["Excluded or missing"] == f"1 scan {reason}."


def test_missing_participants_are_counted(tmp_path):
    write_cohort(tmp_path, tmp_path, n_voxels=5_000)
    table = tmp_path / "participants.tsv"
    table.write_text(table.read_text() + "sub-98\tn/a\tn/a\tpatient\tn/a\nsub-99\tn/a\tn/a\tpatient\tn/a\n")
    next(tmp_path.glob("sub-01/anat/*T1wDisyre_histogram.tsv")).unlink()
    missing = summary_of(tmp_path)["Excluded or missing"]
    assert missing == "2 participants without a preprocessed scan and 1 table not readable."


def test_associations_are_counted_by_model(tmp_path):
    """False positives of one detector depend on age, those of the other on nothing."""
    generator = np.random.default_rng(0)
    rows = []
    for k in range(60):
        age = 20 + k
        rows.append({"participant_id": f"sub-{k:02d}", "group": "hc", "age": age, "sex": "MF"[k % 2]})
        for detector, rate in (("disyre", 0.002 * np.exp(0.04 * k)), ("patchcore", 0.01)):
            found = round(100_000 * rate * np.exp(generator.normal(0, 0.1)))
            counted = counts(100, 100_000 + int(generator.integers(5000)) - found) + counts(350, found)
            Scan(f"{k:02d}", detector=detector, n_nonlesion=counted).write(tmp_path)
    write_participants(tmp_path, rows)
    start = "False-positive rate of healthy controls:"
    assert summary_of(tmp_path)["Bias"] == f"{start} associated with age in 1 of 2 models."
    for path in tmp_path.glob("sub-*/anat/*Disyre_*"):
        path.unlink()
    assert summary_of(tmp_path)["Bias"].startswith(f"{start} no significant association with ")


def test_best_mean_rank_is_named_if_another_detector_has_it(tmp_path):
    """One scan with a high Dice outweighs two on which another detector is better."""
    overlaps = {"disyre": (900, 10, 10), "patchcore": (20, 20, 20)}
    for detector, found in overlaps.items():
        for k, n in enumerate(found):
            lesion = counts(350, n) + counts(100, 1000 - n)
            Scan(str(k), detector=detector, n_nonlesion=counts(100), n_lesion=lesion).write(tmp_path)
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "patient"} for k in range(3)])
    text = summary_of(tmp_path)["Lesions, T1w"]
    assert text.startswith("Highest mean Dice: Disyre, 0.3")
    assert "PatchCore has the best mean rank within participants." in text


@pytest.mark.parametrize(
    ("p", "words"),
    [
        ([0.01, 0.2, np.nan], " 1 of 2 comparisons with the models of this report"),
        ([0.01, 0.2, np.nan], "false-positive rate) is significant."),
        ([0.01, 0.02, np.nan], "false-positive rate) are significant."),
        ([np.nan] * 3, " Too few participants to test differences."),
    ],
)
def test_experiments_are_counted(tmp_path, p, words):
    Scan("1").write(tmp_path)
    evaluation = evaluate(tmp_path, find_metrics_tables(tmp_path), read_participants(tmp_path), seed=0)
    analyses = analyse(evaluation.subjects, evaluation.cohort_curves, (), seed=0)
    rows = [{"variant": "reference", "detector": "disyre", "p_holm": np.nan}]
    rows += [{"variant": f"v{k}", "detector": "disyre", "p_holm": value} for k, value in enumerate(p)]
    text = dict(summarise(evaluation, analyses, pd.DataFrame(rows)))["Experiments"]
    assert text.startswith("3 variants of Disyre on the same images.")
    assert words in text
    alone = summarise(evaluation, analyses, pd.DataFrame(rows[:1]))
    assert dict(alone)["Experiments"].startswith("The other outputs have no detector and modality in common")


def test_count_and_join_words():
    assert count(1, "scan") == "1 scan"
    assert count(2, "person", "people") == "2 people"
    assert join_words([]) == ""
    assert join_words("a") == "a"
    assert join_words("abc") == "a, b and c"


@pytest.mark.parametrize(
    ("n_above", "n_clearly", "words"),
    [
        (
            5,
            2,
            "exceeded by 5 of 5 (the 95 % intervals of 2 lie above it, without correction for their number).",
        ),
        (2, 0, "exceeded by 2 of 5 (the 95 % intervals of 0 lie above it"),
        (5, None, "exceeded by 5 of 5 (too few participants for an interval)."),
        (0, None, "not exceeded."),
    ],
)
def test_rates_of_several_detectors(n_above, n_clearly, words):
    assert words in _nominal_rate(1.0, 5, 5, n_above, n_clearly)
