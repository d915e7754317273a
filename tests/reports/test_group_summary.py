"""The sentences on top of the group report, for cohorts of every kind."""

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
    _promise,
    count,
    summarise,
    truncate_list,
)
from tests.evaluation.fake_tables import EDGES, Scan, write_cohort, write_participants

NOTHING = np.zeros(len(EDGES), int)


def told(root):
    people = read_participants(root)
    evaluation = evaluate(root, find_metrics_tables(root), people, seed=0)
    subjects, _ = add_participant_columns(evaluation.subjects, people)
    return dict(summarise(evaluation, analyse(subjects, evaluation.cohort_curves, ("sex",), seed=0)))


def counts(edge, n=1000):
    """Voxels that all have the same score."""
    found = NOTHING.copy()
    found[edge] = n
    return found


def test_a_whole_cohort(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=12, n_healthy=10, n_voxels=20_000)
    text = told(tmp_path)
    assert text["Who"] == (
        "2 detectors scored 44 scans (T1w and T2w) of 22 people: "
        "12 with a lesion mask, 10 known to be healthy."
    )
    for modality in ("T1w", "T2w"):
        assert text[f"Lesions in {modality}"].startswith("Disyre finds most: its mean Dice is 0.")
        assert "12 people with lesions" in text[f"Lesions in {modality}"]
        assert text[f"Lesions in {modality}"].endswith("The difference between the two is told from chance.")
    assert text["Left out"] == "Nothing."
    assert "How sure" not in text


def test_few_people_are_called_few(tmp_path):
    write_cohort(tmp_path, tmp_path, n_lesion=4, n_healthy=2, n_voxels=20_000)
    text = told(tmp_path)
    assert "only 4 people with a lesion mask and 2 people known to be healthy" in text["How sure"]
    assert "cannot be told from so few people" in text["Lesions in T1w"]
    assert text["Bias"].startswith("Could not be modelled")


def test_one_detector_and_one_person(tmp_path):
    Scan("1", n_nonlesion=counts(100), n_lesion=counts(350)).write(tmp_path)
    write_participants(tmp_path, [{"participant_id": "sub-1", "group": "patient"}])
    text = told(tmp_path)
    assert text["Who"] == (
        "1 detector scored 1 scan (T1w) of 1 person: 1 with a lesion mask, 0 known to be healthy."
    )
    assert text["Lesions in T1w"] == (
        "Disyre was tried alone: its mean Dice is 1.000 "
        "(too few people for an interval; 1 person with lesions)."
    )
    assert text["False alarms in T1w"].startswith("No scan is known to be of a healthy person")
    assert "only 1 person with a lesion mask:" in text["How sure"]


def test_healthy_people_alone(tmp_path):
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "hc"} for k in range(3)])
    for k in range(3):
        Scan(str(k), n_nonlesion=counts(100, 980) + counts(350, 20)).write(tmp_path)
    text = told(tmp_path)
    assert text["Lesions in T1w"] == (
        "No scan has a lesion in its mask, so nothing is known about finding lesions."
    )
    assert text["False alarms in T1w"] == "Disyre marks 2 % of the brain on average over 3 healthy people."


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.02, 0.03, 0.04, 0.02, 0.03), "it marks more, by more than chance."),
        ((0.0, 0.001, 0.06, 0.0, 0.0), "it marks more, not by more than chance."),
        ((0.02, 0.03, 0.04), "it marks more, too few people for an interval."),
        ((0.0, 0.001, 0.004), "it keeps to that."),
    ],
)
def test_what_a_threshold_promised(tmp_path, shares, words):
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "hc"} for k in range(len(shares))])
    for k, share in enumerate(shares):
        found = round(10_000 * share)
        path = Scan(str(k), n_nonlesion=counts(100, 10_000 - found) + counts(350, found)).write(tmp_path)
        path.write_text(path.read_text().replace("max_dice", "fpr_1pct"))
    text = told(tmp_path)["False alarms in T1w"]
    assert text.endswith(f"Its threshold promised 1 % on validation data: {words}")


def test_scans_with_an_empty_mask_are_counted_apart(tmp_path):
    """Their Dice of 1 does not make a detector one that marks lesions."""
    Scan("1", n_nonlesion=counts(100), n_lesion=counts(200)).write(tmp_path)
    Scan("2", n_nonlesion=counts(100), n_lesion=NOTHING, n_lesions=0, n_lesions_detected=0).write(tmp_path)
    text = told(tmp_path)
    assert text["Who"].endswith("2 with a lesion mask (1 scan with an empty one), 0 known to be healthy.")
    assert text["Lesions in T1w"] == (
        "Disyre does not mark any lesion voxel of 1 person at the fixed threshold."
    )
    Scan("3", n_nonlesion=counts(100), n_lesion=counts(350)).write(tmp_path)
    assert "; 2 people with lesions and 1 scan with an empty mask)" in told(tmp_path)["Lesions in T1w"]


def test_nothing_found_and_nothing_known(tmp_path):
    Scan("1", n_nonlesion=counts(100), n_lesion=counts(200)).write(tmp_path)
    Scan("2").write(tmp_path)
    text = told(tmp_path)
    assert text["Lesions in T1w"] == (
        "Disyre does not mark any lesion voxel of 1 person at the fixed threshold."
    )
    assert text["Who"].endswith("1 with a lesion mask, 0 known to be healthy, 1 neither.")
    assert text["Left out"] == "1 scan without a lesion mask of people not known to be healthy."


def test_who_is_missing_is_counted(tmp_path):
    write_cohort(tmp_path, tmp_path, n_voxels=5_000)
    table = tmp_path / "participants.tsv"
    table.write_text(table.read_text() + "sub-98\tn/a\tn/a\tpatient\tn/a\nsub-99\tn/a\tn/a\tpatient\tn/a\n")
    next(tmp_path.glob("sub-01/anat/*T1wDisyre_histogram.tsv")).unlink()
    assert told(tmp_path)["Left out"] == "2 people without any preprocessed scan and 1 table not readable."


def test_dependence_is_told_by_model_and_its_absence_is_no_proof(tmp_path):
    """Ages drive the false alarms of one detector, and nothing drives those of the other."""
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
    assert told(tmp_path)["Bias"] == "False alarms in healthy brains depend on age in 1 of 2 models."
    for path in tmp_path.glob("sub-*/anat/*Disyre_*"):
        path.unlink()
    assert "which does not prove that there is none" in told(tmp_path)["Bias"]


def test_best_on_average_need_not_be_best_for_most(tmp_path):
    """One perfect scan outweighs two that another detector finds better."""
    overlaps = {"disyre": (900, 10, 10), "patchcore": (20, 20, 20)}
    for detector, found in overlaps.items():
        for k, n in enumerate(found):
            lesion = counts(350, n) + counts(100, 1000 - n)
            Scan(str(k), detector=detector, n_nonlesion=counts(100), n_lesion=lesion).write(tmp_path)
    write_participants(tmp_path, [{"participant_id": f"sub-{k}", "group": "patient"} for k in range(3)])
    text = told(tmp_path)["Lesions in T1w"]
    assert text.startswith("Disyre finds most: its mean Dice is 0.3")
    assert "Ranked within each person, PatchCore comes first." in text


@pytest.mark.parametrize(
    ("p", "words"),
    [
        ([0.01, 0.2, np.nan], "Of 2 comparisons with the models of this page"),
        ([0.01, 0.2, np.nan], "false alarms) 1 differs by more than chance."),
        ([np.nan] * 3, "Whether they differ by more than chance cannot be told from so few people."),
    ],
)
def test_experiments_are_counted(tmp_path, p, words):
    Scan("1").write(tmp_path)
    evaluation = evaluate(tmp_path, find_metrics_tables(tmp_path), read_participants(tmp_path), seed=0)
    analyses = analyse(evaluation.subjects, evaluation.cohort_curves, (), seed=0)
    rows = [{"variant": "reference", "detector": "disyre", "p_holm": np.nan}]
    rows += [{"variant": f"v{k}", "detector": "disyre", "p_holm": value} for k, value in enumerate(p)]
    text = dict(summarise(evaluation, analyses, pd.DataFrame(rows)))["Experiments"]
    assert text.startswith("3 variants of Disyre scored the same images.")
    assert words in text
    alone = summarise(evaluation, analyses, pd.DataFrame(rows[:1]))
    assert dict(alone)["Experiments"].startswith("The other outputs have no scan")


def test_words():
    assert count(1, "scan") == "1 scan"
    assert count(2, "person", "people") == "2 people"
    assert truncate_list([]) == ""
    assert truncate_list("a") == "a"
    assert truncate_list("abc") == "a, b and c"


@pytest.mark.parametrize(
    ("n_above", "n_surely", "words"),
    [
        (
            5,
            2,
            "all mark more, the 95 % intervals of 2 lie above it (each alone, not corrected for their",
        ),
        (2, 0, "3 keep to that, 2 mark more, the 95 % intervals of 0 lie above it"),
        (5, None, "all mark more, too few people for an interval."),
        (0, None, "all keep to that."),
    ],
)
def test_promise_of_several_detectors_names_what_is_not_corrected(n_above, n_surely, words):
    assert words in _promise(1.0, 5, 5, n_above, n_surely)
