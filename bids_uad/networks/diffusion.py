"""The Gaussian diffusion that ANDi and partial diffusion share: schedule, noises, v-prediction.

Continuous time t in [0, 1], variance preserving: z = alpha x + sigma n. The log-signal-to-noise ratio follows
a cosine (Nichol & Dhariwal 2021, arXiv 2102.09672), truncated, and shifted for the size of the images
(Hoogeboom et al. 2023, arXiv 2301.11093).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

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


def layered_noise(
    white: Callable[[int, tuple[int, int]], Tensor],
    size: tuple[int, int],
    discount: float,
    ratio: Callable[[], float],
    *,
    published: bool = False,
) -> Tensor:
    """Noise with power at many scales, of unit power in all.

    White noise plus ever coarser white noise, enlarged, each weighted by a further `discount`.

    Parameters
    ----------
    white : callable
        ``white(number, size)``, white noise of shape (B, 1, *size), independent for each number.
    size : tuple of int
        Height and width.
    discount : float
    ratio : callable
        Gives how much coarser a layer is than the one before; the second time its square counts, and so on.
    published : bool
        The published code starts with a second full-resolution layer and divides by the standard deviation
        of the whole batch; otherwise the first coarse layer is smaller, and each image has unit power.

    Returns
    -------
    Tensor, shape (B, 1, *size)

    References
    ----------
    Frotscher et al. 2023, "Unsupervised anomaly detection using aggregated normative diffusion".
    """
    noise = white(0, size)
    now, level = size, 0 if published else 1
    for number in itertools.count(1):
        step = ratio() ** level
        now = (max(1, int(now[0] / step)), max(1, int(now[1] / step)))
        layer = F.interpolate(white(number, now), size=size, mode="bilinear", antialias=True)
        noise = noise + discount**level * layer
        level += 1
        if now == (1, 1):
            break
    return noise / (noise.std() if published else noise.square().mean((1, 2, 3), keepdim=True).sqrt())


def pyramid_noise(images: Tensor, discount: float, generator: Generator, *, published: bool) -> Tensor:
    """Draw :func:`layered_noise` for training, its ratios too: uniformly between 2 and 4.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Gives shape, type and device.
    discount : float
    generator : torch.Generator
    published : bool

    Returns
    -------
    Tensor, shape (B, 1, H, W)
    """
    device = images.device

    def white(number: int, size: tuple[int, int]) -> Tensor:
        return torch.randn((*images.shape[:2], *size), generator=generator, device=device, dtype=images.dtype)

    def ratio() -> float:
        return 2 + 2 * float(torch.rand((), generator=generator, device=device))

    return layered_noise(white, tuple(images.shape[-2:]), discount, ratio, published=published)


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
