"""Image metadata from sessions.tsv, scans.tsv and inherited sidecars."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from bids import BIDSLayout

from bids_uad.dataset.image_metadata import image_metadata
from bids_uad.dataset.participants import read_participants
from bids_uad.errors import InputError
from tests.dataset.skeleton import write_dataset


@pytest.fixture
def raw(tmp_path):
    root = write_dataset(
        tmp_path / "raw",
        {
            "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz": {"Manufacturer": "Own", "FlipAngle": 8},
            "sub-01/ses-a/anat/sub-01_ses-a_acq-x_T1w.nii.gz": None,
            "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz": None,
            "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz": {"MagneticFieldStrength": 3},
        },
    )
    for name, content in {
        "T1w.json": {"MagneticFieldStrength": 1.5, "Manufacturer": "All", "EchoTime": 0.003},
        "acq-x_T1w.json": {"Manufacturer": "Protocol"},
        "sub-01/sub-01_T1w.json": {"EchoTime": 0.004, "Other": [1, 2]},
        "sub-01/ses-b/sub-01_ses-b_T1w.json": {"MagneticFieldStrength": 3.0, "Done": True},
    }.items():
        (root / name).write_text(json.dumps(content))
    (root / "sub-01/sub-01_sessions.tsv").write_text(
        "session_id\tdrug\tEchoTime\nses-a\tnone\tn/a\nses-b\tone \tsession\n"
    )
    (root / "sub-01/ses-b/sub-01_ses-b_scans.tsv").write_text(
        "filename\toperator\tdrug\nanat/sub-01_ses-b_T1w.nii.gz\tkim\ttwo\nanat/sub-01_ses-b_T2w.nii.gz\tn/a\t\n"
    )
    return root


IMAGES = (
    "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
    "sub-01/ses-a/anat/sub-01_ses-a_acq-x_T1w.nii.gz",
    "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
    "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz",
)


def test_sidecar_inheritance_agrees_with_pybids(raw):
    names = ["MagneticFieldStrength", "Manufacturer", "FlipAngle", "Other", "Done"]
    found = image_metadata(raw, [f"bids:raw:{image}" for image in IMAGES], names, read_participants(raw))
    layout = BIDSLayout(raw, validate=False)
    for image in IMAGES:
        metadata = layout.get_metadata(raw / image)
        for name in names:
            value = found.loc[f"bids:raw:{image}", name]
            if name not in metadata:
                assert pd.isna(value)
            elif isinstance(metadata[name], str):
                assert value == metadata[name]
            else:
                assert json.loads(value) == metadata[name]
    # 3 and 3.0 tesla are one field strength.
    assert found["MagneticFieldStrength"].tolist() == ["1.5", "1.5", "3", "3"]


def test_sessions_and_scans_tables_override_sidecars(raw):
    found = image_metadata(raw, IMAGES, ["drug", "operator", "EchoTime", "nothing"], read_participants(raw))
    assert list(found) == ["drug", "operator", "EchoTime"]
    assert found["drug"].tolist() == ["none", "none", "one", "one"]
    assert found["operator"].fillna("-").tolist() == ["-", "-", "kim", "-"]
    assert found["EchoTime"].fillna("-").tolist() == ["0.004", "0.004", "session", "session"]


def test_image_metadata_is_empty_without_a_dataset(tmp_path):
    images = ["sub-01/anat/sub-01_T1w.nii.gz"]
    assert image_metadata(tmp_path / "none", images, ["Manufacturer"], read_participants()).empty


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("sub-01/ses-a/sub-01_ses-a_scans.tsv", "file\toperator\nx\ty\n", "no column filename"),
        ("sub-01/sub-01_T1w.json", "{", "not valid JSON"),
        ("sub-01/sub-01_T1w.json", "[]", "not a JSON object"),
    ],
)
def test_damaged_files_raise(raw, name, text, problem):
    (raw / name).write_text(text)
    with pytest.raises(InputError, match=problem) as error:
        image_metadata(raw, IMAGES, ["operator"], read_participants(raw))
    assert name.rsplit("/", 1)[-1] in str(error.value)
