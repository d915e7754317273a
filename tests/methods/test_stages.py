"""Requirements of the training loop on the stages of every detector."""

from __future__ import annotations

import pytest
import torch

from bids_uad.methods.base import GradientStage
from bids_uad.methods.registry import DETECTORS, build_detector
from tests.methods.tiny import batch_for


@pytest.mark.parametrize("name", DETECTORS)
def test_every_weight_of_a_stage_gets_a_gradient(name):
    """In training by several processes, each waits for the gradient of every weight."""
    torch.manual_seed(0)
    detector = build_detector(name, "lite").train()
    size = detector.field_of_view
    brain = torch.zeros(2, 1, *size, dtype=torch.bool)
    brain[..., 40:120, 50:140] = True
    tissue = torch.where(brain[:, 0], torch.randint(1, 6, (2, *size)), 0)
    slices = torch.rand(2, 1, *size) * brain
    for stage in detector.stages():
        if not isinstance(stage, GradientStage):
            continue
        batch = batch_for(stage, detector, slices, brain, tissue)
        stage.loss(batch, torch.Generator().manual_seed(0)).backward()
        for label, weight in stage.module.named_parameters():
            assert weight.grad is not None, label
        detector.zero_grad()
