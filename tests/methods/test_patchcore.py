"""PatchCore against scikit-learn's nearest neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from bids_uad.methods.base import Batch
from bids_uad.methods.patchcore import PatchCore, PatchCoreHyper, published_descriptors
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


def test_published_descriptor_is_the_literal_one():
    """Unfold 5 x 5, pool each place's values to 2 C numbers, both maps' numbers together to 2 C again."""
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


def test_published_score_is_squared(batch):
    torch.manual_seed(0)
    plain, squared = (
        PatchCore(replace(TINY, projection_dim=8, squared_distance=flag)).eval() for flag in (False, True)
    )
    with torch.no_grad():
        plain.fit_bank(iter([batch]), torch.Generator().manual_seed(1))
        squared.load_state_dict(plain.state_dict())
        maps = [one.features(batch.slices[:1])[0] for one in (plain, squared)]
        torch.testing.assert_close(*maps)
        distance = plain.score(batch.slices[:1], batch.brain[:1], [])[0, 0, 2::4, 2::4]
        # On the grid of descriptors nothing is interpolated between; the nearest grid points of pixels differ
        # by a quarter of a cell, so the whole map is compared by its order.
        other = squared.score(batch.slices[:1], batch.brain[:1], [])[0, 0, 2::4, 2::4]
    inside = distance > 0
    assert np.corrcoef(distance[inside].square(), other[inside])[0, 1] > 0.99


def test_tissue_and_painted_anomalies_are_told_apart(batch):
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
