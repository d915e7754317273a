"""The network that finds brains: its parts, what it learns from, and what it finds."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from bids_uad.errors import InputError
from bids_uad.preprocessing.brain_extraction.network import (
    INPUT_SHAPE,
    BrainNet,
    _depth_to_space,
    _space_to_depth,
    grid_affine,
    load_network,
    predict_brain_mask,
    scale_to_bright_tissue,
)
from bids_uad.training.brain_extraction import bce_dice_loss, main, train
from bids_uad.training.simulated_heads import Head, read_head, simulate_head

CSF, CORTEX, WHITE, SKULL, SKIN = 24, 3, 2, 515, 507


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.fixture(scope="module")
def label_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shells: white matter, cortex, fluid, skull and skin, 2 mm thick voxels in LAS order."""
    grid = (np.indices((100, 110, 100)).T - np.array([49.5, 54.5, 49.5])).T * 2.0
    radius = np.sqrt((grid**2 / np.array([0.9, 1.1, 1.0]).reshape(3, 1, 1, 1) ** 2).sum(0))
    labels = np.zeros(radius.shape, np.int16)
    for outer, label in ((92, SKIN), (84, SKULL), (76, CSF), (70, CORTEX), (60, WHITE)):
        labels[radius < outer] = label
    path = tmp_path_factory.mktemp("maps") / "training_seg_01_dseg.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.diag([-2.0, 2.0, 2.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def head(label_map: Path) -> Head:
    return read_head(label_map)


def test_depth_to_space_inverts_space_to_depth() -> None:
    volumes = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).reshape(2, 1, 16, 4, 6)
    folded = _space_to_depth(volumes)
    assert folded.shape == (2, 8, 8, 2, 3)
    assert folded[0, :, 0, 0, 0].tolist() == [
        float(volumes[0, 0, x, y, z]) for x in (0, 1) for y in (0, 1) for z in (0, 1)
    ]
    assert torch.equal(_depth_to_space(folded), volumes)


def test_read_head_separates_brain_from_skull_and_skin(head: Head) -> None:
    assert set(head.values) == {0, WHITE, CORTEX, CSF, SKULL, SKIN}
    assert head.index.shape == head.brain.shape
    tissue = sum(head.index == head.values.index(label) for label in (WHITE, CORTEX)).bool()
    assert head.brain[tissue].min() == 1
    outside = sum(head.index == head.values.index(label) for label in (0, SKULL, SKIN)).bool()
    assert head.brain[outside].max() == 0
    fluid = head.brain[head.index == head.values.index(CSF)].mean()
    assert 0 < fluid < 1


def test_simulate_head_is_determined_by_its_generator(head: Head) -> None:
    one, other, third = (simulate_head(head, np.random.default_rng(seed)) for seed in (4, 4, 5))
    for a, b in zip(one, other, strict=True):
        assert a.shape == INPUT_SHAPE
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    assert not torch.equal(one[0], third[0])
    scan, brain = one
    assert 0 <= scan.min() <= scan.max() <= 2
    assert 0 <= brain.min() <= brain.max() <= 1


def test_simulate_head_keeps_the_volume_of_the_brain(head: Head) -> None:
    """Over many heads the brain keeps its volume, give or take size and what is cut off."""
    volumes = [float(simulate_head(head, np.random.default_rng([1, n]))[1].sum()) * 27 for n in range(5)]
    # A voxel of the map is taken for one millimetre.
    assert np.median(volumes) == pytest.approx(float(head.brain.sum()), rel=0.25)


def test_scale_to_bright_tissue_maps_the_percentile_to_1() -> None:
    volume = torch.cat([torch.zeros(5000), torch.linspace(10, 1000, 5000)])
    scaled = scale_to_bright_tissue(volume)
    assert torch.quantile(scaled[5000:], 0.98).item() == pytest.approx(1.0, abs=0.01)
    assert scaled[0] == 0
    assert torch.equal(scale_to_bright_tissue(torch.zeros(500)), torch.zeros(500))


def test_bce_dice_loss_equals_its_formula() -> None:
    brain = (torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    sure = 20 * (2 * brain - 1)
    assert bce_dice_loss(sure, brain).item() < 0.02
    assert bce_dice_loss(-sure, brain).item() > 10
    p = torch.sigmoid(torch.full_like(brain, 0.3))
    entropy = -(brain * p.log() + (1 - brain) * (1 - p).log()).mean()
    overlap = 2 * (p * brain).sum() / (p.sum() + brain.sum() + 1)
    assert bce_dice_loss(torch.full_like(brain, 0.3), brain).item() == pytest.approx(
        float(entropy + 1 - overlap)
    )


class Bright(nn.Module):
    """Calls bright voxels brain."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        return 20 * (volumes - 0.6)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_predict_brain_mask_resamples_to_the_grid_of_the_scan(axes: tuple[int, int, int]) -> None:
    affine = np.diag([-1.5, 2.0, 1.5, 1.0])
    affine[:3, 3] = [90, -60, -30]
    grid = np.indices((120, 100, 130))
    ball = (
        sum((part - c) ** 2 * s**2 for part, c, s in zip(grid, (60, 55, 70), (1.5, 2, 1.5), strict=True))
        < 65**2
    )
    data = np.random.default_rng(0).normal(20, 2, ball.shape) + 100.0 * ball
    data[2:5, 2:5, 2:5] = 300  # a bright speck elsewhere
    data, truth = data.transpose(axes), ball.transpose(axes)
    found = predict_brain_mask(data, affine[:, [*axes, 3]], Bright())
    assert dice(found, truth) > 0.98


def test_predict_brain_mask_of_an_empty_scan_is_empty() -> None:
    assert not predict_brain_mask(np.zeros((30, 30, 30)), np.diag([4.0, 4, 4, 1]), Bright()).any()


def test_grid_affine_is_centred() -> None:
    affine = grid_affine(np.array([3.0, -4.0, 5.0]))
    middle = affine[:3, :3] @ ((np.array(INPUT_SHAPE) - 1) / 2) + affine[:3, 3]
    np.testing.assert_allclose(middle, [3, -4, 5])


@pytest.mark.slow
def test_train_is_reproducible(head: Head) -> None:
    one, other = (train([head], 2, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_train_lowers_the_loss(head: Head) -> None:
    losses: list[float] = []
    train([head], 12, 3, report=lambda _, loss: losses.append(loss))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_main_writes_weights_that_load(label_map: Path, tmp_path: Path) -> None:
    assert main([str(label_map), str(tmp_path), "--steps", "1", "--precision", "fp32"]) == 0
    assert isinstance(load_network(tmp_path / "weights.safetensors"), BrainNet)
    assert "1 heads" in (tmp_path / "MODEL_CARD.md").read_text()
    (tmp_path / "weights.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not the weights of the brain-extraction network"):
        load_network(tmp_path / "weights.safetensors")
