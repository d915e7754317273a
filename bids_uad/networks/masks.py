"""Random masks of squares clustered around a place in the brain, as IterMask's network learns to fill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

COVARIANCE = (0.3, 10.0)
WIDE, NARROW = 0.1, 0.4  # pixel pitch of the wide and of the narrow cluster
MEDIUM_SQUARES, LARGE_SQUARES = (5, 10), (3, 10)


@dataclass(frozen=True)
class SquareSize:
    """Squares of one size: side in pixels, and the half-open range of their number for each image."""

    side: int
    low: float | Tensor
    high: float | Tensor


def clustered_squares(brain: Tensor, generator: Generator) -> Tensor:
    """Draw one mask per image: squares of three sizes around a random place, the smallest by far the most.

    Squares lie at pixels drawn from a Gaussian density inside the brain, with row and column from two draws,
    and reach to the right and down. Two images in three have a wide cluster of many squares, the third a
    narrow one of few.

    Parameters
    ----------
    brain : Tensor of bool, shape (B, 1, H, W)

    Returns
    -------
    Tensor of bool, shape (B, 1, H, W)
        Inside the brain.

    References
    ----------
    Liang et al. 2024, "IterMask2: iterative unsupervised anomaly segmentation via spatial and frequency
    masking"; sizes and numbers of the published code.
    """
    batch, _, height, width = brain.shape
    device = brain.device

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, device=device)

    narrow = torch.randint(0, 3, (batch,), generator=generator, device=device) == 2
    c11, c22 = uniform(*COVARIANCE), uniform(*COVARIANCE)
    extent = (c11 * c22).sqrt()
    # A correlation below 1 keeps the density proper.
    sign = torch.randint(0, 2, (batch,), generator=generator, device=device) * 2 - 1
    c12 = sign * uniform(0.0, 0.99 * extent)

    weights = brain.flatten(1).float()
    weights = torch.where(weights.any(1, keepdim=True), weights, torch.ones_like(weights))
    centre = torch.multinomial(weights, 1, generator=generator)
    pitch = torch.where(narrow, NARROW, WIDE)[:, None]
    index = torch.arange(height * width, device=device)[None]
    rows = (index // width - centre // width) * pitch
    columns = (index % width - centre % width) * pitch
    # Mahalanobis distance with the inverse of [[c11, c12], [c12, c22]].
    quadratic = c22[:, None] * rows**2 - 2 * c12[:, None] * rows * columns + c11[:, None] * columns**2
    quadratic = quadratic / (c11 * c22 - c12**2)[:, None]
    density = weights * torch.exp(-0.5 * quadratic)

    sizes = (
        SquareSize(4, torch.where(narrow, 5.0, 100.0) * extent, torch.where(narrow, 20.0, 200.0) * extent),
        SquareSize(8, *MEDIUM_SQUARES),
        SquareSize(16, *LARGE_SQUARES),
    )
    mask = torch.zeros_like(brain)
    for size in sizes:
        count = uniform(size.low, size.high).floor()
        most = max(1, int(count.max()))
        row, column = (
            torch.multinomial(density, most, replacement=True, generator=generator) for _ in range(2)
        )
        corners = row // width * width + column % width
        drawn = torch.arange(most, device=device)[None] < count[:, None]
        # Corners beyond an image's own number go to an extra cell that is cut off again.
        corners = torch.where(drawn, corners, height * width)
        hit = torch.zeros(batch, height * width + 1, device=device).scatter_(1, corners, 1.0)[:, :-1]
        spread = F.pad(hit.view(batch, 1, height, width), (size.side - 1, 0, size.side - 1, 0))
        mask |= F.max_pool2d(spread, size.side, stride=1) > 0
    return mask & brain
