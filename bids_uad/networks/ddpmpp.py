"""The DDPM++ U-Net, backbone of the reconstruction detectors.

Ho et al. 2020 (arXiv 2006.11239) with the improvements of Song et al. 2021 (arXiv 2011.13456): residual
blocks that resample, FiLM-conditioned group normalisation, attention at coarse resolutions. The switches
of :class:`DDPMppConfig` reach both the published variant of arXiv 2512.01534 and the corrected one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import (
    Constrained,
    Count,
    CountOrZero,
    Interval,
    Items,
    OneOf,
    invalid,
)


@dataclass(frozen=True)
class DDPMppConfig(Constrained):
    """Shape of a DDPM++ U-Net.

    Parameters
    ----------
    size : int
        Side of the square input in pixels; it fixes at which levels attention sits.
    width : int
        Channels of the first level.
    multipliers : tuple of int
        Channels of each level, in units of `width`.
    blocks : tuple of int
        Residual blocks of each encoder level; the decoder has one more.
    attention : tuple of int
        Feature widths in pixels that get attention.
    middle_attention : bool
        Attention between the two bottleneck blocks.
    head_width : int
        Channels of one attention head.
    dropout : float
        Dropout probability in the levels of at most `dropout_at` pixels and in the bottleneck.
    dropout_at : int
        Feature width in pixels from which on dropout acts.
    rescale : bool
        Divide each residual sum by the square root of 2.
    time_embedding : bool
        Condition on a time label.
    causal : bool
        Let each pixel attend only to the pixels before it in raster order (the published behaviour).
    activate_second : bool
        SiLU before the second convolution of a block; the published network lacks it.
    norm : {"group", "batch"}
        Normalisation; IterMask's published networks have batch normalisation.
    fold : int
        Fold squares of `fold` x `fold` pixels into channels at the input, and unfold at the output.
        1 is the published network; 2 makes the full resolution four times cheaper.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, or if number of levels, channels and attention heads do not fit together.
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
        """What height and width of an input must be divisible by."""
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


# What ANDi has; partial diffusion, RIAD and IterMask vary it.
NETWORK = DDPMppConfig(
    size=224,
    width=32,
    multipliers=(1, 1, 1, 2, 3, 4),
    blocks=(1, 1, 1, 2, 4, 2),
    attention=(14, 7),
    head_width=32,
    dropout_at=14,
)
# For two CPU cores.
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


def check_network(hyper: Any, size: str, *, time_embedding: bool) -> None:
    """Refuse hyper-parameters whose `network` cannot process the input of their detector.

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
        If the network has a time embedding that it does not need or lacks one that it needs, or if the input
        cannot be halved as often as the network does.
    """
    network = hyper.network
    if network.time_embedding != time_embedding:
        raise invalid(network, "time_embedding", f"{time_embedding} in {type(hyper).__name__}")
    if any(side % network.divisor for side in getattr(hyper, size)):
        allowed = f"divisible by {network.divisor} (levels and 'fold' of its network)"
        raise invalid(hyper, size, allowed)


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """Embed times as sines then cosines of geometrically spaced frequencies 1 ... 1e-4.

    Parameters
    ----------
    time : Tensor, shape (B,)
    width : int
        Even number of features.

    Returns
    -------
    Tensor, shape (B, width)
    """
    half = width // 2
    exponent = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
    phase = time.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)[None]
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def _glorot(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> nn.Conv2d | nn.Linear:
    """Glorot-uniform weights (variance scaling, mean of fans) and zero bias; scale 0 gives zeros."""
    if scale == 0.0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv3(inputs: int, outputs: int, scale: float = 1.0) -> nn.Conv2d:
    return _glorot(nn.Conv2d(inputs, outputs, 3, padding=1), scale)


def _norm(channels: int, config: DDPMppConfig) -> nn.GroupNorm | nn.BatchNorm2d:
    if config.norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, min(channels // 4, 32)), channels, eps=1e-6)


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
        self.film = _glorot(nn.Linear(4 * config.width, 2 * outputs)) if config.time_embedding else None
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3(outputs, outputs, scale=0.0)
        project = inputs != outputs or resample is not None
        self.shortcut = _glorot(nn.Conv2d(inputs, outputs, 1)) if project else nn.Identity()

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H', W') under an embedding of shape (B, 4 width)."""
        h = F.silu(self.norm1(x))
        h = self._resized(self.conv1(h)) if self.resample == "up" else self.conv1(self._resized(h))
        h = self.norm2(h)
        if self.film is not None:
            scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        if self.activate_second:
            h = F.silu(h)
        h = self.conv2(self.dropout(h))
        return (self.shortcut(self._resized(x)) + h) * self.gain


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
        """Mix the pixels of each map, shape (B, C, H, W)."""
        batch, channels, height, width = x.shape
        tokens = self.inner(self.norm(x).flatten(2).transpose(1, 2))
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        mixed = self.dropout(mixed).transpose(1, 2).reshape(batch, channels, height, width)
        return (x + mixed) * self.gain


class DDPMpp(nn.Module):
    """The U-Net.

    Parameters
    ----------
    config : DDPMppConfig
    inputs : int
        Input channels.

    Notes
    -----
    Encoder outputs (the input convolution, each block with its attention, each down-sampling block) are
    the skip connections, taken by the decoder in reverse.
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
                _glorot(nn.Linear(config.width, embedded)), nn.SiLU(), _glorot(nn.Linear(embedded, embedded))
            )
        self.enter = _conv3(inputs * config.fold**2, config.width)
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
        self.leave = _conv3(now, config.fold**2, scale=0.0)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map images to images.

        Parameters
        ----------
        x : Tensor, shape (B, inputs, H, W)
            H and W divisible by ``fold * 2 ** (levels - 1)``.
        time : Tensor, shape (B,) or (1,), optional
            Time labels, or one for all; needed exactly when the network has a time embedding.

        Returns
        -------
        Tensor, shape (B, 1, H, W)
        """
        embedding = None
        if self.config.time_embedding:
            embedding = F.silu(self.time(sinusoidal_embedding(time, self.config.width).to(x.dtype)))
        h = self.enter(F.pixel_unshuffle(x, self.config.fold))
        skips = [h]
        for block, attend in zip(self.encoder, self.encoder_attention, strict=True):
            h = attend(block(h, embedding))
            skips.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, embedding)), embedding)
        for stage in self.decoder:
            for block in stage["blocks"]:
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
            h = stage["attention"](h)
            if "up" in stage:
                h = stage["up"](h, embedding)
        return F.pixel_shuffle(self.leave(F.silu(self.leave_norm(h))), self.config.fold)


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
