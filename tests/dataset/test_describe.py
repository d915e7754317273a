"""Dataset-level files of the derivatives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bids_uad.dataset.describe import ModelEntry, dataset_link, describe_dataset, refuse_foreign
from bids_uad.errors import ConfigError
from tests.dataset.skeleton import write_dataset


def test_describe_dataset_is_repeatable_and_keeps_entries_of_earlier_runs(tmp_path):
    raw = write_dataset(tmp_path / "raw", {})
    out = tmp_path / "raw" / "derivatives" / "uad"

    def describe(*models, **descriptions):
        describe_dataset(out, raw, {}, [ModelEntry(name, "0.1.0", "a" * 64) for name in models], descriptions)
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    first = describe("one", preproc="image")
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert describe("one", preproc="image") == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    both = describe("two", brain="mask")
    described = json.loads(both["dataset_description.json"])
    assert [entry["Name"] for entry in described["GeneratedBy"]] == ["bids_uad", "one", "two"]
    assert described["DatasetLinks"] == {"raw": "../.."}
    assert described["License"] == "CC0"
    assert both["descriptions.tsv"].decode().splitlines() == [
        "desc_id\tdescription",
        "desc-brain\tmask",
        "desc-preproc\timage",
    ]
    (out / ".bidsignore").write_text("mine\n")
    assert describe()[".bidsignore"].decode().startswith("mine\n*.html\n")


def test_dataset_link_has_no_absolute_path(tmp_path):
    far = Path("/somewhere/else/entirely/raw")
    near = tmp_path / "out"
    assert dataset_link(tmp_path / "raw", near, {}) == "../raw"
    assert dataset_link(Path("/data"), Path("/out"), {}) == "../data"
    assert dataset_link(far, near, {"DatasetDOI": "10.1/x"}) == "doi:10.1/x"
    assert dataset_link(far, near, {"Name": "A b"}) == "urn:bids-dataset:A%20b"
    assert "somewhere" not in dataset_link(far, near, {})


def test_refuse_foreign_rejects_datasets_that_the_app_did_not_write(tmp_path):
    write_dataset(tmp_path / "raw", {})
    with pytest.raises(ConfigError, match="already holds another dataset"):
        refuse_foreign(tmp_path / "raw")
    (tmp_path / "raw" / "dataset_description.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        refuse_foreign(tmp_path / "raw")
    refuse_foreign(tmp_path / "nowhere")
