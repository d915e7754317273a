"""Every packaged model on a real T1w and a real T2w scan."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad.engine.bundle import packaged_bundles
from tests.integration.conftest import bids_uad

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "brains"
SUBJECT = "umclcs07"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans of ../shared"),
]


def test_all_models_score_real_scans(tmp_path):
    out = tmp_path / "out"
    done = bids_uad(
        REAL,
        out,
        "participant",
        "--participant-label",
        SUBJECT,
        "-w",
        tmp_path / "work",
        "--nprocs",
        "2",
        "--models",
        "all",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = packaged_bundles()
    tables = [pd.read_csv(path, sep="\t") for path in out.rglob("*_metrics.tsv")]
    found = {f"{table.detector[0].split('+')[0]}-{table.modality[0]}-{table.preset[0]}" for table in tables}
    assert found == set(names)
    for path in out.rglob("*_anomalymap.nii.gz"):
        scores = np.asarray(nib.load(path).dataobj)
        brain = path.with_name(path.name.split("_desc-")[0] + "_desc-brain_mask.nii.gz")
        inside = np.asarray(nib.load(brain).dataobj) > 0
        assert np.isfinite(scores).all()
        assert scores[inside].std() > 0
    assert all(table.anomaly_volume_mm3[0] < 0.2 * table.brain_volume_mm3[0] for table in tables)
