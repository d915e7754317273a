"""The Gaussian diffusion that ANDi and partial diffusion share: schedule, noises, v-prediction.

Continuous time t in [0, 1], variance preserving: z = alpha x + sigma n. The log-signal-to-noise ratio follows
a cosine (Nichol & Dhariwal 2021, arXiv 2102.09672), truncated, and shifted for the size of the images
(Hoogeboom et al. 2023, arXiv 2301.11093).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

LOG_SNR_LIMIT = 15.0  # before the shift
SHIFT = 2 * math.log(56 / 224)


def log_snr(time: Tensor) -> Tensor:
    """Log-signal-to-noise ratio at each time, falling from about 12.2 to -17.8.

    Parameters
    ----------
    time : Tensor
        In [0, 1].
    """
    first, last = (math.atan(math.exp(sign * LOG_SNR_LIMIT / 2)) for sign in (-1, 1))
    return -2 * torch.tan(first + time * (last - first)).log() + SHIFT


def signal_and_noise(time: Tensor) -> tuple[Tensor, Tensor]:
    """Scales alpha of the signal and sigma of the noise at each time, same shape as `time`."""
    ratio = log_snr(time)
    return ratio.sigmoid().sqrt(), (-ratio).sigmoid().sqrt()


def transition_weight(time: Tensor, earlier: Tensor) -> Tensor:
    """Factor c between an error in the predicted image and one in the posterior mean at `earlier`.

    The posterior means of q(z_s | z_t, x) for two images differ by c (x - x'), with
    c = (1 - exp(lambda_t - lambda_s)) alpha_s.
    """
    return -torch.expm1(log_snr(time) - log_snr(earlier)) * signal_and_noise(earlier)[0]


def slice_noise(slices: Tensor, generators: Sequence[Generator]) -> Tensor:
    """White noise in the shape of `slices`, each slice from a generator of its own.

    Parameters
    ----------
    slices : Tensor, shape (B, C, H, W)
    generators : sequence of torch.Generator, length B
    """
    shape = slices.shape[1:]
    drawn = [
        torch.randn(shape, generator=generator, device=slices.device, dtype=slices.dtype)
        for generator in generators
    ]
    return torch.stack(drawn)


def pyramid_noise(images: Tensor, discount: float, generator: Generator, *, published: bool) -> Tensor:
    """Noise with power at many scales, of unit power in all.

    White noise plus ever coarser white noise, enlarged, each weighted by a further `discount`.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Gives shape, type and device.
    discount : float
    generator : torch.Generator
    published : bool
        The published code starts with a second full-resolution layer and divides by the standard deviation
        of the whole batch; otherwise the first coarse layer is smaller, and each image has unit power.

    Returns
    -------
    Tensor, shape (B, 1, H, W)

    References
    ----------
    Frotscher et al. 2023, "Unsupervised anomaly detection using aggregated normative diffusion".
    """
    batch, channels, height, width = images.shape

    def white(*size: int) -> Tensor:
        return torch.randn(
            (batch, channels, *size), generator=generator, device=images.device, dtype=images.dtype
        )

    noise = white(height, width)
    size, level = height, 0 if published else 1
    while True:
        ratio = 2 + 2 * float(torch.rand((), generator=generator, device=images.device))
        size = max(1, int(size / ratio**level))
        layer = F.interpolate(white(size, size), size=(height, width), mode="bilinear", antialias=True)
        noise = noise + discount**level * layer
        level += 1
        if size == 1:
            break
    return noise / (noise.std() if published else noise.square().mean((1, 2, 3), keepdim=True).sqrt())


class NoisePredictor:
    """A network that predicts the velocity v, read as image or as noise.

    Parameters
    ----------
    network : nn.Module
        Called as ``network(z, label)`` with one time label per image.
    time_scale : float
        Factor from time to label. 1000 spreads [0, 1] over the frequencies of a sinusoidal embedding; the
        published code has 1, which leaves most of them constant.
    """

    def __init__(self, network: nn.Module, time_scale: float) -> None:
        self.network = network
        self.time_scale = time_scale

    def loss(self, images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Mean squared error of the noise implied by the predicted velocity.

        Parameters
        ----------
        images, noise : Tensor, shape (B, 1, H, W)
        time : Tensor, shape (B,)
        """
        alpha, sigma = (scale[:, None, None, None] for scale in signal_and_noise(time))
        noised = alpha * images + sigma * noise
        velocity = self.network(noised, self.time_scale * time)
        return (sigma * noised + alpha * velocity - noise).square().mean()

    def denoise(self, noised: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Predicted image, kept in [-1, 1], and the noise that goes with it.

        Parameters
        ----------
        noised : Tensor, shape (B, 1, H, W)
        time : float
            The same for all.
        """
        # One label for the whole batch, so that it is embedded once.
        times = torch.full((1,), time, device=noised.device)
        alpha, sigma = (float(scale) for scale in signal_and_noise(times.double()))
        velocity = self.network(noised, self.time_scale * times).to(noised.dtype)
        image = (alpha * noised - sigma * velocity).clamp(-1, 1)
        return image, (noised - alpha * image) / sigma
