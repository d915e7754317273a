"""Structural similarity (SSIM) and gradient magnitude similarity (GMS) of images and feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GMS_CONSTANT = 0.0026
"""Constant of gradient magnitude similarity that stabilises it where both gradients are small."""


def _gaussian(window: int, sigma: float, like: Tensor) -> Tensor:
    """Return the weights of a Gaussian window, whose sum is 1."""
    offset = torch.arange(window, device=like.device, dtype=like.dtype) - window // 2
    weight = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weight / weight.sum()


def ssim_map(
    first: Tensor, second: Tensor, *, window: int = 11, sigma: float = 1.5, valid: bool = False
) -> Tensor:
    """Compute the structural similarity at each pixel, channel by channel.

    Parameters
    ----------
    first, second : Tensor, shape (B, C, H, W)
        Images or feature maps; the constants are those for values in [0, 1].
    window : int, default=11
        Side of the Gaussian window in pixels, odd.
    sigma : float, default=1.5
        Standard deviation of the window in pixels.
    valid : bool, default=False
        Whether to return only pixels whose window lies inside the image. If False, the border is padded with
        zeros.

    Returns
    -------
    Tensor, shape (B, C, H, W)
        Similarity, at most 1; height and width are smaller by ``window - 1`` if `valid`.

    References
    ----------
    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    channels = first.shape[1]
    weight = _gaussian(window, sigma, first)
    down, across = (
        weight.view(shape).expand(channels, 1, -1, -1) for shape in ((1, 1, -1, 1), (1, 1, 1, -1))
    )
    reach = 0 if valid else window // 2

    def smooth(moment: Tensor) -> Tensor:
        # The Gaussian is separable.
        moment = F.conv2d(moment, down, padding=(reach, 0), groups=channels)
        return F.conv2d(moment, across, padding=(0, reach), groups=channels)

    # Depthwise convolutions of many channels are several times as fast in channels-last layout.
    layout = torch.channels_last if channels > 1 else torch.contiguous_format
    first, second = first.contiguous(memory_format=layout), second.contiguous(memory_format=layout)
    mean1, mean2 = smooth(first), smooth(second)
    squares, product = smooth((first * first).addcmul(second, second)), smooth(first * second)
    c1, c2 = 0.01**2, 0.03**2
    means, mean_squares = mean1 * mean2, (mean1 * mean1).addcmul(mean2, mean2)
    likeness = (2 * means + c1) * (2 * (product - means) + c2)
    return likeness / ((mean_squares + c1) * (squares - mean_squares + c2))


def gradient_magnitude(images: Tensor) -> Tensor:
    """Compute the magnitude of the Prewitt gradient, with kernels divided by 3.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Images.

    Returns
    -------
    Tensor, shape (B, 1, H - 2, W - 2)
        Gradient magnitude.
    """
    across = torch.tensor([1.0, 0.0, -1.0], device=images.device, dtype=images.dtype).expand(3, 3) / 3
    kernels = torch.stack([across, across.T])[:, None]
    return F.conv2d(images, kernels).square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()


def gms_maps(first: Tensor, second: Tensor, scales: int = 4) -> list[Tensor]:
    """Compute the gradient magnitude similarity at several scales, each half as fine as the one before.

    Parameters
    ----------
    first, second : Tensor, shape (B, 1, H, W)
        Images, intensities in [0, 1].
    scales : int, default=4
        Number of scales.

    Returns
    -------
    list of Tensor, shape (B, 1, H / 2**k - 2, W / 2**k - 2)
        Similarity in (0, 1], 1 where the gradients are equal.

    References
    ----------
    Xue et al. 2014, "Gradient magnitude similarity deviation"; Zavrtanik et al. 2021, RIAD, eq. 4 to 6.
    """
    maps = []
    for scale in range(scales):
        if scale:
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
        a, b = gradient_magnitude(first), gradient_magnitude(second)
        maps.append((2 * a * b + GMS_CONSTANT) / (a * a + b * b + GMS_CONSTANT))
    return maps
