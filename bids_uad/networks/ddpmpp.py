"""The DDPM++ U-Net of the reconstruction detectors, and the diffusion process of those that use one.

The network is that of Ho et al. 2020 (arXiv 2006.11239) with the changes of Song et al. 2021 (arXiv
2011.13456): residual blocks that resample, FiLM-conditioned group normalisation, attention at coarse
resolutions. The options of :class:`DDPMppConfig` cover the published variant of arXiv 2512.01534 and the
corrected one. The diffusion process has a shifted cosine schedule (Hoogeboom et al. 2023, arXiv 2301.11093),
and its network predicts the velocity v (Salimans and Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from bids_uad.constraints import Constrained, Count, CountOrZero, Interval, Items, OneOf, invalid


@dataclass(frozen=True)
class DDPMppConfig(Constrained):
    """Architecture of a DDPM++ U-Net.

    Parameters
    ----------
    size : int, default=128
        Nominal side of the input in pixels; it determines which levels have attention and dropout.
    width : int, default=64
        Channels of the first level.
    multipliers : tuple of int, default=(1, 2, 2, 4, 4)
        Channels of each level, in units of `width`.
    blocks : tuple of int, default=(1, 1, 2, 4, 2)
        Residual blocks of each encoder level; the decoder has one more.
    attention : tuple of int, default=(16, 8)
        Sides of the levels with attention, in pixels.
    middle_attention : bool, default=True
        Whether there is attention between the two bottleneck blocks.
    head_width : int, default=64
        Channels of one attention head.
    dropout : float, default=0.1
        Dropout probability in levels of at most `dropout_at` pixels and in the bottleneck.
    dropout_at : int, default=8
        Largest side in pixels of the levels with dropout.
    rescale : bool, default=True
        Whether to divide each residual sum by the square root of 2.
    time_embedding : bool, default=True
        Whether the network is conditioned on a time label.
    causal : bool, default=False
        Whether each pixel attends only to the pixels before it in raster order, as published.
    activate_second : bool, default=True
        Whether there is a SiLU before the second convolution of a block; the published network has none.
    norm : {"group", "batch"}, default="group"
        Normalisation; the published networks of IterMask have batch normalisation.
    fold : int, default=1
        Squares of `fold` x `fold` pixels are folded into channels at the input and unfolded at the output. 1
        is the published network; 2 reduces the cost of the full resolution by a factor of four.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, or number of levels, channels and attention heads are inconsistent.
    """

    size: Count = 128
    width: Count = 64
    multipliers: Annotated[tuple[Count, ...], Items()] = (1, 2, 2, 4, 4)
    blocks: tuple[CountOrZero, ...] = (1, 1, 2, 4, 2)
    attention: tuple[Count, ...] = (16, 8)
    middle_attention: bool = True
    head_width: Count = 64
    dropout: Annotated[float, Interval(0, 1, closed="left")] = 0.1
    dropout_at: CountOrZero = 8
    rescale: bool = True
    time_embedding: bool = True
    causal: bool = False
    activate_second: bool = True
    norm: Annotated[str, OneOf("group", "batch")] = "group"
    fold: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.blocks) != len(self.multipliers):
            raise invalid(self, "blocks", f"of the length of 'multipliers', {len(self.multipliers)}")
        if self.time_embedding and (self.width % 2 or self.width < 4):
            raise invalid(self, "width", "an even int in the range [4, inf) if 'time_embedding' is True")
        for channels in self.attended_channels:
            if channels % self.head_width:
                raise invalid(
                    self,
                    "head_width",
                    f"a divisor of the {channels} channels of each attention",
                )

    @property
    def divisor(self) -> int:
        """Number by which height and width of an input must be divisible."""
        return self.fold * 2 ** (len(self.multipliers) - 1)

    @property
    def attended_channels(self) -> list[int]:
        """Channels of each level with attention, the bottleneck last."""
        widths = [self.width * multiplier for multiplier in self.multipliers]
        levels = [
            channels
            for level, channels in enumerate(widths)
            if self.size // self.fold // 2**level in self.attention
        ]
        return levels + widths[-1:] * self.middle_attention


NETWORK = DDPMppConfig(
    size=224,
    width=32,
    multipliers=(1, 1, 1, 2, 3, 4),
    blocks=(1, 1, 1, 2, 4, 2),
    attention=(14, 7),
    head_width=32,
    dropout_at=14,
)
"""Published network of ANDi; those of RIAD and IterMask are variants."""
LITE_NETWORK = DDPMppConfig(
    size=224,
    width=24,
    multipliers=(1, 2, 3),
    blocks=(1, 1, 1),
    attention=(),
    middle_attention=False,
    dropout=0.0,
    fold=4,
)
"""Network of preset ``lite``, for two CPU cores."""
SEGMENTATION_NETWORK = replace(
    LITE_NETWORK,
    size=192,
    width=24,
    multipliers=(1, 2, 3, 4),
    blocks=(1, 1, 1, 1),
    time_embedding=False,
    fold=2,
)
"""Network of PLS, and of the feature network that is made from it."""


def check_network(hyper: Any, size: str, *, time_embedding: bool) -> None:
    """Raise an error if the network of a detector cannot process its input.

    Parameters
    ----------
    hyper : dataclass instance
        Has a field `network`, a :class:`DDPMppConfig`.
    size : str
        Name of the field with height and width of the input, in pixels.
    time_embedding : bool
        Whether the detector conditions its network on a time label.

    Raises
    ------
    InvalidParameterError
        If the network has a time embedding that is not used, or has none where one is used, or if the size of
        the input is not divisible by that of the coarsest level.
    """
    network = hyper.network
    if network.time_embedding != time_embedding:
        raise invalid(network, "time_embedding", f"{time_embedding} in {type(hyper).__name__}")
    if any(side % network.divisor for side in getattr(hyper, size)):
        allowed = f"divisible by {network.divisor} (levels and 'fold' of its network)"
        raise invalid(hyper, size, allowed)


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """Embed times by sines and cosines of geometrically spaced frequencies from 1 to 1e-4.

    Parameters
    ----------
    time : Tensor, shape (B,)
        Time labels.
    width : int
        Number of features, even.

    Returns
    -------
    Tensor, shape (B, width)
        Sines, then cosines.
    """
    half = width // 2
    exponent = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
    phase = time.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)[None]
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def _glorot(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> nn.Conv2d | nn.Linear:
    """Initialise weights by Glorot's uniform distribution, or by zeros if scale is 0, and biases by zeros."""
    if scale == 0.0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _Exact(nn.Module):
    """Layer that remains in float32 on a CPU under autocast.

    Input, output, time embedding and residual connections of a network need the precision, and cost little.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class ExactConv2d(_Exact, nn.Conv2d):
    """Convolution that remains in float32 on a CPU under autocast."""


class ExactLinear(_Exact, nn.Linear):
    """Linear layer that remains in float32 on a CPU under autocast."""


def _conv3(inputs: int, outputs: int, scale: float = 1.0, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return _glorot(kind(inputs, outputs, 3, padding=1), scale)


def _norm(channels: int, config: DDPMppConfig) -> nn.GroupNorm | nn.BatchNorm2d:
    if config.norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, min(channels // 4, 32)), channels, eps=1e-6)


@torch.inference_mode(False)
@torch.no_grad()
def _enlarging(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Return the transposed 4x4 convolution that equals nearest-neighbour enlarging and a 3x3 convolution.

    It has 4 instead of 9 products per pixel, because each two neighbours of the enlarged map are equal.
    """
    inputs, outputs = conv.in_channels, conv.out_channels
    result = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, device=conv.weight.device)
    padded = F.pad(conv.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    result.weight.copy_(sum(padded[:, :, i : i + 4, j : j + 4] for i in (0, 1) for j in (0, 1)))
    result.bias.copy_(conv.bias)
    return result.to(memory_format=torch.channels_last).train(conv.training)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with FiLM conditioning, optionally resampling by 2."""

    def __init__(
        self, inputs: int, outputs: int, config: DDPMppConfig, *, dropout: float, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.activate_second = config.activate_second
        self.gain = 1 / math.sqrt(2) if config.rescale else 1.0
        self.norm1 = _norm(inputs, config)
        self.conv1 = _conv3(inputs, outputs)
        self.norm2 = _norm(outputs, config)
        self.film = _glorot(ExactLinear(4 * config.width, 2 * outputs)) if config.time_embedding else None
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3(outputs, outputs, scale=0.0)
        project = inputs != outputs or resample is not None
        self.shortcut = _glorot(ExactConv2d(inputs, outputs, 1)) if project else nn.Identity()

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H', W') under an embedding of shape (B or 1, 4 width)."""
        h = _silu(self.norm1(x))
        enlarges = isinstance(self.conv2, nn.ConvTranspose2d)
        if enlarges:
            h = self.conv1(h)
        else:
            h = self._resized(self.conv1(h)) if self.resample == "up" else self.conv1(self._resized(h))
        # Under autocast, convolutions return bfloat16; normalisation and residual sum remain in float32.
        h = self._conditioned_norm(h.float(), embedding)
        if self.activate_second:
            h = _silu(h)
        h = self.conv2(self.dropout(h)).float()
        h = h.add_(self._resized(self.shortcut(x)) if enlarges else self.shortcut(self._resized(x)))
        return h if self.gain == 1 else h.mul_(self.gain)

    def fuse(self) -> None:
        """Make batch normalisation and enlarging part of the convolutions, in place; for inference only."""
        if self.resample == "up":
            self.conv2 = _enlarging(self.conv2)
        if isinstance(self.norm2, nn.BatchNorm2d) and self.film is None:
            self.conv1 = fuse_conv_bn_eval(self.conv1, self.norm2)
            self.norm2 = nn.Identity()

    def _conditioned_norm(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """Apply the second normalisation, and the scale and shift of FiLM."""
        if self.film is None:
            return self.norm2(h)
        scale, shift = self.film(embedding).float().chunk(2, dim=1)
        if len(embedding) > 1 or not isinstance(self.norm2, nn.GroupNorm):
            return self.norm2(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        # One embedding for all images: scale and shift are those of the normalisation.
        weight = self.norm2.weight * (1 + scale[0])
        bias = self.norm2.bias * (1 + scale[0]) + shift[0]
        return F.group_norm(h, self.norm2.num_groups, weight, bias, self.norm2.eps)


class Attention(nn.Module):
    """Multi-head self-attention over the pixels of a feature map, in raster order."""

    def __init__(self, channels: int, config: DDPMppConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_width
        self.causal = config.causal
        self.gain = 1 / math.sqrt(2) if config.rescale else 1.0
        self.norm = _norm(channels, config)
        self.inner = nn.Linear(channels, channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = _glorot(nn.Linear(channels, channels), scale=0.0)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to feature maps of shape (B, C, H, W)."""
        batch, channels, height, width = x.shape
        tokens = self.inner(self.norm(x).flatten(2).transpose(1, 2))
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        mixed = self.dropout(mixed).transpose(1, 2).reshape(batch, channels, height, width)
        return (x + mixed) * self.gain


class DDPMpp(nn.Module):
    """DDPM++ U-Net.

    Parameters
    ----------
    config : DDPMppConfig
        Architecture.
    inputs : int, default=1
        Input channels.

    Notes
    -----
    The outputs of the input convolution, of each encoder block (after attention) and of each down-sampling
    block are skip connections, which the decoder uses in reverse order.
    """

    def __init__(self, config: DDPMppConfig, inputs: int = 1) -> None:
        super().__init__()
        self.config = config
        channels = [config.width * multiplier for multiplier in config.multipliers]
        sizes = [config.size // config.fold // 2**level for level in range(len(channels))]
        dropout = [config.dropout if size <= config.dropout_at else 0.0 for size in sizes]
        last = len(channels) - 1

        def attention(level: int) -> nn.Module:
            return Attention(channels[level], config) if sizes[level] in config.attention else nn.Identity()

        if config.time_embedding:
            embedded = 4 * config.width
            self.time = nn.Sequential(
                _glorot(ExactLinear(config.width, embedded)),
                nn.SiLU(),
                _glorot(ExactLinear(embedded, embedded)),
            )
        self.enter = _conv3(inputs * config.fold**2, config.width, kind=ExactConv2d)
        self.encoder, self.encoder_attention = nn.ModuleList(), nn.ModuleList()
        skips, now = [config.width], config.width
        for level, count in enumerate(config.blocks):
            for _ in range(count):
                block = ResidualBlock(now, channels[level], config, dropout=dropout[level])
                self.encoder.append(block)
                self.encoder_attention.append(attention(level))
                now = channels[level]
                skips.append(now)
            if level < last:
                block = ResidualBlock(now, now, config, dropout=dropout[level], resample="down")
                self.encoder.append(block)
                self.encoder_attention.append(nn.Identity())
                skips.append(now)
        self.middle_in = ResidualBlock(now, now, config, dropout=config.dropout)
        self.middle_attention = Attention(now, config) if config.middle_attention else nn.Identity()
        self.middle_out = ResidualBlock(now, now, config, dropout=config.dropout)
        self.decoder = nn.ModuleList()
        for level in reversed(range(len(channels))):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attention": attention(level)})
            for _ in range(config.blocks[level] + 1):
                block = ResidualBlock(now + skips.pop(), channels[level], config, dropout=dropout[level])
                stage["blocks"].append(block)
                now = channels[level]
            if level > 0:
                stage["up"] = ResidualBlock(now, now, config, dropout=dropout[level], resample="up")
            self.decoder.append(stage)
        self.leave_norm = _norm(now, config)
        self.leave = _conv3(now, config.fold**2, scale=0.0, kind=ExactConv2d)

    @property
    def bytes_per_slice(self) -> int:
        """Size in bytes of the feature map of one image at the finest level, in float32."""
        return 4 * self.config.width * (self.config.size // self.config.fold) ** 2

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map images to images.

        Parameters
        ----------
        x : Tensor, shape (B, inputs, H, W)
            Images; H and W are divisible by ``config.divisor``.
        time : Tensor, shape (B,) or (1,), optional
            Time labels, or one for all images; required if the network has a time embedding.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
            Images.
        """
        h = self.decoder_maps(x, time)[-1]
        return F.pixel_shuffle(self.leave(_silu(self.leave_norm(h))), self.config.fold)

    def decoder_maps(self, x: Tensor, time: Tensor | None = None) -> list[Tensor]:
        """Compute the map of each stage of the decoder.

        Parameters
        ----------
        x, time
            As of :meth:`forward`.

        Returns
        -------
        list of Tensor
            Maps from coarse to fine, that of level k of shape (B, width * multipliers[k], h, w).
        """
        embedding = None
        if self.config.time_embedding:
            embedding = F.silu(self.time(sinusoidal_embedding(time, self.config.width).to(x.dtype)))
        h = self.enter(F.pixel_unshuffle(x, self.config.fold)).float()
        skips = [h]
        for block, attend in zip(self.encoder, self.encoder_attention, strict=True):
            h = attend(block(h, embedding))
            skips.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, embedding)), embedding)
        maps = []
        for stage in self.decoder:
            for block in stage["blocks"]:
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
            h = stage["attention"](h)
            maps.append(h)
            if "up" in stage:
                h = stage["up"](h, embedding)
        return maps


LOG_SNR_LIMIT = 15.0
"""Limit of the log-signal-to-noise ratio on both sides, before the shift."""
SHIFT = 2 * math.log(56 / 224)
"""Shift of the schedule from images of 56 x 56 pixels to slices of 224 x 224."""


def log_snr(time: Tensor) -> Tensor:
    """Compute the log-signal-to-noise ratio, which decreases from about 12.2 to -17.8.

    Parameters
    ----------
    time : Tensor
        Diffusion times in [0, 1].

    Returns
    -------
    Tensor
        Ratios, same shape.
    """
    first, last = (math.atan(math.exp(sign * LOG_SNR_LIMIT / 2)) for sign in (-1, 1))
    return -2 * torch.tan(first + time * (last - first)).log() + SHIFT


def signal_and_noise(time: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the scales alpha of the signal and sigma of the noise at each time, same shape as `time`."""
    ratio = log_snr(time)
    return ratio.sigmoid().sqrt(), (-ratio).sigmoid().sqrt()


def transition_weight(time: Tensor, earlier: Tensor) -> Tensor:
    """Compute the factor c by which a difference of two images enters their posterior means.

    The means of q(z_s | z_t, x) for two images differ by c (x - x'), where
    c = (1 - exp(lambda_t - lambda_s)) alpha_s and lambda is the log-signal-to-noise ratio.

    Parameters
    ----------
    time : Tensor
        Times t.
    earlier : Tensor, same shape
        Times s < t.

    Returns
    -------
    Tensor
        Factors, same shape.
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
    """Compute pyramid noise: white noise plus enlarged layers of coarser white noise, of unit power.

    Parameters
    ----------
    white : callable
        ``white(number, size)`` returns white noise of shape (B, 1, *size), independent for each number.
    size : tuple of int
        Height and width in pixels.
    discount : float
        Weight of layer k is ``discount ** k``.
    ratio : callable
        ``ratio()`` returns a random number r; layer k is smaller than the one before by a factor of r ** k.
    published : bool, default=False
        Whether to begin with a second layer of full resolution and to divide by the standard deviation of the
        batch, as in the published code. If False, the first layer is smaller, and each image has unit power.

    Returns
    -------
    Tensor, shape (B, 1, *size)
        Noise.

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
    """Draw :func:`layered_noise` for training, with ratios drawn uniformly between 2 and 4.

    Parameters
    ----------
    images : Tensor, shape (B, 1, H, W)
        Images whose shape, type and device the noise has.
    discount : float
        As in :func:`layered_noise`.
    generator : torch.Generator
        Draws noise and ratios.
    published : bool
        As in :func:`layered_noise`.

    Returns
    -------
    Tensor, shape (B, 1, H, W)
        Noise.
    """
    device = images.device

    def white(number: int, size: tuple[int, int]) -> Tensor:
        return torch.randn((*images.shape[:2], *size), generator=generator, device=device, dtype=images.dtype)

    def ratio() -> float:
        return 2 + 2 * float(torch.rand((), generator=generator, device=device))

    return layered_noise(white, tuple(images.shape[-2:]), discount, ratio, published=published)


class NoisePredictor:
    """Predict image and noise from the velocity v that a network predicts.

    Parameters
    ----------
    network : nn.Module
        Network that is called as ``network(z, label)`` with one time label per image.
    time_scale : float
        Factor from time to time label. With 1000, times in [0, 1] use all frequencies of the embedding; the
        published code has 1, for which most channels are nearly constant.
    """

    def __init__(self, network: nn.Module, time_scale: float) -> None:
        self.network = network
        self.time_scale = time_scale

    def loss(self, images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Compute the mean squared error of the noise that follows from the predicted velocity.

        Parameters
        ----------
        images : Tensor, shape (B, 1, H, W)
            Healthy slices, intensities in [-1, 1].
        noise : Tensor, shape (B, 1, H, W)
            Noise that is added.
        time : Tensor, shape (B,)
            Diffusion times in [0, 1].

        Returns
        -------
        Tensor, scalar
            The loss.
        """
        alpha, sigma = (scale[:, None, None, None] for scale in signal_and_noise(time))
        noised = alpha * images + sigma * noise
        velocity = self.network(noised, self.time_scale * time)
        return (sigma * noised + alpha * velocity - noise).square().mean()

    def restore(self, noised: Tensor, time: float) -> Tensor:
        """Predict the image.

        Parameters
        ----------
        noised : Tensor, shape (B, 1, H, W)
            Slices with noise.
        time : float
            Diffusion time of all slices.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
            Predicted image, clipped to [-1, 1].
        """
        # One label for the batch, so that it is embedded once.
        times = torch.full((1,), time, device=noised.device)
        # On the CPU, since not every device has double precision.
        alpha, sigma = (float(scale) for scale in signal_and_noise(torch.full((1,), time).double()))
        velocity = self.network(noised, self.time_scale * times).to(noised.dtype)
        return torch.mul(velocity, -sigma).add_(noised, alpha=alpha).clamp_(-1, 1)

    def denoise(self, noised: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Predict image and noise.

        Parameters
        ----------
        noised : Tensor, shape (B, 1, H, W)
            Slices with noise.
        time : float
            Diffusion time of all slices.

        Returns
        -------
        image : Tensor, shape (B, 1, H, W)
            Predicted image, clipped to [-1, 1].
        noise : Tensor, shape (B, 1, H, W)
            Noise for which `noised` is composed of this image and this noise.
        """
        image = self.restore(noised, time)
        alpha, sigma = (float(scale) for scale in signal_and_noise(torch.tensor(time, dtype=torch.float64)))
        return image, (noised - alpha * image) / sigma
