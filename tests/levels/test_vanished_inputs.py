"""Inputs that are removed, or whose disk is taken away, while the participant level runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad import space
from bids_uad.errors import InputError
from bids_uad.files import CHECKSUMS
from bids_uad.levels.participant import executors, plan, run
from bids_uad.levels.participant import interfaces as detection
from bids_uad.preprocessing import interfaces
from bids_uad.preprocessing.resampling import write_itk
from tests.dataset.skeleton import write_image, write_mask

# Fixtures of the module with the stand-ins.
from tests.levels.test_participant_run import T1W, T2W, bench, reference, stand_ins  # noqa: F401

OTHER = "sub-02/anat/sub-02_T1w.nii.gz"
DESCRIPTION = json.dumps({"Name": "Others", "BIDSVersion": "1.9.0", "DatasetType": "derivative"})


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.fixture
def dataset(bench):  # noqa: F811
    """Two participants, another pipeline's image, mask and transform, and a lesion mask of the first."""
    bench.dataset(T1W, T2W, OTHER)
    for name in ("lesions", "fmriprep"):
        (bench.folder / name).mkdir()
        (bench.folder / name / "dataset_description.json").write_text(DESCRIPTION)
    start = bench.folder / "fmriprep/sub-01/anat/sub-01"
    image = write_image(Path(f"{start}_desc-preproc_T1w.nii.gz"))
    mask = write_mask(Path(f"{start}_desc-brain_mask.nii.gz"))
    xfm = write_itk(f"{start}_from-T1w_to-SRI24_mode-image_xfm.txt", np.eye(4))
    atlas = bench.folder / "fmriprep/tpl-SRI24/anat/tpl-SRI24_desc-brain_T1w.json"
    atlas.parent.mkdir(parents=True)
    atlas.write_text(json.dumps({"ReferenceSHA256": "0" * 64}))
    lesion = write_mask(bench.folder / "lesions/sub-01/anat/sub-01_label-lesion_mask.nii.gz")
    bench.files = {
        "raw": bench.raw / T1W,
        "second": bench.raw / T2W,
        "image": image,
        "mask": mask,
        "transform": xfm,
        "lesion": lesion,
    }
    return bench


def remove(path: Path) -> None:
    path.unlink()


def drop(path: Path) -> None:
    """Leave what `datalad drop` leaves."""
    path.unlink()
    path.symlink_to("../../.git/annex/objects/x/SHA256E-s1--a.nii.gz")


def vanish_after_the_search(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Remove a file after the inputs were found and read, and before they are hashed."""
    original = plan.collect

    def wrapped(config, check, subjects):
        collection = original(config, check, subjects)
        CHECKSUMS.clear()
        if subjects == ["01"]:
            path.unlink(missing_ok=True)
        return collection

    monkeypatch.setattr(executors, "START_METHOD", "fork")  # worker processes inherit the change
    monkeypatch.setattr(plan, "collect", wrapped)


def vanish_before_the_workflow(monkeypatch: pytest.MonkeyPatch, path: Path, how) -> None:
    """Take a file away after the inputs were hashed, and before the workflow runs."""
    original = run.build_workflow

    def wrapped(tasks, context):
        if tasks[0].unit.subject == "01":
            how(path)
        return original(tasks, context)

    monkeypatch.setattr(run, "build_workflow", wrapped)


def check_run(bench, capfd, path: Path, message: str, *options: str) -> None:  # noqa: F811
    given = [f"{name}={bench.folder / name}" for name in ("lesions", "fmriprep")]
    assert bench.run("-d", *given, *options, models=["none"]) == 1
    captured = capfd.readouterr()
    stderr = squeezed(captured.err)
    assert "Traceback" not in captured.err + captured.out
    assert "requires" not in captured.err
    assert stderr.count(squeezed(f"{path}: {message}")) >= 1
    assert (bench.out / "sub-02/log/sub-02_T1w.json").is_file()
    assert not (bench.out / "sub-01/log/sub-01_T1w.json").exists()
    assert not list((bench.out / "sub-01").rglob("*.nii.gz"))


@pytest.mark.parametrize("name", ["raw", "second", "image", "mask", "transform", "lesion"])
def test_input_that_vanishes_before_it_is_hashed(dataset, monkeypatch, capfd, name):
    path = dataset.files[name]
    if name == "second":
        vanish_after_the_search(monkeypatch, path)
        given = [f"{other}={dataset.folder / other}" for other in ("lesions", "fmriprep")]
        assert dataset.run("-d", *given, models=["none"]) == 1
        stderr = capfd.readouterr().err
        assert squeezed(f"{path}: there is no such file (any more)") in squeezed(stderr)
        assert "Traceback" not in stderr
        assert (dataset.out / "sub-01/log/sub-01_T1w.json").is_file()
        assert not (dataset.out / "sub-01/log/sub-01_T2w.json").exists()
        return
    vanish_after_the_search(monkeypatch, path)
    check_run(dataset, capfd, path, "there is no such file (any more)")


@pytest.mark.parametrize("name", ["image", "mask", "transform", "lesion"])
def test_input_that_vanishes_before_its_step(dataset, monkeypatch, capfd, name):
    path = dataset.files[name]
    vanish_before_the_workflow(monkeypatch, path, remove)
    check_run(dataset, capfd, path, "there is no such file (any more)")


def test_anchor_that_is_dropped_before_its_step(dataset, monkeypatch, capfd):
    path = dataset.files["raw"]
    for name in ("image", "mask", "transform"):
        dataset.files[name].unlink()
    vanish_before_the_workflow(monkeypatch, path, drop)
    check_run(
        dataset, capfd, path, "the file is a link to content that is not here; fetch it with `datalad get`"
    )


def test_anchor_that_vanishes_before_it_is_planned(dataset, monkeypatch, capfd):
    path, original = dataset.files["raw"], run.plan_tasks

    def wrapped(collection, participants, context):
        if collection.subjects == ("01",):
            path.unlink(missing_ok=True)
        return original(collection, participants, context)

    monkeypatch.setattr(run, "plan_tasks", wrapped)
    check_run(dataset, capfd, path, "there is no such file (any more)")


def test_run_whose_inputs_all_vanish_returns_no_input(bench, monkeypatch, capfd):  # noqa: F811
    bench.dataset(T1W, T2W)
    vanish_after_the_search(monkeypatch, bench.raw / T1W)
    assert bench.run(models=["none"]) == 66
    stderr = capfd.readouterr().err
    assert squeezed(stderr).count(squeezed(f"{bench.raw / T1W}: there is no such file (any more)")) == 1
    assert "Traceback" not in stderr
    assert not list(bench.out.rglob("*.nii.gz"))


def inputs_of_nodes(folder: Path) -> dict[str, tuple[type, dict[str, str], str]]:
    """Each interface that reads an input of the user, and the input that is not there."""
    image = str(write_image(folder / "image.nii.gz"))
    mask = str(write_mask(folder / "mask.nii.gz"))
    xfm = str(write_itk(folder / "xfm.txt", np.eye(4)))
    volume = np.zeros(space.SHAPE, np.float32)
    volume[100:120, 100:120, 60:80] = 100
    nib.save(space.to_image(volume), folder / "atlas.nii.gz")
    atlas = str(folder / "atlas.nii.gz")
    template = {"template": atlas, "template_mask": atlas}
    target = {"reference": atlas, "reference_mask": atlas}
    anchor = {"anchor": image, "anchor_mask": mask, "anchor_xfm": xfm, "skull_stripped": False}
    scan = {"in_file": image, "mask": mask}
    return {
        "conform": (interfaces.Conform, {}, "in_file"),
        "brain mask": (
            interfaces.BrainMask,
            {"in_file": image, **template, "program": "template"},
            "external_mask",
        ),
        "register": (interfaces.RegisterToReference, {**scan, **target}, "external_xfm"),
        "register to anchor": (interfaces.RegisterToAnchor, {"in_file": image, **anchor}, "external_xfm"),
        "raw": (interfaces.RegisterRaw, {**scan, "to_sri24": xfm}, "raw"),
        "from raw": (interfaces.RegisterRaw, {**scan, "to_sri24": xfm, "raw": image}, "from_raw"),
        "lesion": (interfaces.ResampleLesion, {"to_sri24": xfm}, "in_file"),
        "lesion transform": (interfaces.ResampleLesion, {"in_file": mask, "to_sri24": xfm}, "xfm"),
        "lesion in SRI24": (detection.AlignMask, {}, "in_file"),
    }


@pytest.mark.parametrize(
    "node",
    [
        "conform",
        "brain mask",
        "register",
        "register to anchor",
        "raw",
        "from raw",
        "lesion",
        "lesion transform",
        "lesion in SRI24",
    ],
)
def test_interfaces_name_the_missing_input(tmp_path, monkeypatch, node):
    monkeypatch.chdir(tmp_path)
    interface, inputs, field = inputs_of_nodes(tmp_path)[node]
    missing = str(tmp_path / "gone.nii.gz")
    made = interface(**inputs, **{field: missing})
    with pytest.raises(InputError, match=r"there is no such file \(any more\)") as caught:
        made.run()
    assert caught.value.path == missing
