"""Reading of the score tables of a cohort in batches and processes."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.errors import InputError
from bids_uad.evaluation import scores as reading
from bids_uad.evaluation.curves import Curves
from bids_uad.evaluation.scores import read_scores
from bids_uad.evaluation.tables import find_metrics_tables, read_unit
from tests.evaluation.fake_tables import Scan, write_cohort


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Eleven participants, two detectors, two modalities, one damaged table; read three at a time."""
    monkeypatch.setattr(reading, "BATCH_SIZE", 3)
    write_cohort(tmp_path, tmp_path, n_lesion=7, n_healthy=4, n_voxels=10_000)
    damaged = next((tmp_path / "sub-05").rglob("*T2wDisyre_metrics.tsv"))
    damaged.write_text("nothing")
    return tmp_path


def read(root, exclusions=None, **options):
    return read_scores(find_metrics_tables(root), read_participants(root), exclusions or {}, **options)


def same(one, other):
    pd.testing.assert_frame_equal(one.rows, other.rows)
    assert list(one.curves) == list(other.curves)
    for key, curves in one.curves.items():
        for each in fields(Curves):
            np.testing.assert_array_equal(
                getattr(curves, each.name), getattr(other.curves[key], each.name), strict=True
            )
    for name in ("present", "excluded", "unreadable", "contradictions"):
        assert getattr(one, name) == getattr(other, name)
    assert one.consistency.warnings() == other.consistency.warnings()


def test_read_scores_is_equal_with_several_processes(study):
    seen = []
    alone = read(study, {("sub-02", "T1w"): "blurred"}, progress=seen.append)
    assert seen == [12, 12, 12, 8]
    assert len(alone.rows) == 44 - 1 - 2
    assert len(alone.unreadable) == 1
    assert [missing.subject for missing in alone.excluded] == ["sub-02", "sub-02"]
    same(alone, read(study, {("sub-02", "T1w"): "blurred"}, processes=2))


def test_batches_add_up_to_the_sums_over_all_tables(study):
    found = read(study)
    participants = read_participants(study)
    whole = {}
    for path in find_metrics_tables(study):
        if path.read_text() != "nothing":
            unit = read_unit(path, participants)
            key = (unit.detector, unit.modality, unit.cohort)
            whole.setdefault(key, Curves(unit.edges, unit.threshold)).add(unit)
    assert found.curves.keys() == whole.keys()
    for key, curves in whole.items():
        for each in fields(Curves):
            np.testing.assert_allclose(
                getattr(found.curves[key], each.name), getattr(curves, each.name), rtol=1e-13
            )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("subject", ["02", "09"])
def test_tables_of_different_models_raise_in_any_batch(study, subject, processes):
    Scan(subject, "T1w", "disyre", sha256="f" * 64).write(study)
    with pytest.raises(InputError, match=f"(another model bundle|another threshold).*{'f' * 64}"):
        read(study, processes=processes)
