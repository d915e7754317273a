"""Lesion masks are matched to images by name and grid, and their content is checked."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_uad.config import RunConfig
from bids_uad.dataset.inputs import collect
from bids_uad.dataset.lesion_masks import applicable_masks, find_transforms, written_mask
from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.preprocessing.check import read_lesion
from bids_uad.space import AFFINE as SRI24_AFFINE
from bids_uad.space import SHAPE as SRI24_SHAPE
from tests.dataset.skeleton import AFFINE, SHAPE, write_dataset, write_image, write_mask

OTHER = AFFINE + np.array([[0, 0, 0, 3.0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
THIRD = AFFINE + np.array([[0, 0, 0, 0.0], [0, 0, 0, 5.0], [0, 0, 0, 0], [0, 0, 0, 0]])
T1W, T2W, FLAIR, SRI24 = (AFFINE, SHAPE), (OTHER, SHAPE), (THIRD, SHAPE), (SRI24_AFFINE, SRI24_SHAPE)
MANUAL = "_label-lesion_desc-manual_mask"
MASK = "_label-lesion_mask"


def place(name: str) -> str:
    """Return the path of a file of sub-01, by its name without `sub-01`."""
    session = next((f"{part}/" for part in name.split("_") if part.startswith("ses-")), "")
    return f"sub-01/{session}anat/sub-01{name}.nii.gz"


@pytest.fixture
def resolve(tmp_path):
    """Return a function that writes images and masks (name: (affine, shape)) of sub-01 and collects them."""

    def run(images, masks, write=lambda _: None, **options):
        root = tmp_path / "lesions"
        (root / "sub-01").mkdir(parents=True)
        for name, (affine, shape) in masks.items():
            write_mask(root / (name if name.startswith("sub-") else place(name)), affine, shape)
        raw = write_dataset(tmp_path / "raw", {})
        for name, (affine, shape) in images.items():
            write_image(raw / place(name), affine, shape)
        config = RunConfig(
            raw,
            tmp_path / "out",
            ("participant",),
            tmp_path / "work",
            derivatives={"lesions": root},
            **options,
        )
        write(config)
        return collect(config)

    return run


SESSION = {"_T1w": T1W, "_T2w": T2W}


@pytest.mark.parametrize(
    ("masks", "used", "provider"),
    [
        ({MASK: T1W}, MASK, "T1w"),
        ({MASK: T2W}, MASK, "T2w"),
        ({"_space-T2w_label-lesion_mask": T2W, MASK: T1W}, MASK, "T1w"),
        ({"_space-SRI24_label-lesion_mask": SRI24, "_label-lesion_roi": T1W}, "_label-lesion_roi", "T1w"),
        ({"_space-SRI24_label-lesion_mask": SRI24}, "_space-SRI24_label-lesion_mask", "T1w"),
        (dict.fromkeys(["_label-lesion_desc-b_mask", MANUAL], T1W), MANUAL, "T1w"),
        (dict.fromkeys(["_label-lesion_desc-isen_mask", MASK], T1W), MASK, "T1w"),
        ({"_seg-lesion_mask": T1W}, "_seg-lesion_mask", "T1w"),
    ],
)
def test_mask_is_matched_to_the_grid_of_an_image(resolve, masks, used, provider):
    found = resolve(SESSION, masks)
    assert not found.problems
    lesion = found.lesions["sub-01_T1w"]
    assert found.lesions == dict.fromkeys(["sub-01_T1w", "sub-01_T2w"], lesion)
    assert lesion.path.name == f"sub-01{used}.nii.gz"
    assert lesion.provider == f"sub-01_{provider}"
    assert lesion.on_atlas == ("SRI24" in used)
    assert not lesion.is_empty


def test_mask_stored_in_another_voxel_order_is_on_the_same_grid(resolve):
    image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE)
    flipped = nib.as_closest_canonical(image).as_reoriented([[1, -1], [0, 1], [2, -1]])
    found = resolve(SESSION, {MASK: (flipped.affine, flipped.shape)})
    assert found.lesions["sub-01_T1w"].provider == "sub-01_T1w"


@pytest.mark.parametrize(
    "grid", [(np.eye(4), SHAPE), (AFFINE, (24, 24, 23)), (OTHER + np.eye(4) * 0.5, SHAPE)]
)
def test_mask_on_another_grid_is_reported(resolve, grid):
    found = resolve(SESSION, {MASK: grid})
    assert not found.lesions
    assert len(found.units) == 2
    assert f"sub-01{MASK}.nii.gz: lesion mask on the grid of none" in found.problems[0].message


def test_mask_on_the_grid_of_a_flair_is_resolved_with_the_flair(resolve):
    found = resolve(SESSION | {"_FLAIR": FLAIR}, {"_space-FLAIR_label-lesion_mask": FLAIR})
    assert set(found.lesions) == {"sub-01_T1w", "sub-01_T2w", "sub-01_FLAIR"}
    assert {(lesion.provider, lesion.other) for lesion in found.lesions.values()} == {("sub-01_FLAIR", None)}


@pytest.mark.parametrize("other", ["FLAIR", "PDw"])
def test_mask_on_the_grid_of_an_image_that_is_not_scored_is_registered(resolve, other):
    images = SESSION | {f"_{other}": FLAIR}
    found = resolve(images, {f"_space-{other}_label-lesion_mask": FLAIR}, modalities=("T1w", "T2w"))
    lesion = found.lesions["sub-01_T1w"]
    assert lesion.provider == "sub-01_T1w"
    assert lesion.other.name == f"sub-01_{other}.nii.gz"
    assert lesion.transform is None


def test_mask_in_another_space_is_resolved_with_a_transform(resolve, caplog, monkeypatch):
    def write(config):
        folder = config.derivatives["lesions"] / "sub-01" / "anat"
        names = [f"from-{ends}" for ends in ("MNI_to-T1w", "T1w_to-MNI", "X_to-T1w")]
        for name in [*names, "run-2_from-MNI_to-T1w"]:
            (folder / f"sub-01_{name}_mode-image_xfm.h5").touch()

    monkeypatch.setattr(logging.getLogger("bids_uad"), "propagate", True)
    caplog.set_level(logging.INFO, "bids_uad")
    found = resolve(SESSION, {"_space-MNI_label-lesion_mask": FLAIR}, write=write)
    lesion = found.lesions["sub-01_T1w"]
    assert lesion.provider == "sub-01_T1w"
    assert lesion.transform.name == "sub-01_from-MNI_to-T1w_mode-image_xfm.h5"
    assert f"resampled to sub-01_T1w with the composite transform {lesion.transform}" in caplog.text
    assert len(lesion.files) == 2


@pytest.mark.parametrize(
    ("transforms", "used"),
    [
        ({"own": ["sub-01_from-M_to-T1w.txt"]}, 0),
        ({"own": ["sub-01_from-M_to-T1w.txt"], "fmriprep": ["sub-01_from-M_to-T1w.h5"]}, 1),
        ({"fmriprep": ["sub-01_from-M_to-T1w.h5"], "own": ["sub-01_from-M_to-T1w.txt"]}, 0),
        ({"own": ["sub-01_from-M_to-T1w.txt"], "ants": ["sub-01_from-M_to-T1w.mat"]}, 1),
        ({"ants": ["sub-01_from-M_to-T1w.mat"], "fmriprep": ["sub-01_from-M_to-T1w.h5"]}, 1),
        ({"ants": ["sub-01_from-M_to-T1w.txt"], "other": ["sub-01_acq-a_from-M_to-T1w.mat"]}, 1),
        ({"b": ["sub-01_from-M_to-T1w.h5"], "a": ["sub-01_from-M_to-T1w.h5"]}, 0),
        ({"a": ["sub-01_from-M_to-T1w.dat", "sub-01_acq-b_from-M_to-T1w.h5", "sub-01_from-M_to-T1w.txt"]}, 2),
    ],
)
def test_transform_of_a_mask_is_composite_and_of_another_pipeline_if_there_is_one(tmp_path, transforms, used):
    """The affine of an earlier run is not used in place of fMRIPrep's nonlinear transform."""
    paths = []
    for dataset, names in transforms.items():
        folder = tmp_path / dataset / "sub-01" / "anat"
        folder.mkdir(parents=True)
        for name in names:
            stem, extension = name.split(".")
            paths.append(folder / f"{stem}_mode-image_xfm.{extension}")
            paths[-1].touch()
        program = "bids_uad" if dataset == "own" else dataset
        description = {"GeneratedBy": [{"Name": program}, {"Name": "model"}]}
        (tmp_path / dataset / "dataset_description.json").write_text(json.dumps(description))
    roots = [tmp_path / dataset for dataset in transforms]
    assert find_transforms(roots, Path("sub-01_acq-a_T1w.nii.gz"), "T1w") == {"M": paths[used]}


def test_mask_named_for_sri24_must_be_on_its_grid(resolve):
    found = resolve(SESSION, {"_space-SRI24_label-lesion_mask": (np.eye(4), SRI24_SHAPE)})
    assert "grid of none" in found.problems[0].message


def test_masks_of_other_labels_are_ignored(resolve):
    found = resolve(SESSION, {"_label-lesionchange_mask": T1W, "_label-brain_mask": T1W})
    assert not found.lesions
    assert not found.problems


RUNS = {"_run-1_T1w": T1W, "_run-2_T1w": T1W, "_T2w": T1W}
SESSIONS = {"_ses-a_T1w": T1W, "_ses-b_T1w": T2W}
SAME_GRID = {"_ses-a_T1w": T1W, "_ses-b_T1w": T1W}
NAMES = {
    # name: images, masks, mask of each image that has one, start of each problem
    "one mask for each run": (
        RUNS,
        {"_run-1" + MASK: T1W, "_run-2" + MASK: T1W},
        {"_run-1_T1w": "_run-1" + MASK, "_run-2_T1w": "_run-2" + MASK},
        [],
    ),
    "a run's mask belongs to no other": (RUNS, {"_run-2" + MASK: T1W}, {"_run-2_T1w": "_run-2" + MASK}, []),
    "run-02 is run-2": (RUNS, {"_run-02" + MASK: T1W}, {"_run-2_T1w": "_run-02" + MASK}, []),
    "a mask that names no run serves all": (RUNS, {MASK: T1W}, dict.fromkeys(RUNS, MASK), []),
    "the mask that names most comes first": (
        {"_acq-x_T1w": T1W, "_acq-x_T2w": T2W, "_acq-y_T2w": T2W},
        {MASK: T1W, "_acq-x" + MASK: T2W},
        {"_acq-x_T1w": "_acq-x" + MASK, "_acq-x_T2w": "_acq-x" + MASK, "_acq-y_T2w": MASK},
        [],
    ),
    "two acquisitions with a mask each": (
        {"_acq-x_T1w": T1W, "_acq-y_T1w": T2W},
        {"_acq-x" + MASK: T1W, "_acq-y" + MASK: T2W},
        {"_acq-x_T1w": "_acq-x" + MASK, "_acq-y_T1w": "_acq-y" + MASK},
        [],
    ),
    "a reconstruction's mask": (
        {"_rec-x_T1w": T1W, "_rec-y_T1w": T1W},
        {"_rec-y" + MASK: T1W},
        {"_rec-y_T1w": "_rec-y" + MASK},
        [],
    ),
    "T1w and T2w of one acquisition": (
        {"_acq-x_T1w": T1W, "_acq-x_T2w": T2W},
        {"_acq-x" + MASK: T2W},
        {"_acq-x_T1w": "_acq-x" + MASK, "_acq-x_T2w": "_acq-x" + MASK},
        [],
    ),
    "a run that is not there": (
        RUNS,
        {"_run-3" + MASK: T1W},
        {},
        ["_run-3_label-lesion_mask.nii.gz: no image of the participant has run-3 of"],
    ),
    "a session that is not there": (
        SESSION,
        {"_ses-b" + MASK: T1W},
        {},
        ["_ses-b_label-lesion_mask.nii.gz: no image of the participant has ses-b of"],
    ),
    "drawn on a FLAIR of another acquisition": (
        {"_acq-x_T1w": T1W, "_acq-x_T2w": T2W, "_acq-y_FLAIR": FLAIR},
        {"_acq-y" + MASK: FLAIR},
        dict.fromkeys(("_acq-x_T1w", "_acq-x_T2w", "_acq-y_FLAIR"), "_acq-y" + MASK),
        [],
    ),
    "a FLAIR's mask only where there is no closer one": (
        {"_acq-x_T1w": T1W, "_acq-z_T2w": T2W, "_acq-y_FLAIR": FLAIR},
        {"_acq-y" + MASK: FLAIR, "_acq-x" + MASK: T1W},
        {"_acq-x_T1w": "_acq-x" + MASK, "_acq-z_T2w": "_acq-y" + MASK, "_acq-y_FLAIR": "_acq-y" + MASK},
        [],
    ),
    "drawn on a contrast-enhanced T1w that is left out": (
        {"_T1w": T1W, "_ce-gd_T1w": FLAIR},
        {"_ce-gd" + MASK: FLAIR},
        {"_T1w": "_ce-gd" + MASK},
        [],
    ),
    "a run's mask on the grid of another run": (
        {"_run-1_T1w": T1W, "_run-2_T1w": T2W},
        {"_run-1" + MASK: T2W},
        {},
        ["_run-1_label-lesion_mask.nii.gz: lesion mask on the grid of none"],
    ),
    "a refused mask leaves those that name less": (
        RUNS,
        {"_run-2" + MASK: (np.eye(4), SHAPE), MASK: T1W},
        dict.fromkeys(RUNS, MASK),
        ["_run-2_label-lesion_mask.nii.gz: lesion mask on the grid of none"],
    ),
    "a session's mask": (SESSIONS, {"_ses-b" + MASK: T2W}, {"_ses-b_T1w": "_ses-b" + MASK}, []),
    "a session's mask on the other's grid": (
        SESSIONS,
        {"_ses-b" + MASK: T1W},
        {},
        ["_ses-b_label-lesion_mask.nii.gz: lesion mask on the grid of none"],
    ),
    "no session, on one session's grid": (SESSIONS, {MASK: T2W}, {"_ses-b_T1w": MASK}, []),
    "no session, the only session": ({"_ses-a_T1w": T1W}, {MASK: T1W}, {"_ses-a_T1w": MASK}, []),
    "no session, a run of one session": (
        {"_ses-a_T1w": T1W, "_ses-b_run-1_T1w": T1W, "_ses-b_run-2_T1w": T1W},
        {"_run-2" + MASK: T1W},
        {"_ses-b_run-2_T1w": "_run-2" + MASK},
        [],
    ),
    "no session, on both sessions' grid": (
        SAME_GRID,
        {MASK: T1W},
        {},
        ["_label-lesion_mask.nii.gz: lesion mask without a session that matches ses-a and ses-b;"],
    ),
    "no session, three sessions": (
        SAME_GRID | {"_ses-c_T1w": T1W},
        {MASK: T1W},
        {},
        ["_label-lesion_mask.nii.gz: lesion mask without a session that matches ses-a, ses-b and ses-c;"],
    ),
    "no session, on no grid": (
        SESSIONS,
        {MASK: FLAIR},
        {},
        ["_label-lesion_mask.nii.gz: lesion mask without a session on the grid of none of"],
    ),
    "no session, in SRI24 space, two sessions": (
        SESSIONS,
        {"_space-SRI24" + MASK: SRI24},
        {},
        ["_space-SRI24_label-lesion_mask.nii.gz: lesion mask without a session that matches ses-a and"],
    ),
    "no session, on one session's FLAIR": (
        SAME_GRID | {"_ses-b_FLAIR": FLAIR},
        {MASK: FLAIR},
        {"_ses-b_T1w": MASK, "_ses-b_FLAIR": MASK},
        [],
    ),
    "no session, but each session has its own": (
        SAME_GRID,
        {MASK: T1W, "_ses-a" + MASK: T1W, "_ses-b" + MASK: T1W},
        {"_ses-a_T1w": "_ses-a" + MASK, "_ses-b_T1w": "_ses-b" + MASK},
        [],
    ),
    "the folder names the session": (
        SAME_GRID,
        {f"sub-01/ses-b/anat/sub-01{MASK}.nii.gz": T1W},
        {"_ses-b_T1w": MASK},
        [],
    ),
    "folder and name disagree": (
        SAME_GRID,
        {f"sub-01/ses-b/anat/sub-01_ses-a{MASK}.nii.gz": T1W},
        {},
        ["_ses-a_label-lesion_mask.nii.gz: lesion mask of ses-a in the folder of ses-b; move"],
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_mask_is_assigned_to_images_by_its_entities(resolve, case):
    images, masks, expected, problems = NAMES[case]
    found = resolve(images, masks)
    names = {key.removeprefix("sub-01"): mask.path.name for key, mask in found.lesions.items()}
    assert names == {key: f"sub-01{name}.nii.gz" for key, name in expected.items()}
    starts = [problem.message.rsplit("/sub-01", 1)[1] for problem in found.problems]
    assert len(starts) == len(problems), starts
    assert all(text.startswith(start) for text, start in zip(starts, problems, strict=True)), starts
    # By its name, the written mask is found for the same images.
    for unit in found.units:
        written = [mask.output for mask in found.lesions.values()]
        groups = applicable_masks(written, unit.path)
        own = found.lesions.get(unit.key)
        assert (groups[0][0] if groups else None) == (own and own.output), unit.key


def test_session_of_a_mask_does_not_depend_on_the_sessions_of_the_run(resolve):
    """Two jobs for one session each must not both use a mask without a session."""
    found = resolve(SAME_GRID, {MASK: T1W}, sessions=("a",))
    assert not found.lesions
    assert "matches ses-a and ses-b" in found.problems[0].message


def test_masks_of_other_sessions_are_not_read(resolve):
    def write(config):
        (config.derivatives["lesions"] / place("_ses-b" + MASK)).write_bytes(b"")

    found = resolve(SAME_GRID, {"_ses-a" + MASK: T1W, "_ses-b" + MASK: T1W}, write=write, sessions=("a",))
    assert list(found.lesions) == ["sub-01_ses-a_T1w"]
    assert not found.problems


@pytest.mark.parametrize(
    ("masks", "image", "found"),
    [
        (["", "_run-1"], "_run-1", "_run-1"),
        (["", "_run-1"], "_run-2", ""),
        (["_run-1"], "_run-2", None),
        (["_run-1"], "", None),
        (["_acq-x"], "_acq-x_run-1", "_acq-x"),
        (["_acq-x", "_run-1"], "_acq-x_run-1", "_acq-x"),
        (["_acq-x_run-1", "_run-1"], "_acq-x_run-1", "_acq-x_run-1"),
    ],
)
def test_written_mask_is_found_by_name(tmp_path, masks, image, found):
    for name in masks:
        (tmp_path / f"sub-01{name}_space-SRI24{MANUAL}.nii.gz").touch()
    path = written_mask(tmp_path / f"sub-01{image}_space-SRI24_desc-preproc_T2w.nii.gz")
    assert path == (None if found is None else tmp_path / f"sub-01{found}_space-SRI24{MANUAL}.nii.gz")


def test_find_preprocessed_finds_the_mask_of_the_session(tmp_path):
    """The T2w is not the first image of the session, and its name differs from that of the mask."""
    anat = tmp_path / "sub-01/ses-a/anat"
    anat.mkdir(parents=True)
    names = ("desc-preproc_T1w", "acq-tse_run-2{}_desc-preproc_T2w", "acq-tse_run-2{}_desc-T2wBrain_mask")
    for name in (*names, "desc-brain_mask", MANUAL[1:]):
        entities, _, rest = name.rpartition("{}_")
        stem = f"sub-01_ses-a_{entities}_" if entities else "sub-01_ses-a_"
        (anat / f"{stem}space-SRI24_{rest}.nii.gz").touch()
    for modality in ("T1w", "T2w"):
        (scan,) = find_preprocessed(tmp_path, modality)
        assert scan.lesion == anat / f"sub-01_ses-a_space-SRI24{MANUAL}.nii.gz"


def cube(value: float = 1, dtype: type = np.uint8) -> np.ndarray:
    data = np.zeros(SHAPE, dtype)
    data[8:12, 8:12, 8:12] = value
    return data


def stored(
    data: np.ndarray, *, slope: float | None = None, ending: str = ".nii.gz", codes: int | None = None
):
    """Return a function that stores a mask in some way."""

    def write(path: Path) -> Path:
        path = path.with_name(path.name.split(".")[0] + ending)
        image = nib.Nifti1Image(data, AFFINE)
        if slope is not None:
            image.header.set_slope_inter(slope, 0)
        if codes is not None:
            image.set_sform(AFFINE, codes)
            image.set_qform(AFFINE, codes)
        nib.save(image, path)
        return path

    return write


def spoiled(change):
    """Return a function that stores a good mask and then changes the bytes of the file."""

    def write(path: Path) -> Path:
        stored(cube())(path)
        path.write_bytes(change(path.read_bytes()))
        return path

    return write


def first_bytes(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:352])


def edited(content: bytes, offset: int, value: int) -> bytes:
    """Write a short integer into a compressed NIfTI header."""
    header = bytearray(gzip.decompress(content))
    header[offset : offset + 2] = value.to_bytes(2, "little", signed=True)
    return gzip.compress(bytes(header))


def dangling(path: Path) -> Path:
    path.symlink_to(path.parent / ".git" / "annex" / "gone")
    return path


def mixed(*values: float) -> np.ndarray:
    data = cube(values[0], np.float32)
    data[9, 9, 8 : 8 + len(values)] = values
    return data


COLOURS = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
VALID = {
    # name: how it is stored, lesion voxels
    "bytes": (stored(cube()), 64),
    "uncompressed": (stored(cube(), ending=".nii"), 64),
    "floats": (stored(cube(1, np.float32)), 64),
    "doubles": (stored(cube(1, np.float64)), 64),
    "0 and 255": (stored(cube(255)), 64),
    "0 and 255 with a slope": (stored(cube(255), slope=1 / 255), 64),
    "labels": (stored(mixed(1, 2, 4).astype(np.int16)), 64),
    "labels as floats": (stored(mixed(1, 2, 3)), 64),
    "a trailing axis": (stored(cube()[..., None]), 64),
    "two trailing axes": (stored(cube()[..., None, None]), 64),
    "big-endian": (stored(cube(1, np.dtype(">i2"))), 64),
    "32 bits": (stored(cube(1, np.int32)), 64),
    "rounding errors": (stored(mixed(1, 1 - 1e-6, 1 + 1e-6) + np.float32(1e-9)), 64),
    "all zero": (stored(cube(0)), 0),
    "all zero, floats": (stored(cube(0, np.float32)), 0),
}
FRACTIONS = "lesion mask with values that are not whole numbers"
NOT_FINITE = "the image has NaN or infinite voxels"
INVALID = {
    # name: how it is stored, start of the message
    "probabilities": (stored(mixed(0.1, 0.5, 0.9, 1)), FRACTIONS),
    "one half": (stored(cube(0.5, np.float32)), f"{FRACTIONS} (such as 0.5)"),
    "negative": (stored(mixed(1, -1)), "lesion mask with negative values (lowest -1)"),
    "NaN": (stored(mixed(1, np.nan)), NOT_FINITE),
    "NaN outside": (stored(np.where(cube(), 1, np.float32(np.nan))), NOT_FINITE),
    "infinite": (stored(mixed(1, np.inf)), NOT_FINITE),
    "inverted": (stored(1 - cube()), "lesion mask whose background is 1, not 0"),
    "all ones": (stored(np.ones(SHAPE, np.uint8)), "lesion mask whose background is 1, not 0"),
    "two volumes": (stored(np.stack([cube(), cube()], -1)), "lesion mask of more than one volume (24 x"),
    "colours": (stored(COLOURS), "lesion mask of colours or complex numbers"),
    "complex": (stored(cube(1, np.complex64)), "lesion mask of colours or complex numbers"),
    "no orientation": (stored(cube(), codes=0), "the header has no orientation"),
    "truncated": (spoiled(lambda content: content[: len(content) // 2]), "not a readable image"),
    "not gzip": (spoiled(lambda _: b"<html>404</html>"), "a web page, not an image"),
    "empty file": (spoiled(lambda _: b""), "the file is empty"),
    "one byte": (spoiled(lambda _: b"x"), "not a gzip file"),
    "header only": (spoiled(first_bytes), "the image data are cut short"),
    "corrupt data type": (spoiled(lambda content: edited(content, 70, 999)), "not a readable image"),
    "corrupt dimensions": (spoiled(lambda content: edited(content, 40, -3)), "not a readable image"),
    "broken compression": (
        spoiled(lambda content: content[:30] + b"x" * 40 + content[70:]),
        "not a readable image",
    ),
    "a folder": (lambda path: path.mkdir(), "a folder, not a file"),
    "dangling link": (dangling, "the file is a link to content that is not here"),
}


@pytest.mark.parametrize("case", VALID)
def test_valid_mask_is_accepted(resolve, case):
    store, voxels = VALID[case]
    found = resolve({"_T1w": T1W}, {}, write=lambda config: _store(config, store))
    assert not found.problems
    lesion = found.lesions["sub-01_T1w"]
    assert lesion.is_empty == (voxels == 0)
    assert read_lesion(lesion.path)[0].sum() == voxels


@pytest.mark.parametrize("case", INVALID)
def test_invalid_mask_is_reported_in_one_line(resolve, case):
    store, message = INVALID[case]
    found = resolve({"_T1w": T1W}, {}, write=lambda config: _store(config, store))
    assert not found.lesions
    assert [unit.key for unit in found.units] == ["sub-01_T1w"]
    (problem,) = found.problems
    assert "\n" not in problem.message
    assert problem.message.split(".nii.gz: ", 1)[1].startswith(message)
    assert problem.message.count("; ") == 1


def _store(config: RunConfig, store) -> None:
    path = config.derivatives["lesions"] / place(MASK)
    path.parent.mkdir(parents=True, exist_ok=True)
    store(path)
