"""The simulator on a GPU draws the same brains as on a CPU, but for rounding."""

from __future__ import annotations

import pytest
import torch

from bids_uad.simulation.subject import (
    Population,
    draw_subject_info,
    make_anatomy,
    make_signal,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_gpu_draws_the_same_brain():
    images = {}
    for device in ("cpu", "cuda"):
        with torch.no_grad(), torch.device(device):
            subject = draw_subject_info(Population(5), 0)
            anatomy = make_anatomy(Population(5), 0, subject, "stroke")
            images[device] = make_signal(Population(5), 0, subject, anatomy, "T1w")[0].cpu()
    assert (images["cpu"] - images["cuda"]).abs().mean() < 1e-3
