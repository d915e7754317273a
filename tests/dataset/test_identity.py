from __future__ import annotations

import hashlib
import json

from bids_uad.dataset.participants import (
    by_content,
    by_name,
    identities,
    source_name,
)


def dataset(folder, **told):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text(json.dumps(told))
    return folder


def test_a_derivative_goes_by_the_name_of_its_source(tmp_path):
    raw = dataset(tmp_path / "raw", Name="A study (2)")
    link = "urn:bids-dataset:A%20study%20%282%29"
    derived = dataset(tmp_path / "derived", Name="bids_uad: A study", DatasetLinks={"raw": link})
    assert source_name(raw) == source_name(derived) == "A study (2)"
    assert identities(raw, ["sub-1"]) == identities(derived, ["sub-1"]) == {by_name("A study (2)", "sub-1")}
    assert source_name(tmp_path) is None
    assert identities(tmp_path, ["sub-1"]) == set()


def test_an_image_is_known_under_any_name(tmp_path):
    sha256 = hashlib.sha256(b"scan").hexdigest()
    log = dataset(tmp_path / "derived", Name="B") / "sub-9" / "ses-1" / "log"
    log.mkdir(parents=True)
    (log / "sub-9_ses-1_T1w.json").write_text(json.dumps({"fingerprint": {"input_sha256": sha256}}))
    assert identities(tmp_path / "derived", ["sub-9"]) == {by_name("B", "sub-9"), by_content(sha256)}


def test_hashes_tell_subjects_apart_and_nothing_else():
    hashes = {by_name("A", "sub-1"), by_name("A", "sub-2"), by_name("B", "sub-1"), by_content("sub-1")}
    assert len(hashes) == 4
    expected = hashlib.sha256(b"subject\nA\nsub-1").hexdigest()[:16]
    assert by_name("A", "sub-1") == expected
