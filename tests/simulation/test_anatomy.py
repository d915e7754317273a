from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from bids_uad.errors import InputError
from bids_uad.simulation.anatomy import (
    BUILT_IN,
    CLASSES,
    find_label_maps,
    read_label_map,
)

TABLE = """index\tname
7\tLeft-Cerebral-Cortex
8\tright cerebral cortex
9\tWM
10\tLeft-Lateral-Ventricle
11\tSkull
12\tCSF
"""


def label_map(path, labels: dict[str, int]):
    """Blocks of cortex, white matter, ventricle, bone and fluid."""
    volume = np.zeros((40, 40, 40), dtype=np.int16)
    for position, label in enumerate(labels.values()):
        volume[10:30, 10:30, 10 + 4 * position : 14 + 4 * position] = label
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    label_map(tmp_path / "x_dseg.nii.gz", {"cortex": 8, "white": 9, "ventricle": 10, "bone": 11, "csf": 12})
    (tmp_path / "dseg.tsv").write_text(TABLE)
    return tmp_path


def test_a_lookup_table_says_what_labels_are(folder):
    classes, _ = read_label_map(str(folder / "x_dseg.nii.gz"))
    label_map(folder / "fs.nii.gz", {"cortex": 42, "white": 2, "ventricle": 4, "bone": 255, "csf": 24})
    (folder / "dseg.tsv").unlink()
    as_freesurfer, _ = read_label_map(str(folder / "fs.nii.gz"))
    np.testing.assert_array_equal(classes, as_freesurfer)
    counts = np.bincount(classes.ravel(), minlength=len(CLASSES) + 1)
    assert {CLASSES[k - 1]: counts[k] for k in np.flatnonzero(counts[1:]) + 1} == {
        "csf": 1600,
        "ventricle": 1600,
        "cortex": 1600,
        "white": 1600,
    }


def test_the_table_of_one_map_goes_before_that_of_the_folder(folder):
    (folder / "x_dseg.tsv").write_text("index\tname\n8\twhite\n9\tcortex\n")
    classes, _ = read_label_map(str(folder / "x_dseg.nii.gz"))
    first = classes[np.nonzero(classes)[0][0], :, :]
    assert set(np.unique(classes)) == {0, 1 + CLASSES.index("cortex"), 1 + CLASSES.index("white")}
    assert first.any()


def test_a_table_without_names_is_refused(folder):
    (folder / "dseg.tsv").write_text("index\tcolour\n1\tred\n")
    with pytest.raises(InputError, match="lacks a column"):
        read_label_map(str(folder / "x_dseg.nii.gz"))


def test_labels_that_mean_nothing_are_refused(folder):
    (folder / "dseg.tsv").write_text("index\tname\n8\tliver\n")
    with pytest.raises(InputError, match="no cortex"):
        read_label_map(str(folder / "x_dseg.nii.gz"))


def test_places_may_be_files_folders_and_the_template(folder):
    own = str(folder / "x_dseg.nii.gz")
    assert find_label_maps([BUILT_IN, folder, own]) == [BUILT_IN, own, own]
    with pytest.raises(InputError, match="neither a label map nor a folder"):
        find_label_maps([folder / "nothing"])
