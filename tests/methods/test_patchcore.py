"""PatchCore against scikit-learn's nearest neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from bids_uad.methods.base import Batch
from bids_uad.methods.patchcore import (
    NearestNeighbour,
    PatchCore,
    PatchCoreHyper,
    farthest_points,
    published_descriptors,
)
from bids_uad.networks.backbones import BackboneConfig

TINY = PatchCoreHyper(
    backbone=BackboneConfig(widths=(4, 8, 8, 16)),
    descriptor="pooled",
    neighbourhood=3,
    candidates=2_000,
    projection_dim=0,
    bank_size=64,
    bank_slices=4,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    brain = torch.zeros(4, 1, 224, 224, dtype=torch.bool)
    brain[:, :, 50:150, 60:180] = True
    return Batch(torch.rand(4, 1, 224, 224, generator=generator) * brain, brain, brain[:, 0].long())


@pytest.fixture
def detector(batch):
    torch.manual_seed(0)
    detector = PatchCore(TINY).eval()
    with torch.no_grad():
        detector.fit_bank(iter([batch]), torch.Generator().manual_seed(1))
    return detector


def test_score_is_the_distance_to_the_nearest_descriptor(detector, batch):
    with torch.no_grad():
        ours = detector.score(batch.slices[:1], batch.brain[:1], [])[0, 0]
        described = detector.descriptors(batch.slices[:1])[0]
    bank = detector.bank.float().numpy()
    distance, _ = NearestNeighbors(n_neighbors=1).fit(bank).kneighbors(described.reshape(-1, 24).numpy())
    covered = F.max_pool2d(batch.brain[:1].float(), 4)[0, 0] > 0
    coarse = np.where(covered, distance.reshape(56, 56), 0).astype(np.float32)
    fine = F.interpolate(torch.from_numpy(coarse)[None, None], size=(224, 224), mode="bilinear")[0, 0]
    expected = torch.where(batch.brain[0, 0], fine, 0)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def test_bank_members_score_zero(detector, batch):
    with torch.no_grad():
        described = detector.descriptors(batch.slices).reshape(-1, 24)
    distance = torch.cdist(detector.bank.float(), described).amin(1)
    assert distance.max() < 0.02  # half precision


def test_descriptors_are_standardised(detector, batch):
    covered = F.max_pool2d(batch.brain.float(), 4)[:, 0] > 0
    with torch.no_grad():
        values = detector.descriptors(batch.slices)[covered]
    assert values.mean(0).abs().max() < 0.2
    assert (values.std(0) - 1).abs().median() < 0.05


def test_published_descriptor_equals_literal_pooling():
    """Unfold 5 x 5, pool to 2 C numbers per map, and those of both maps to 2 C again."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(2, 512, 28, 28, generator=generator)
    coarse = torch.rand(2, 1024, 14, 14, generator=generator)
    ours = published_descriptors(fine, coarse, 5)

    def unfolded(x):
        return F.unfold(x, 5, padding=2).view(2, x.shape[1], 25, *x.shape[-2:])

    far = unfolded(coarse).flatten(1, 2)
    far = F.interpolate(far, size=(28, 28), mode="bilinear", align_corners=False)
    pooled = [
        F.adaptive_avg_pool1d(part.movedim(1, -1).reshape(2 * 784, 1, -1), 1024)[:, 0]
        for part in (unfolded(fine).flatten(1, 2), far)
    ]
    literal = F.adaptive_avg_pool1d(torch.stack(pooled, 1).reshape(2 * 784, 1, -1), 1024)
    torch.testing.assert_close(ours.reshape(2 * 784, 1024), literal[:, 0], atol=1e-5, rtol=1e-5)


def test_squared_distance_squares_the_distances_before_interpolation(batch):
    plain, squared = (
        PatchCore(replace(TINY, projection_dim=8, squared_distance=flag)).eval() for flag in (False, True)
    )
    slices, brain = batch.slices[:1], batch.brain[:1]
    with torch.no_grad():
        plain.fit_bank(iter([batch]), torch.Generator().manual_seed(1))
        squared.load_state_dict(plain.state_dict())
        described = plain.descriptors(slices)[0]
        neighbours = NearestNeighbors(n_neighbors=1).fit(plain.bank.double().numpy())
        distance, _ = neighbours.kneighbors(described.flatten(0, 1).double().numpy())
        cells = F.max_pool2d(brain.float(), 224 // described.shape[0])  # 1 where a cell has brain
        coarse = torch.from_numpy(distance).float().view(cells.shape) * cells
        for detector, power in ((plain, 1), (squared, 2)):
            expected = F.interpolate(coarse**power, size=(224, 224), mode="bilinear", align_corners=False)
            found = detector.score(slices, brain, [])
            torch.testing.assert_close(found, expected * brain, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_search_finds_the_distance_to_the_nearest_neighbour(precision):
    queries, bank = (
        torch.randn(count, 40, generator=torch.Generator().manual_seed(count)) for count in (700, 300)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = NearestNeighbour()(queries, bank)
    distance, _ = (
        NearestNeighbors(n_neighbors=1).fit(bank.double().numpy()).kneighbors(queries.double().numpy())
    )
    assert found.dtype == torch.float32
    expected = torch.from_numpy(distance[:, 0]).float() ** 2
    torch.testing.assert_close(found, expected, rtol=1e-4 if precision == "fp32" else 0.01, atol=1e-3)


def test_feature_loss_decreases_in_training(batch):
    torch.manual_seed(0)
    detector = PatchCore(replace(TINY, backbone=replace(TINY.backbone, classes=3)))
    optimiser = torch.optim.Adam(detector.backbone.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        loss = detector.feature_loss(batch, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


@pytest.mark.parametrize("channels", [5, 128, 300])
def test_farthest_points_equal_a_literal_greedy_selection(channels):
    points = torch.randn(200, channels, generator=torch.Generator().manual_seed(1))
    selected = farthest_points(points, 12, torch.Generator().manual_seed(2)).tolist()
    values = points.numpy()
    expected = [selected[0]]
    for _ in range(11):
        distance = np.linalg.norm(values[:, None] - values[expected][None], axis=2).min(1)
        expected.append(int(distance.argmax()))
    assert selected == expected


def test_farthest_points_from_several_starts_equal_a_literal_greedy_selection():
    """The published approximate coreset, in which the mean distance to the starts limits all distances."""
    points = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    selected = farthest_points(points, 30, torch.Generator().manual_seed(2), starts=10).tolist()
    starts = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:10].numpy()
    values = points.numpy()
    distances = np.linalg.norm(values[:, None] - values[None], axis=2)
    nearest, expected = distances[:, starts].mean(1), []
    for _ in range(30):
        expected.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distances[expected[-1]])
    assert selected == expected
    assert selected != farthest_points(points, 30, torch.Generator().manual_seed(2)).tolist()


def test_preset_paper_has_one_percent_of_all_descriptors_in_single_precision():
    with torch.device("meta"):
        detector = PatchCore(PatchCore.presets["paper"])
    (stage,) = detector.stages()
    assert detector.bank.dtype == torch.float32
    assert len(detector.bank) == 0.01 * stage.slices * 28**2
    assert PatchCore(TINY).bank.dtype == torch.float16


def test_farthest_points_of_too_few_points_raise_an_error():
    with pytest.raises(ValueError, match="cannot select 5 of 4"):
        farthest_points(torch.zeros(4, 2), 5, torch.Generator())
