"""A network that is small enough for tests, and batches for every training stage."""

from __future__ import annotations

from torch import Tensor

from bids_uad.methods.base import Batch, Detector, GradientStage, PaintedBatch
from bids_uad.networks.ddpmpp import DDPMppConfig

TINY_NETWORK = DDPMppConfig(
    size=64,
    width=16,
    multipliers=(1, 2),
    blocks=(1, 1),
    attention=(),
    middle_attention=False,
    dropout=0.0,
)


def batch_for(
    stage: GradientStage, detector: Detector, slices: Tensor, brain: Tensor, tissue: Tensor | None = None
) -> Batch | PaintedBatch:
    """Return slices, shape (B, 1, H, W), as a batch of a stage; bright pixels are lesions if it paints."""
    if stage.paint is None:
        return Batch(slices, brain, tissue)
    height, width = slices.shape[-2:]
    inputs = detector.inputs(slices[:, 0], range(len(slices)), slice(0, height), slice(0, width))
    return PaintedBatch(inputs, brain, (slices > 0.5).float() * brain, 1.0 * brain)
