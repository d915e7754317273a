"""Each lesion, against loops over voxels."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from bids_uad.dataset.sidecars import LESION_COLUMNS
from bids_uad.levels.participant.postprocess import MIN_SHELL_VOXELS, lesion_contrasts, lesion_table


@pytest.fixture
def scan():
    random = np.random.default_rng(3)
    shape = (44, 40, 36)
    brain = np.zeros(shape, bool)
    brain[3:-3, 3:-3, 3:-3] = True
    lesion = np.zeros(shape, bool)
    lesion[8:12, 8:14, 8:12] = True
    lesion[14, 9, 9] = True  # its shell lacks what is near the first
    lesion[12, 14, 12] = True  # corner of the first
    lesion[30:32, 20, 20] = True
    lesion[1:5, 30:33, 20] = True  # partly outside the brain
    lesion[0, 0, 0] = True  # wholly outside
    image = random.normal(1.0, 0.1, shape) + 0.4 * lesion
    found = random.random(shape) < 0.3
    found[30:32, 20, 20] = False
    return lesion, found, image.astype(np.float32), brain


def test_lesions_are_measured_as_loops_over_voxels_say(scan):
    lesion, found, image, brain = scan
    table = lesion_table(*scan)
    assert list(table) == list(LESION_COLUMNS)
    truth, n = ndimage.label(lesion & brain, np.ones((3, 3, 3)))
    assert len(table) == n == 4
    points = {k: np.argwhere(truth == k) for k in range(1, n + 1)}
    order = sorted(points, key=lambda k: -len(points[k]))
    everywhere = np.argwhere(brain)
    apart = cdist(everywhere, np.argwhere(truth > 0)).min(axis=1) > 2
    for row, k in zip(table.itertuples(), order, strict=True):
        own = points[k]
        hits = sum(bool(found[tuple(point)]) for point in own)
        assert row.volume_mm3 == len(own)
        assert row.found_share == pytest.approx(hits / len(own))
        assert row.detected == (hits > 0)
        shell = image[tuple(everywhere[apart & (cdist(everywhere, own).min(axis=1) <= 6)].T)].astype(float)
        inside = image[tuple(own.T)].astype(float)
        assert row.contrast == pytest.approx((inside.mean() - shell.mean()) / shell.std(ddof=1), rel=1e-6)
        x, y, z = own.mean(axis=0)
        assert (row.centroid_x, row.centroid_y, row.centroid_z) == pytest.approx((-x, 239 - y, z), abs=0.006)
    assert 0 in table["detected"].tolist()
    assert 1 in table["detected"].tolist()


def test_a_lesion_without_tissue_around_it_has_no_contrast():
    labels = np.zeros((20, 20, 20), int)
    labels[5:15, 5:15, 5:15] = 1
    assert np.isnan(lesion_contrasts(labels, np.ones(labels.shape), labels > 0)).all()
    assert np.isnan(lesion_contrasts(labels, np.ones(labels.shape), np.ones(labels.shape, bool))).all()
    few = labels > 0
    few[2, : MIN_SHELL_VOXELS - 1, 10] = True
    image = np.random.default_rng(0).random(labels.shape)
    assert np.isnan(lesion_contrasts(labels, image, few)).all()
    few[2, :, 11] = True
    assert np.isfinite(lesion_contrasts(labels, image, few)).all()


def test_no_lesion_is_an_empty_table(scan):
    nothing = np.zeros_like(scan[0])
    table = lesion_table(nothing, *scan[1:])
    assert len(table) == 0
    assert list(table) == list(LESION_COLUMNS)
