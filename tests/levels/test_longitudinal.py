"""Participants with several sessions: table of lesions, and reports, over separate runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_uad import space
from bids_uad.cli.main import main
from bids_uad.dataset.sidecars import LONGITUDINAL_COLUMNS
from bids_uad.files import CHECKSUMS
from bids_uad.images import save_image
from bids_uad.levels.participant import run, workflow
from bids_uad.methods import registry
from tests.dataset.skeleton import write_dataset
from tests.integration.test_whole_run import validate
from tests.levels.fakes import FakeDetect, fake_bundle, fake_reference, init_fake_preproc_wf

SMALL = (slice(101, 109), slice(101, 109), slice(61, 69))
LARGE = (slice(101, 120), slice(101, 113), slice(61, 89))
ANEW = (slice(115, 128), slice(116, 128), slice(61, 75))
LOST = (slice(102, 113), slice(117, 129), slice(76, 89))
LESIONS = {"1": (SMALL, LOST), "2": (LARGE, ANEW), "10": (LARGE,)}
"""Lesions of each session; their order by label is 1, 10, 2."""
TABLE = "sub-01/anat/sub-01_space-SRI24_seg-T1wDisyre_desc-longitudinal_lesions.tsv"


class PaintLesions(FakeDetect):
    """Write a map of the lesions of a session."""

    def _run_interface(self, runtime):
        scores = np.zeros(space.SHAPE, np.float32)
        for box in LESIONS[re.search("ses-([0-9]+)", self.inputs.key)[1]]:
            scores[box] = 1
        self._results["out_file"] = str(save_image(space.to_image(scores), Path(runtime.cwd) / "map.nii"))
        return runtime


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Run session 1, then sessions 2 and 10, the last of which is damaged, and then session 10, repaired."""
    folder = tmp_path_factory.mktemp("study")
    reference = fake_reference(folder)
    model = fake_bundle(folder / "disyre-T1w", "disyre", "T1w")
    raw, out = folder / "raw", folder / "out"
    scans = [raw / f"sub-01/ses-{session}/anat/sub-01_ses-{session}_T1w.nii.gz" for session in LESIONS]
    write_dataset(raw, {scan.relative_to(raw).as_posix(): {"SkullStripped": True} for scan in scans})
    whole = scans[2].read_bytes()
    codes, states = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "init_preproc_wf", init_fake_preproc_wf)
        patch.setattr(workflow, "Detect", PaintLesions)
        patch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
        patch.setattr(registry, "has_native_bf16", lambda: False)
        for sessions in (["1"], ["2", "10"], ["10"]):
            CHECKSUMS.clear()
            scans[2].write_bytes(whole[:200] if len(sessions) == 2 else whole)
            options = ["-w", str(folder / "work"), "--nprocs", "1", "--device", "cpu", "--no-viewer"]
            options += ["--models", str(model), "--session-label", *sessions]
            codes.append(main([str(raw), str(out), "participant", *options]))
            kept = folder / f"after-{sessions[-1]}-{len(sessions)}"
            shutil.copytree(out, kept)
            states.append(kept)
    return codes, states


def table_of(out):
    return pd.read_csv(out / TABLE, sep="\t", na_values="n/a").set_index(["session_after", "change"])


def test_failed_session_fails_the_run_but_not_the_others(study):
    assert study[0] == [0, 1, 0]


def test_one_session_has_one_report_and_no_table(study):
    out = study[1][0]
    assert [path.name for path in out.glob("*.html")] == ["sub-01.html"]
    assert not list(out.rglob("*longitudinal*"))


def volume(*boxes):
    return sum(int(np.prod([part.stop - part.start for part in box])) for box in boxes)


def test_table_of_two_sessions_processed_in_separate_runs(study):
    table = table_of(study[1][1])
    assert list(table.reset_index()[list(LONGITUDINAL_COLUMNS)].columns) == list(LONGITUDINAL_COLUMNS)
    assert table.index.to_list() == [(2, "grown"), (2, "new"), (2, "gone")]
    assert (table["residual_mm"] < 0.1).all()
    assert table["volume_before_mm3"].tolist() == [volume(SMALL), 0, volume(LOST)]
    assert table["volume_after_mm3"].tolist() == [volume(LARGE), volume(ANEW), 0]
    assert table["overlap_mm3"].tolist() == [volume(SMALL), 0, 0]
    centroid = table.loc[(2, "new"), ["centroid_x", "centroid_y", "centroid_z"]].tolist()
    assert centroid == pytest.approx([-121, 239 - 121.5, 67.5])


def test_report_names_the_failed_session(study):
    out = study[1][1]
    (note,) = re.findall('<p class="note">(Session.*?)</p>', (out / "sub-01.html").read_text())
    assert note.startswith("Session 10 is not compared, since it has no outputs of this detector: ")
    assert "sub-01_ses-10_T1w.nii.gz" in note
    assert sorted(path.name for path in out.glob("*.html")) == [
        "sub-01.html",
        "sub-01_ses-1.html",
        "sub-01_ses-2.html",
    ]


def test_later_session_is_added_in_the_order_of_numbers(study):
    out = study[1][2]
    table = table_of(out)
    assert table.index.to_list() == [
        (2, "grown"),
        (2, "new"),
        (2, "gone"),
        (10, "unchanged"),
        (10, "gone"),
    ]
    assert table["lesion"].tolist() == [1, 2, 3, 1, 2]
    sidecar = json.loads((out / TABLE).with_suffix(".json").read_text())
    assert sidecar["Sessions"] == ["1", "2", "10"]
    assert set(table.reset_index().columns) <= set(sidecar)
    text = (out / "sub-01.html").read_text()
    assert "is not compared" not in text
    assert "Change between sessions" in text


def test_each_session_has_a_report_and_that_of_the_participant_links_to_them(study):
    out = study[1][2]
    whole = (out / "sub-01.html").read_text()
    for session in LESIONS:
        page = (out / f"sub-01_ses-{session}.html").read_text()
        assert f"T1w, session {session}</h2>" in page
        assert not [other for other in LESIONS if other != session and f"session {other}<" in page]
        assert "Anomaly map" in page
        (target,) = re.findall(rf'href="(sub-01_ses-{session}.html#[^"]+)"', whole)
        assert f'id="{target.partition("#")[2]}"' in page
    assert "Anomaly map" not in whole
    assert whole.count("data:image/svg+xml") == 2


def test_outputs_are_valid(study):
    assert [issue for issue in validate(study[1][2]) if issue["severity"] == "error"] == []
    descriptions = pd.read_csv(study[1][2] / "descriptions.tsv", sep="\t")
    assert "desc-longitudinal" in descriptions["desc_id"].tolist()
