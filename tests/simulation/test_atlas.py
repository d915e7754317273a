"""Tissue priors: how they are averaged, and the files in the package."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from bids_uad import space
from bids_uad.simulation import atlas
from bids_uad.simulation.anatomy import CLASSES, TissueMaps, icbm_to_sri24, template_source
from bids_uad.simulation.spatial import sample

PACKAGED = Path(space.__file__).parent / "data" / "atlas"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LABEL_MAPS = SHARED / "labelmaps"
SRI24 = SHARED / "tpl-SRI24"
POSITIONS = {
    "thalamus": ("deep", (10.9, -17.6, 8.0)),
    "caudate": ("deep", (11.5, 11.0, 9.2)),
    "putamen": ("deep", (23.9, 3.9, 2.4)),
    "hippocampus": ("deep", (28, -22, -14)),
    "amygdala": ("deep", (23.3, -0.7, -17.1)),
    "centrum semiovale": ("white", (25, -15, 38)),
    "middle cerebellar peduncle": ("white", (18, -50, -35)),
    "pons": ("brainstem", (3, -25, -32)),
    "cerebellar hemisphere": ("cortex", (35, -65, -45)),
    "precuneus": ("cortex", (7, -60, 45)),
    "trigone": ("ventricle", (24, -44, 10)),
    "prepontine cistern": ("csf", (2, -13, -42)),
}
"""Tissue at places in MNI space (mm); those of the thalamus, caudate, putamen and amygdala are the
centres of AAL's regions (Tzourio-Mazoyer et al. 2002)."""


def source(labels: dict[str, tuple[slice, ...]]) -> TissueMaps:
    """A label map with boxes of classes, on the grid of SRI24."""
    fractions = torch.zeros(len(CLASSES), *space.SHAPE)
    for name, box in labels.items():
        fractions[(CLASSES.index(name), *box)] = 1
    return TissueMaps("boxes", fractions, None, space.AFFINE)


def smoothed(box: tuple[slice, ...]) -> np.ndarray:
    """A box on the grid of SRI24, smoothed by SciPy."""
    volume = np.zeros(space.SHAPE)
    volume[box] = 1
    return ndimage.gaussian_filter(volume, atlas.SIGMA_MM, truncate=8)


def on_grid(volume: np.ndarray) -> np.ndarray:
    """The mean of a volume and its mirror image, on the grid of the priors."""
    return ((volume + volume[::-1]) / 2)[40:200:3, 30:231:3, 0:154:3]


def test_average_tissues_agrees_with_scipy():
    white, thalamus = np.s_[60:90, 100:140, 50:90], np.s_[100:115, 100:140, 50:90]
    fluid = np.s_[115:140, 100:140, 50:90]
    first = source({"white": white, "thalamus": thalamus, "csf": fluid})
    second = source({"cerebellar_white": white})
    priors = dict(zip(space.TISSUES, atlas.average_tissues([first, second]), strict=True))
    np.testing.assert_allclose(priors["white"], on_grid(smoothed(white)), atol=1e-4)
    np.testing.assert_allclose(priors["deep"], on_grid(smoothed(thalamus) / 2), atol=1e-4)
    # The second map has no fluid; its tissue counts, and the rest is fluid as often as in the first map.
    outside = 1 - smoothed(white) - smoothed(thalamus)
    share = smoothed(fluid) / np.maximum(outside, 1e-6)
    csf = on_grid(share * (1 - smoothed(white) - smoothed(thalamus) / 2))
    np.testing.assert_allclose(priors["csf"], csf, atol=1e-3)
    assert not priors["ventricle"].any()


def test_average_tissues_requires_fluid():
    with pytest.raises(ValueError, match="cerebrospinal fluid"):
        atlas.average_tissues([source({"white": np.s_[60:90, 100:140, 50:90]})])


def test_tissue_priors_are_interpolated_trilinearly():
    random = np.random.default_rng(1)
    image = nib.load(PACKAGED / space.TISSUE_FILE)
    stored = np.asarray(image.dataobj) / 100
    voxels = np.stack([random.integers(0, n, 4000) for n in space.SHAPE])
    world = nib.affines.apply_affine(space.AFFINE, voxels.T)
    at = nib.affines.apply_affine(np.linalg.inv(image.affine), world).T
    priors = space.tissue_priors()
    assert priors.shape == (len(space.TISSUES), *space.SHAPE)
    assert priors.dtype == np.float32
    for channel in range(len(space.TISSUES)):
        expected = ndimage.map_coordinates(stored[..., channel], at, order=1, mode="nearest")
        np.testing.assert_allclose(priors[(channel, *voxels)], expected, atol=1e-5)


def test_tissue_priors_are_probabilities_and_symmetric():
    priors = space.tissue_priors()
    assert priors.min() == 0
    assert priors.max() <= 1
    assert priors.sum(0).max() <= 1.03
    np.testing.assert_allclose(priors, priors[:, ::-1], atol=1e-6)
    assert not priors[:, [0, 39, 200, -1]].any()
    with pytest.raises(ValueError, match="read-only"):
        priors[0, 0, 0, 0] = 1


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("place", POSITIONS)
def test_tissue_priors_are_highest_for_the_tissue_at_a_known_position(place, side):
    tissue, (x, y, z) = POSITIONS[place]
    world = icbm_to_sri24() @ [side * x, y, z, 1]
    voxel = np.rint(np.linalg.inv(space.AFFINE) @ world)[:3].astype(int)
    assert space.TISSUES[space.tissue_priors()[(slice(None), *voxel)].argmax()] == tissue


def test_tissue_priors_agree_with_the_template():
    # The template is not part of the average.
    template = template_source()
    averaged = space.tissue_priors()[:, 40:200:3, 30:231:3, 0:154:3]
    points = atlas.grid_points()
    maps = sample(template.fractions, template.affine, points).numpy()
    brain = sample(template.fractions.sum(0, keepdim=True), template.affine, points).numpy()[0] > 0.5
    for name, members in (("white", ("white", "cerebellar_white")), ("ventricle", ("ventricle",))):
        known = sum(maps[CLASSES.index(member)] for member in members) > 0.5
        ours = averaged[space.TISSUES.index(name)]
        assert ours[known & brain].mean() > 3 * ours[~known & brain].mean()


@pytest.mark.skipif(not SRI24.is_dir(), reason="needs the SRI24 atlas of ../shared")
def test_tissue_priors_agree_with_the_tissues_of_sri24():
    segmentation = np.asarray(nib.load(SRI24 / "tpl-SRI24_res-1_desc-tissues_dseg.nii.gz").dataobj)
    brain = np.asarray(nib.load(SRI24 / "tpl-SRI24_res-1_desc-brain_mask.nii.gz").dataobj) > 0
    priors = dict(zip(space.TISSUES, space.tissue_priors(), strict=True))
    tissue = sum(priors[name] for name in space.TISSUES[1:])
    assert tissue[~brain].sum() < 0.06 * tissue.sum()
    white = priors["white"] + priors["brainstem"]
    fluid = priors["csf"] + priors["ventricle"]
    grey = priors["cortex"] + priors["deep"]
    for prior, label, least in ((fluid, 1, 0.5), (grey, 2, 0.45), (white, 3, 0.65)):
        assert np.corrcoef(prior[brain], segmentation[brain] == label)[0, 1] > least


def test_packaged_atlas_is_small():
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 400_000


@pytest.mark.slow
@pytest.mark.skipif(not LABEL_MAPS.is_dir(), reason="needs the label maps of ../shared")
def test_packaged_atlas_is_rebuilt_from_the_label_maps(tmp_path):
    maps = [str(LABEL_MAPS / "synthseg" / f"training_seg_{n:02d}_dseg.nii.gz") for n in range(1, 14)]
    assert atlas.main([*maps, str(LABEL_MAPS / "synthsr"), "--out", str(tmp_path)]) == 0
    for packaged in PACKAGED.glob("*.nii.gz"):
        ours = np.asarray(nib.load(packaged).dataobj).astype(int)
        again = np.asarray(nib.load(tmp_path / packaged.name).dataobj)
        # Registration may differ in the last digits between processors.
        assert np.abs(ours - again).max() <= 2
        sidecar = packaged.name.replace(".nii.gz", ".json")
        assert (tmp_path / sidecar).read_text() == (PACKAGED / sidecar).read_text()
