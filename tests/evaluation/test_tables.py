"""Reading of the score tables of one image and detector."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.errors import InputError
from bids_uad.evaluation.subjects import subject_row
from bids_uad.evaluation.tables import find_metrics_tables, read_unit
from bids_uad.levels.participant.postprocess import histogram_table, metrics_row
from tests.evaluation.fake_tables import EDGES, Scan, write_participants

NO_PARTICIPANTS = read_participants()


def test_read_unit_returns_the_written_values(tmp_path):
    lesion = np.arange(len(EDGES))
    path = Scan("01", "T2w", "patchcore", session="b", n_lesion=lesion).write(tmp_path)
    write_participants(tmp_path, [{"participant_id": "sub-01", "group": "MS", "pathology": "MS"}])
    unit = read_unit(path, read_participants(tmp_path))
    assert (unit.subject, unit.session, unit.prefix) == ("sub-01", "b", "sub-01_ses-b")
    assert (unit.modality, unit.detector, unit.preset) == ("T2w", "patchcore", "default")
    assert unit.healthy is False
    assert unit.cohort == "MS"
    assert unit.has_lesion_mask
    np.testing.assert_array_equal(unit.edges, EDGES)
    np.testing.assert_array_equal(unit.n_lesion, lesion)
    assert unit.n_lesion.dtype == np.int64
    assert unit.lesion_volume_mm3 == lesion.sum()


def test_missing_and_empty_lesion_masks_differ(tmp_path):
    bare = read_unit(Scan("01").write(tmp_path), NO_PARTICIPANTS)
    assert bare.n_lesion is None
    assert not bare.has_lesion_mask
    assert bare.healthy is None
    assert np.isnan([bare.lesion_volume_mm3, bare.n_lesions, bare.n_false_components]).all()
    empty = read_unit(Scan("02", n_lesion=EDGES.astype(int) * 0).write(tmp_path), NO_PARTICIPANTS)
    assert empty.has_lesion_mask
    assert empty.n_lesion.sum() == 0


def test_find_metrics_tables_skips_hidden_files_and_other_participants(tmp_path):
    Scan("01").write(tmp_path)
    path = Scan("02", session="1").write(tmp_path)
    hidden = path.with_name(f".0a0b0c0d.{path.name}")
    hidden.write_text("half a file")
    assert [file.name[:6] for file in find_metrics_tables(tmp_path)] == ["sub-01", "sub-02"]
    assert find_metrics_tables(tmp_path, frozenset({"sub-02"})) == [path]


def test_deprecated_column_on_training_data_is_read(tmp_path):
    path = Scan("01", seen_in_training="validation").write(tmp_path)
    path.write_text(path.read_text().replace("\tseen_in_training\t", "\tmodel_has_met\t"))
    assert read_unit(path, NO_PARTICIPANTS).seen_in_training == "validation"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("disyre", "riad", "differ from the file name"),
        ("threshold_name", "other", "no column threshold_name"),
        ("\tunseen\t", "\tunseen\tmany", "not a number"),
        ("\tunseen\t401.0\t", "\tunseen\tinf\t", "brain_volume_mm3 is inf, not a finite number"),
    ],
)
def test_damaged_metrics_table_raises(tmp_path, old, new, problem):
    path = Scan("01").write(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=problem):
        read_unit(path, NO_PARTICIPANTS)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text[: len(text) // 2].rsplit("\t", 1)[0], "rows of different length"),
        (lambda text: text.rsplit("\n", 3)[0] + "\n", "do not increase to infinity"),
        (lambda text: text.replace("\t1\t", "\tx\t", 1), "not only numbers"),
        (lambda text: text.replace("\t1\t", "\t1.5\t", 1), "not whole numbers"),
        (lambda text: text.replace("\t1\t", "\tinf\t", 1), "not whole numbers"),
        (lambda text: text.replace("\t1\t", "\tnan\t", 1), "not whole numbers"),
        (lambda text: "", "no column score_lower"),
    ],
)
def test_damaged_histogram_raises(tmp_path, damage, problem):
    path = Scan("01").write(tmp_path)
    histogram = path.with_name(path.name.replace("metrics", "histogram"))
    histogram.write_text(damage(histogram.read_text()))
    with pytest.raises(InputError, match=problem) as caught:
        read_unit(path, NO_PARTICIPANTS)
    assert caught.value.path == str(histogram)


def test_missing_histogram_raises(tmp_path):
    path = Scan("01").write(tmp_path)
    path.with_name(path.name.replace("metrics", "histogram")).unlink()
    with pytest.raises(InputError, match=r"_histogram\.tsv: is missing"):
        read_unit(path, NO_PARTICIPANTS)


def test_read_unit_reads_the_tables_of_the_participant_level(tmp_path):
    from bids_uad.files import write_tsv

    edges = np.array([0, 0.1, 0.30000000000000004, np.inf])
    labels = np.zeros((4, 4, 4), int)
    labels[:2] = 1
    brain = np.ones((4, 4, 4), bool)
    lesion = np.zeros((4, 4, 4), bool)
    lesion[0] = True
    facts = {
        "source_image": "sub-01/anat/sub-01_T1w.nii.gz",
        "modality": "T1w",
        "detector": "disyre",
        "preset": "lite",
        "model_sha256": "0" * 64,
        "app_version": "0.1.0",
        "threshold": edges[2],
        "threshold_name": "max_dice",
        "seen_in_training": "no",
    }
    path = tmp_path / "sub-01" / "sub-01_space-SRI24_desc-T1wDisyre_metrics.tsv"
    write_tsv(path, metrics_row(facts, labels, brain, lesion, 3.0))
    counts = np.array([40, 5, 3]), np.array([1, 2, 13])
    table = histogram_table(edges, *counts)
    write_tsv(path.with_name(path.name.replace("metrics", "histogram")), table)
    unit = read_unit(path, NO_PARTICIPANTS)
    np.testing.assert_array_equal(unit.edges, edges[:-1])
    np.testing.assert_array_equal(unit.n_lesion, counts[1])
    assert unit.threshold == unit.edges[2]
    assert (unit.n_lesions, unit.n_lesions_detected, unit.n_components) == (1, 1, 1)
    # Dice and others are those of the mask, whose counts differ from the histogram's with a decision rule.
    row = subject_row(unit)
    assert (unit.anomaly_volume_mm3, unit.detected_volume_mm3) == (32, 16)
    assert row["dice"] == pytest.approx(2 * 16 / (32 + 16))
    assert (row["sensitivity"], row["precision"], row["fpr"]) == (1.0, 0.5, 16 / 48)
    # Tables of earlier versions, without the overlap, have plain thresholds.
    table = pd.read_csv(path, sep="\t").drop(columns="detected_volume_mm3")
    write_tsv(path, table)
    old = subject_row(read_unit(path, NO_PARTICIPANTS))
    assert old["dice"] == pytest.approx(2 * 13 / (3 + 13 + 16))
