"""Search for images, anchors and filters of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bids_uad.config import RunConfig
from bids_uad.dataset.inputs import collect, find_modalities, require_sessions
from bids_uad.errors import ConfigError, InputError
from tests.dataset.skeleton import write_dataset


@pytest.fixture
def make(tmp_path):
    def config(files, **options):
        root = write_dataset(tmp_path / "raw", dict.fromkeys(files))
        return RunConfig(root, tmp_path / "out", ("participant",), tmp_path / "work", **options)

    return config


def anchors(units):
    return {unit.key: unit.anchor.key if unit.anchor else None for unit in units}


def test_t2w_is_registered_to_the_first_t1w_of_its_session(make):
    config = make(
        [
            "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.nii.gz",
            "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz",
            "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
            "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
            "sub-01/ses-b/anat/sub-01_ses-b_acq-x_T2w.nii.gz",
            "sub-01/ses-c/anat/sub-01_ses-c_T2w.nii",
            "sub-02/anat/sub-02_T2w.nii.gz",
        ]
    )
    assert anchors(collect(config).units) == {
        "sub-01_ses-a_run-1_T1w": None,
        "sub-01_ses-a_run-2_T1w": None,
        "sub-01_ses-b_T1w": None,
        "sub-01_ses-a_T2w": "sub-01_ses-a_run-1_T1w",
        "sub-01_ses-b_acq-x_T2w": "sub-01_ses-b_T1w",
        "sub-01_ses-c_T2w": "sub-01_ses-a_run-1_T1w",
        "sub-02_T2w": None,
    }


def test_flair_is_registered_to_a_t1w_if_there_is_one(make):
    """FLAIR sorts before T1w by name, but anchors come first."""
    files = [f"sub-01/ses-{name}.nii.gz" for name in ("a/anat/sub-01_ses-a_T1w", "a/anat/sub-01_ses-a_FLAIR")]
    files += ["sub-01/ses-b/anat/sub-01_ses-b_acq-3d_FLAIR.nii.gz", "sub-02/anat/sub-02_FLAIR.nii.gz"]
    files += ["sub-02/anat/sub-02_T2w.nii.gz", "sub-02/anat/sub-02_T2starw.nii.gz"]
    assert list(anchors(collect(make(files)).units).items()) == [
        ("sub-01_ses-a_T1w", None),
        ("sub-01_ses-a_FLAIR", "sub-01_ses-a_T1w"),
        ("sub-01_ses-b_acq-3d_FLAIR", "sub-01_ses-a_T1w"),
        ("sub-02_T2w", None),
        ("sub-02_FLAIR", None),
    ]
    # A job for the session without a T1w registers to the same image.
    found = collect(make(files, participants=("01",), sessions=("b",)))
    assert anchors(found.units)["sub-01_ses-b_acq-3d_FLAIR"] == "sub-01_ses-a_T1w"
    assert found.anchors_only == {"sub-01_ses-a_T1w"}


def test_filter_file_selects_flair_images(make, tmp_path):
    filters = tmp_path / "filter.json"
    filters.write_text(json.dumps({"flair": {"acquisition": "b"}}))
    files = [f"sub-01/anat/sub-01_acq-{acq}_{suffix}.nii.gz" for acq in "ab" for suffix in ("FLAIR", "T2w")]
    keys = [unit.key for unit in collect(make(files, filter_file=filters)).units]
    assert keys == ["sub-01_acq-a_T2w", "sub-01_acq-b_T2w", "sub-01_acq-b_FLAIR"]


def test_runs_are_ordered_by_number(make):
    config = make(
        [f"sub-01/anat/sub-01_run-{run}_T1w.nii.gz" for run in (10, 2)] + ["sub-01/anat/sub-01_T2w.nii.gz"]
    )
    assert anchors(collect(config).units)["sub-01_T2w"] == "sub-01_run-2_T1w"


def test_modality_that_is_not_requested_is_kept_as_anchor_only(make):
    files = [f"sub-01/anat/sub-01_{name}.nii.gz" for name in ("acq-a_T1w", "acq-b_T1w", "T2w")]
    keys = {
        modalities: [unit.key for unit in collect(make(files, modalities=modalities)).units]
        for modalities in (("T1w",), ("T2w",))
    }
    assert keys == {
        ("T1w",): ["sub-01_acq-a_T1w", "sub-01_acq-b_T1w"],
        ("T2w",): ["sub-01_acq-a_T1w", "sub-01_T2w"],
    }


def test_unit_has_prefix_folder_and_metadata(tmp_path):
    name = "sub-01/ses-a/anat/sub-01_ses-a_acq-mprage_rec-norm_run-01_T1w.nii.gz"
    root = write_dataset(tmp_path / "raw", {name: {"SkullStripped": True}})
    (unit,) = collect(RunConfig(root, tmp_path / "out", ("participant",), tmp_path / "work")).units
    assert unit.prefix == "sub-01_ses-a_acq-mprage_rec-norm_run-01"
    assert unit.folder.as_posix() == "sub-01/ses-a/anat"
    assert unit.skull_stripped is True


def test_contrast_enhanced_images_are_left_out_by_default(make, tmp_path):
    files = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_ce-gd_T1w.nii.gz"]
    found = collect(make(files))
    assert [unit.key for unit in found.units] == ["sub-01_T1w"]
    assert [path.name for path in found.left_out] == ["sub-01_ce-gd_T1w.nii.gz"]
    filters = tmp_path / "filter.json"
    filters.write_text(json.dumps({"T1w": {"ceagent": "*"}, "bold": {"task": "rest"}}))
    assert [unit.key for unit in collect(make(files, filter_file=filters)).units] == ["sub-01_ce-gd_T1w"]


@pytest.mark.parametrize(
    ("own", "keys"),
    [
        ({"acquisition": None}, ["sub-01_T1w"]),
        ({"acquisition": "*"}, ["sub-01_acq-a_T1w", "sub-01_acq-b_T1w"]),
        ({"acquisition": "b"}, ["sub-01_acq-b_T1w"]),
        ({"acquisition": ["a", "b"]}, ["sub-01_acq-a_T1w", "sub-01_acq-b_T1w"]),
    ],
)
def test_filter_file_selects_images(make, tmp_path, own, keys):
    filters = tmp_path / "filter.json"
    filters.write_text(json.dumps({"t1w": own}))
    files = [f"sub-01/anat/sub-01_{acq}T1w.nii.gz" for acq in ("", "acq-a_", "acq-b_")]
    assert [unit.key for unit in collect(make(files, filter_file=filters)).units] == keys


@pytest.mark.parametrize("text", ["[]", "{", '{"t1w": 3}', '{"t1w": {"suffix": "FLAIR"}}'])
def test_invalid_filter_file_raises(make, tmp_path, text):
    filters = tmp_path / "filter.json"
    filters.write_text(text)
    with pytest.raises(ConfigError, match="--bids-filter-file"):
        collect(make(["sub-01/anat/sub-01_T1w.nii.gz"], filter_file=filters))


def test_collect_is_limited_to_requested_participants_and_sessions(make):
    files = [f"sub-0{n}/ses-{s}/anat/sub-0{n}_ses-{s}_T1w.nii.gz" for n in (1, 2) for s in "ab"]
    units = collect(make(files, participants=("02",), sessions=("b",))).units
    assert [unit.key for unit in units] == ["sub-02_ses-b_T1w"]


def test_unknown_labels_raise(make):
    files = ["sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz"]
    with pytest.raises(InputError, match="no participant 07; choose from 01"):
        collect(make(files, participants=("07",)))
    root = make(files).bids_dir
    require_sessions(root, ["01"], ["a"])
    with pytest.raises(InputError, match="no session z; choose from a"):
        require_sessions(root, ["01"], ["a", "z"])
    (problem,) = collect(make(files, sessions=("z",))).problems
    assert problem.message == "sub-01: no usable T1w, T2w or FLAIR image"


def test_modalities_are_found_by_name(make):
    files = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_T2w.nii"]
    files += ["sub-03/anat/sub-03_UNIT1.nii.gz", "sub-04/func/sub-04_T2w.nii.gz"]
    files += ["sub-05/anat/sub-05_FLAIR.nii.gz"]
    for subjects, options, found in (
        (["01", "02"], {}, ["T1w", "T2w"]),
        (["03", "04"], {}, ["T1w"]),
        (["02"], {"sessions": ("a",)}, ["T2w"]),
        (["02"], {"sessions": ("b",)}, []),
        (["01", "05"], {}, ["T1w", "FLAIR"]),
        (["01", "02"], {"modalities": ("T2w",)}, ["T2w"]),
    ):
        assert find_modalities(make(files, **options), subjects) == found


def test_database_is_written_once_and_then_used(make, tmp_path):
    files = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"]
    config = make(files, database_dir=tmp_path / "db", participants=("01",))
    assert [unit.key for unit in collect(config).units] == ["sub-01_T1w"]
    written = (tmp_path / "db/layout_index.sqlite").read_bytes()
    (config.bids_dir / "sub-02/anat/sub-02_T1w.nii.gz").unlink()  # not noticed: the index is not renewed
    keys = [unit.key for unit in collect(replace(config, participants=("02",))).units]
    assert keys == ["sub-02_T1w"]
    assert (tmp_path / "db/layout_index.sqlite").read_bytes() == written
    other = write_dataset(tmp_path / "other", {files[0]: None})
    with pytest.raises(ConfigError, match="is an index of "):
        collect(replace(config, bids_dir=other))


def test_derivatives_and_functional_images_are_not_read(make):
    files = [
        "sub-01/anat/sub-01_T1w.nii.gz",
        "derivatives/other/sub-01/anat/sub-01_desc-x_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
    ]
    assert len(collect(make(files)).units) == 1


def test_participant_without_images_is_reported(make):
    config = make(["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T2star.nii.gz"])
    (problem,) = collect(config).problems
    assert problem.message == "sub-02: no usable T1w, T2w or FLAIR image"


def test_images_with_identical_entities_are_dropped(make):
    found = collect(make(["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii"]))
    assert not found.units
    assert "same BIDS entities as sub-01_T1w.nii.gz" in found.problems[0].message


def test_unusable_image_is_dropped_before_anchors_are_chosen(make):
    config = make(
        [
            "sub-01/anat/sub-01_run-1_T1w.nii.gz",
            "sub-01/anat/sub-01_run-2_T1w.nii.gz",
            "sub-01/anat/sub-01_T2w.nii.gz",
            "sub-02/anat/sub-02_run-1_T1w.nii.gz",
            "sub-02/anat/sub-02_T2w.nii.gz",
        ]
    )

    def check(unit):
        if unit.entities.get("run") == "1":
            raise InputError(unit.path, "broken", "mend it")

    found = collect(config, check)
    assert anchors(found.units) == {
        "sub-01_run-2_T1w": None,
        "sub-01_T2w": "sub-01_run-2_T1w",
        "sub-02_T2w": None,
    }
    assert [problem.key for problem in found.problems] == ["sub-01_run-1_T1w", "sub-02_run-1_T1w"]
    assert "broken; mend it" in found.problems[0].message


SESSIONS = [
    "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w.nii.gz",
    "sub-01/ses-a/anat/sub-01_ses-a_run-2_T1w.nii.gz",
    "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
    "sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz",
    "sub-01/ses-c/anat/sub-01_ses-c_T2w.nii.gz",
]


@pytest.mark.parametrize(
    ("options", "found", "anchors_only"),
    [
        ({"sessions": ("c",)}, {"c_T2w": "a_run-1_T1w", "a_run-1_T1w": None}, {"a_run-1_T1w"}),
        ({"sessions": ("b",)}, {"b_T1w": None, "b_T2w": "b_T1w"}, set()),
        (
            {"sessions": ("b", "c")},
            {"b_T1w": None, "b_T2w": "b_T1w", "c_T2w": "a_run-1_T1w"},  # as a run on all sessions does
            {"a_run-1_T1w"},
        ),
        ({"sessions": ("c",), "modalities": ("T1w",)}, {}, set()),
        ({"sessions": ("c",), "filter": {"t1w": {"run": 2}}}, {"c_T2w": "a_run-2_T1w"}, {"a_run-2_T1w"}),
        ({"sessions": ("c",), "filter": {"t1w": {"session": "b"}}}, {"c_T2w": "b_T1w"}, {"b_T1w"}),
    ],
)
def test_session_job_uses_anchors_of_other_sessions(make, tmp_path, options, found, anchors_only):
    options = dict(options)
    if filters := options.pop("filter", None):
        (tmp_path / "filter.json").write_text(json.dumps(filters))
        options["filter_file"] = tmp_path / "filter.json"
    collection = collect(make(SESSIONS, **options))
    start = "sub-01_ses-"
    expected = {f"{start}{key}": anchor and f"{start}{anchor}" for key, anchor in found.items()}
    expected |= {f"{start}{key}": None for key in anchors_only}
    assert anchors(collection.units) == expected
    assert collection.anchors_only == {f"{start}{key}" for key in anchors_only}


@pytest.mark.parametrize("sessions", [("c",), ()])
def test_session_job_uses_the_same_anchor_as_a_run_on_all_sessions(make, sessions):
    def check(unit):
        if unit.key == "sub-01_ses-a_run-1_T1w":
            raise InputError(unit.path, "truncated", "copy it again")

    collection = collect(make(SESSIONS, sessions=sessions), check=check)
    assert anchors(collection.units)["sub-01_ses-c_T2w"] == "sub-01_ses-a_run-2_T1w"
    # Problems of other sessions are not reported.
    assert [problem.key for problem in collection.problems] == (
        [] if sessions else ["sub-01_ses-a_run-1_T1w"]
    )
