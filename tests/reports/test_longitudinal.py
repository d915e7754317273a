"""Comparison of sessions: which are compared, in which order, and what the table and the figures show."""

from __future__ import annotations

import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad.dataset.participants import Participants
from bids_uad.evaluation.longitudinal import CHANGE_LIMITS, MAX_RESIDUAL_MM, ChangeLimit
from bids_uad.files import write_tsv
from bids_uad.levels.participant.postprocess import component_table, label_components
from bids_uad.reports.derivatives import find_images
from bids_uad.reports.figures.display import Volume
from bids_uad.reports.figures.sessions import COLOURS, SessionView, draw_sessions
from bids_uad.reports.longitudinal import (
    Residuals,
    compare_series,
    find_series,
    missing_sessions,
    order_sessions,
    summary_rows,
    write_comparisons,
)

SIDE = 48
SESSIONS = ("1", "2", "3")


def write_session(out, session, *boxes, shift=0.0, model="m1", prefix=""):
    """Write a textured brain, moved along the first axis by `shift` mm, and components."""
    x, y, z = np.meshgrid(*[np.arange(-SIDE / 2, SIDE / 2)] * 3, indexing="ij")
    place = x - shift
    brain = (place / 20) ** 2 + (y / 18) ** 2 + (z / 16) ** 2 < 1
    scan = brain * (1 + 0.4 * np.sin(place / 3) * np.cos(y / 4) * np.sin(z / 3.5 + place / 9))
    mask = np.zeros(brain.shape, bool)
    for box in boxes:
        mask[box] = True
    labels = label_components(mask)
    start = out / "sub-01" / f"ses-{session}" / "anat" / f"sub-01_ses-{session}{prefix}_space-SRI24"
    start.parent.mkdir(parents=True, exist_ok=True)
    images = {"desc-preproc_T1w": scan, "desc-brain_mask": brain, "seg-T1wPls_dseg": labels}
    for name, data in images.items():
        image = nib.Nifti1Image(data.astype(np.float32), np.eye(4))
        nib.save(image, start.with_name(f"{start.name}_{name}.nii.gz"))
    write_tsv(start.with_name(f"{start.name}_seg-T1wPls_dseg.tsv"), component_table(labels, scan, np.eye(4)))
    metrics = pd.DataFrame([{"detector": "pls", "model_sha256": model, "threshold": 2.5}])
    write_tsv(start.with_name(f"{start.name}_desc-T1wPls_metrics.tsv"), metrics)


@pytest.fixture(autouse=True)
def fixed_limit(monkeypatch):
    monkeypatch.setitem(CHANGE_LIMITS, "T1w", ChangeLimit(volume=300.0, fraction=0.5, single=300.0))


def compare(out, order=SESSIONS, unusable=None):
    series = find_series(find_images(out, "01"), order, unusable or {})
    return [compare_series(own, Residuals()) for own in series]


BLOCK = (slice(10, 26), slice(14, 30), slice(18, 30))
OTHER = (slice(30, 40), slice(14, 34), slice(16, 32))


def test_misaligned_sessions_are_not_matched(tmp_path):
    write_session(tmp_path, "1", BLOCK)
    write_session(tmp_path, "2", BLOCK, shift=2 * MAX_RESIDUAL_MM)
    write_session(tmp_path, "3", BLOCK, OTHER, shift=2 * MAX_RESIDUAL_MM)
    (comparison,) = compare(tmp_path)
    table = comparison.table()
    assert table["not_matched"].notna().tolist() == [True, False, False]
    assert table["residual_mm"].tolist() == pytest.approx([2 * MAX_RESIDUAL_MM, 0, 0], abs=0.2)
    assert "residual misalignment of 4.0 mm, above 2 mm" in table["not_matched"][0]
    assert table.loc[0, "lesion":].isna().all()
    assert table["change"].tolist()[1:] == ["new", "unchanged"]
    # The lesion is another one before the gap.
    assert len(comparison.volumes()) == 3
    assert [row["not_matched"] != "" for row in summary_rows(comparison)] == [True, False]


@pytest.mark.parametrize(
    ("model", "unusable", "reason"),
    [
        ("m2", {}, "models or thresholds differ"),
        ("m1", {("sub-01_ses-2", "T1w"): "excluded: motion"}, "session 2: excluded: motion"),
        ("m1", {("sub-01_ses-2", "T2w"): "excluded: motion"}, None),
    ],
)
def test_sessions_of_different_models_or_quality_are_not_matched(tmp_path, model, unusable, reason):
    write_session(tmp_path, "1", BLOCK)
    write_session(tmp_path, "2", BLOCK, model=model)
    (comparison,) = compare(tmp_path, unusable=unusable)
    (found,) = comparison.table()["not_matched"]
    assert pd.isna(found) if reason is None else found.startswith(reason)


def test_images_are_compared_with_those_of_equal_entities(tmp_path):
    for session in ("1", "2"):
        write_session(tmp_path, session, BLOCK, prefix="_acq-a")
    write_session(tmp_path, "2", BLOCK, prefix="_acq-b")
    comparisons = compare(tmp_path)
    assert [comparison.series.prefix for comparison in comparisons] == ["sub-01_acq-a"]
    stale = tmp_path / "sub-01/anat/sub-01_space-SRI24_seg-T1wPls_desc-longitudinal_lesions.tsv"
    stale.parent.mkdir()
    stale.touch()
    write_comparisons(tmp_path, "01", comparisons)
    name = "sub-01_acq-a_space-SRI24_seg-T1wPls_desc-longitudinal_lesions"
    assert sorted(path.name for path in stale.parent.iterdir()) == [f"{name}.json", f"{name}.tsv"]
    write_comparisons(tmp_path, "01", [])
    assert list(stale.parent.iterdir()) == []


def test_volumes_are_those_of_the_components(tmp_path):
    write_session(tmp_path, "1", BLOCK, OTHER)
    write_session(tmp_path, "2", BLOCK)
    write_session(tmp_path, "3")
    (comparison,) = compare(tmp_path)
    sizes = [float(np.prod([part.stop - part.start for part in box])) for box in (OTHER, BLOCK)]
    assert comparison.volumes().to_numpy().tolist() == [[sizes[0], 0, 0], [sizes[1], sizes[1], 0]]
    assert comparison.table()["change"].tolist() == ["gone", "unchanged", "gone"]


def test_figure_has_a_slice_of_each_changed_lesion(tmp_path):
    """A large lesion does not take the slices of small ones; outlines have the colour of the change."""
    brain = np.ones((30, 30, 60), bool)
    masks = {name: np.zeros_like(brain) for name in ("grown", "gone", "unchanged")}
    masks["grown"][3:25, 3:25, 5:35] = True
    masks["grown"][2:26, 2:26, 20] = True
    masks["gone"][10:12, 10:12, 50] = True
    masks["unchanged"][3:25, 3:25, 40:45] = True
    scan = Volume(brain.astype(np.float32), np.eye(4))
    views = [SessionView(name, scan, masks) for name in ("Session 1", "Session 2")]
    text = draw_sessions(tmp_path / "sessions.svg", views, brain, title="PLS on T1w").read_text()
    marked = re.findall(r'fill="#ffb454" font-weight="bold">z = (\d+)<', text)
    assert sorted(set(marked)) == ["20", "50"]
    assert text.count(f'stroke="{COLOURS["gone"]}" stroke-width="1.60" stroke-dasharray') == 2
    assert "gone (outline of the session before)" in text
    assert f'stroke="{COLOURS["new"]}"' not in text


def test_sessions_are_in_the_order_of_their_times():
    times = {"b": "2020-01-02T12:00:00", "a": "2021-01-01", "c": "2020-01-01T12:00:00"}
    rows = {f"ses-{session}": {"acq_time": time} for session, time in times.items()}
    people = Participants({"sub-01": {None: {}, **rows}})
    assert order_sessions(people, "01", "abc") == [("c", 0.0), ("b", 1.0), ("a", 365.5)]
    for session in ("ses-a", "ses-b"):
        rows[session] = {"acq_time": "n/a"}
    labels = ["10", "2", "pre", "1"]
    assert order_sessions(people, "01", labels) == [("1", None), ("2", None), ("10", None), ("pre", None)]


def test_failed_sessions_are_listed_with_their_errors(tmp_path):
    for session in ("1", "3"):
        write_session(tmp_path, session, BLOCK)
    (comparison,) = compare(tmp_path)
    statuses = [
        {"image": "sub-01_ses-4_T1w", "message": "truncated"},
        {"image": "sub-01_ses-4_T2w", "message": "other image"},
        {"image": "sub-01_ses-1_T1w", "message": ""},
    ]
    assert missing_sessions(comparison.series, SESSIONS, statuses) == [("2", ""), ("4", "truncated")]
