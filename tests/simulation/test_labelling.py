"""Label maps of T1w scans, against simulated scans whose anatomy is known."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from bids_uad.images import save_image
from bids_uad.simulation import labelling
from bids_uad.simulation.acquisition import simulate_preprocessed_scan
from bids_uad.simulation.anatomy import CLASSES, FREESURFER, read_label_map, template_source
from bids_uad.simulation.labelling import FLUID, LABELS, Atlas, TissueIntensities
from bids_uad.simulation.spatial import sample, tensor, to_grid
from bids_uad.simulation.subject import make_signal, random_stream
from bids_uad.space import to_image

from .conftest import INDEX, POPULATION, SEED


def template_labels() -> np.ndarray:
    """FreeSurfer's labels of the template."""
    fractions = template_source().fractions
    labels = np.zeros(fractions.shape[1:], np.int16)
    for index, name in enumerate(CLASSES):
        labels[((fractions.argmax(0) == index) & (fractions.sum(0) > 0.5)).numpy()] = FREESURFER[name][0]
    return labels


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    labels = template_labels()
    parts = np.zeros(labels.shape, np.uint8)
    for position, label in enumerate(LABELS, start=1):
        parts[np.isin(labels, labelling.SIDES[label])] = position
    return Atlas("template", tensor(parts), template_source().affine)


@pytest.fixture(scope="module")
def scan(subject, healthy) -> np.ndarray:
    with torch.no_grad():
        image, settings, _ = make_signal(POPULATION, INDEX, subject, healthy, "T1w")
        scan = simulate_preprocessed_scan(
            image, settings, healthy.brain, random_stream(SEED, INDEX, "T1w-scan")
        )
    return (scan * healthy.brain).numpy()


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.slow
def test_label_scan_finds_the_known_structures(scan, healthy, atlas):
    brain = healthy.brain.numpy()
    labels = labelling.label_scan(scan, brain, [atlas])
    assert set(np.unique(labels)) <= {0, *LABELS}
    truth = healthy.fractions.argmax(0).numpy()
    found = {
        name: dice(np.isin(labels, FREESURFER[name]) & brain, (truth == CLASSES.index(name)) & brain)
        for name in ("white", "cortex", "ventricle", "thalamus", "cerebellar_cortex", "brainstem")
    }
    least = {"white": 0.85, "cortex": 0.75, "ventricle": 0.7, "thalamus": 0.7}
    least |= {"cerebellar_cortex": 0.7, "brainstem": 0.7}
    assert all(found[name] > least[name] for name in least), found
    outside = labels[~brain]
    assert set(np.unique(outside)) == {0, 24}


@pytest.mark.slow
def test_register_finds_a_known_transform(atlas):
    """The scan is the label map itself, 5 % larger, turned by 4 degrees and moved by 5 mm."""
    turn = np.deg2rad(4)
    linear = torch.tensor(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]]
    ).float()
    truth = labelling.Transform(linear / 1.05, torch.tensor([5.0, -3.0, 2.0])).positions()
    tissue = sample(atlas.tissue(), atlas.affine, truth)
    found = labelling.register(atlas, tissue, torch.ones(tissue.shape[1:]))
    inside = tissue[0] > 0.5
    error = (found - truth).norm(dim=-1)[inside]
    assert float(error.median()) < 1.0
    assert np.percentile(error.numpy(), 95) < 2.5


def test_nearest_atlases_sorts_by_fluid_around_the_thalami(atlas):
    parts = atlas.parts.clone()
    parts[(parts == 1 + LABELS.index(2)) | (parts == 1 + LABELS.index(10))] = 1 + LABELS.index(4)
    wide = Atlas("wide", parts, atlas.affine)
    points = labelling.box_points()
    tissue = sample(atlas.tissue(), atlas.affine, points)
    assert [each.name for each in labelling.nearest_atlases([wide, atlas], tissue, 2)] == ["template", "wide"]
    tissue = sample(wide.tissue(), wide.affine, points)
    assert labelling.nearest_atlases([atlas, wide], tissue, 1)[0].name == "wide"


def test_fractions_are_linear_between_the_means():
    intensities = TissueIntensities(np.array([1.0, 3.0, 5.0]), np.ones(3))
    fractions = intensities.fractions(np.array([[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0]]]))
    np.testing.assert_allclose(fractions[0].ravel(), [0, 0, 0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(fractions[1].ravel(), [0, 0, 0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("value", "label"), [(0.0, 24), (1.0, 4), (3.0, 3), (4.0, 10), (4.4, 13), (5.0, 2), (9.0, 2)]
)
def test_likelihood_is_highest_in_the_structure_of_the_intensity(value, label):
    intensities = TissueIntensities(np.array([1.0, 3.0, 5.0]), np.full(3, 0.3))
    likelihood = {
        each: float(intensities.likelihood(np.array([value]), each)[0]) for each in (label, 24, 3, 10, 13, 2)
    }
    best = max(likelihood, key=likelihood.get)
    assert best == label or (best in FLUID and label in FLUID)


def test_fit_intensities_reduces_a_bias_field_by_a_third_or_more(scan, healthy):
    brain = healthy.brain.numpy()
    ramp = np.linspace(0.85, 1.15, scan.shape[0])[:, None, None]
    flat, intensities = labelling.fit_intensities((scan * ramp).astype(np.float32), brain)
    assert (np.diff(intensities.means) > 0).all()
    white = (healthy.fractions[CLASSES.index("white")] > 0.95).numpy() & brain
    middle = scan.shape[0] // 2
    left, right = white.copy(), white.copy()
    left[middle - 20 :], right[: middle + 20] = False, False
    before = (scan * ramp)[right].mean() / (scan * ramp)[left].mean()
    after = flat[right].mean() / flat[left].mean()
    assert abs(after - 1) < 2 / 3 * abs(before - 1)


@pytest.mark.slow
def test_read_atlas_joins_sides_and_keeps_the_geometry(tmp_path):
    source = template_source()
    labels = template_labels()
    half = labels.shape[0] // 2
    sided = labels.copy()
    sided[:half][labels[:half] == 2] = 41
    sided[:half][labels[:half] == 10] = 49
    path = tmp_path / "x_dseg.nii.gz"
    nib.save(nib.Nifti1Image(sided, source.affine), path)
    read = labelling.read_atlas(str(path))
    classes, _ = read_label_map(str(path))
    assert read.parts.shape == classes.shape
    counts = np.bincount(read.parts.numpy().ravel(), minlength=len(LABELS) + 1)
    for label in (2, 10, 3):
        assert counts[1 + LABELS.index(label)] == (labels == label).sum()
    # The template is aligned with SRI24 already.
    middle = np.argwhere(read.parts.numpy() == 1 + LABELS.index(10)).mean(0)
    expected = nib.affines.apply_affine(source.affine, np.argwhere(labels == 10).mean(0))
    assert np.linalg.norm(nib.affines.apply_affine(read.affine, middle) - expected) < 1.5


def test_main_writes_label_maps_of_a_dataset(tmp_path, monkeypatch, scan, healthy):
    folder = tmp_path / "ds" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    stem = folder / "sub-01_space-SRI24_desc-"
    save_image(to_image(to_grid(tensor(scan))), folder / f"{stem.name}preproc_T1w.nii.gz")
    brain = to_image(to_grid(healthy.brain, np.uint8), np.uint8)
    save_image(brain, folder / f"{stem.name}brain_mask.nii.gz")
    monkeypatch.setattr(labelling, "read_atlas", str)
    seen = []
    monkeypatch.setattr(
        labelling,
        "label_scan",
        lambda scan, brain, atlases, count: seen.append((atlases, count)) or brain.astype(np.uint8) * 2,
    )
    (tmp_path / "a_dseg.nii.gz").touch()
    arguments = [str(tmp_path / "ds"), str(tmp_path / "out"), str(tmp_path / "a_dseg.nii.gz"), "--count", "2"]
    assert labelling.main(arguments) == 0
    written = nib.load(tmp_path / "out" / "sub-01_dseg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), 2 * np.asarray(brain.dataobj))
    assert labelling.main(arguments) == 0
    assert seen == [([str(tmp_path / "a_dseg.nii.gz")], 2)]
    assert labelling.main([str(tmp_path / "ds"), str(tmp_path / "out"), str(tmp_path / "none")]) == 66
