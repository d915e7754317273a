"""UniAD: a transformer that restores features it must not copy.

You et al. 2022 ("A unified model for multi-class anomaly detection", arXiv 2206.03687). Tokens of a frozen
network are restored by attention that is blind to each token's neighbourhood, through a query that is
learnt, from jittered features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    NonNegative,
    Positive,
    invalid,
)
from bids_uad.methods.base import Batch, FeatureDetector, GradientStage, Stage, stack_maps
from bids_uad.networks.backbones import BackboneConfig
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.space import CROP


@dataclass(frozen=True)
class UniADHyper(Constrained):
    """Hyper-parameters of UniAD.

    Parameters
    ----------
    backbone : BackboneConfig
    grid : int
        Side of the square of tokens.
    width, heads, hidden : int
        Channels, attention heads and channels of the feed-forward layers of the transformer.
    layers : int
        Of the encoder, and of the decoder.
    blind : int
        Side of the neighbourhood that a token does not see, odd.
    dropout : float
    jitter : float
        Strength of the noise on the training features.
    steps, batch_size, learning_rate
        Training schedule of the transformer.
    """

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="efficientnet_b4", taps=(0, 1, 2, 3))
    )
    grid: Annotated[int, Interval(2, CROP)] = 14
    width: Count = 256
    heads: Count = 8
    hidden: Count = 1024
    layers: Count = 4
    blind: Annotated[int, Interval(1, odd=True)] = 7
    dropout: Annotated[float, Interval(0, 1, closed="left")] = 0.1
    jitter: NonNegative = 5.0
    steps: Count = 30_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2 or self.width % self.heads:
            raise invalid(self, "width", f"an even multiple of 'heads', {self.heads}")
        if self.blind // 2 >= self.grid // 2:
            # A token in the middle of the grid would see no other, and its softmax would have no terms.
            raise invalid(
                self, "blind", f"at most {2 * (self.grid // 2) - 1} on a grid of {self.grid} x {self.grid}"
            )


def neighbourhoods(grid: int, side: int) -> Tensor:
    """Say which tokens of a square grid lie in each other's neighbourhood.

    Parameters
    ----------
    grid : int
    side : int
        Odd.

    Returns
    -------
    Tensor of bool, shape (grid**2, grid**2)
    """
    place = torch.arange(grid)
    near = (place[:, None] - place[None]).abs() <= side // 2
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(grid**2, grid**2)


def jittered(tokens: Tensor, strength: float, generator: Generator) -> Tensor:
    """Add noise to tokens in proportion to their length.

    Parameters
    ----------
    tokens : Tensor, shape (B, N, C)
    strength : float
        The noise of each channel has the spread ``strength * |token| / C``.
    """
    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
    return tokens + noise * tokens.norm(dim=2, keepdim=True) * (strength / tokens.shape[2])


class Layer(nn.Module):
    """Attention steps and a feed-forward step, each added and normalised (post-norm).

    Parameters
    ----------
    hyper : UniADHyper
    attentions : int
        1 in the encoder, 2 in the decoder.
    """

    def __init__(self, hyper: UniADHyper, attentions: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(hyper.width, hyper.heads, hyper.dropout, batch_first=True)
            for _ in range(attentions)
        )
        self.widen = nn.Linear(hyper.width, hyper.hidden)
        self.narrow = nn.Linear(hyper.hidden, hyper.width)
        self.norms = nn.ModuleList(nn.LayerNorm(hyper.width) for _ in range(attentions + 1))
        self.dropout = nn.Dropout(hyper.dropout)

    def forward(self, x: Tensor, sources: Sequence[Tensor], position: Tensor, hidden: Tensor) -> Tensor:
        """Let x, shape (B, N, C), attend to each source in turn; `hidden` pairs may not look."""
        for attention, norm, source in zip(self.attentions, self.norms, sources, strict=False):
            told, _ = attention(x + position, source + position, source, attn_mask=hidden, need_weights=False)
            x = norm(x + self.dropout(told))
        return self.norms[-1](x + self.dropout(self.narrow(self.dropout(self.widen(x).relu()))))


class TokenTransformer(nn.Module):
    """Restores a grid of tokens.

    Parameters
    ----------
    channels : int
        Of the tokens.
    hyper : UniADHyper
    """

    def __init__(self, channels: int, hyper: UniADHyper) -> None:
        super().__init__()
        self.hyper = hyper
        self.enter = nn.Linear(channels, hyper.width)
        self.leave = nn.Linear(hyper.width, channels)
        self.rows = nn.Parameter(torch.rand(hyper.grid, hyper.width // 2))
        self.columns = nn.Parameter(torch.rand(hyper.grid, hyper.width // 2))
        self.queries = nn.ParameterList(
            nn.Parameter(torch.randn(hyper.grid**2, hyper.width)) for _ in range(hyper.layers)
        )
        self.encoder = nn.ModuleList(Layer(hyper, 1) for _ in range(hyper.layers))
        self.decoder = nn.ModuleList(Layer(hyper, 2) for _ in range(hyper.layers))
        self.norm = nn.LayerNorm(hyper.width)
        self.register_buffer("hidden", neighbourhoods(hyper.grid, hyper.blind), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Restore tokens, shape (B, grid**2, channels)."""
        grid = self.hyper.grid
        rows = self.rows[:, None].expand(-1, grid, -1)
        columns = self.columns[None].expand(grid, -1, -1)
        position = torch.cat([columns, rows], 2).flatten(0, 1)
        memory = self.enter(tokens)
        for layer in self.encoder:
            memory = layer(memory, [memory], position, self.hidden)
        restored = memory
        for layer, query in zip(self.decoder, self.queries, strict=True):
            start = query.expand(len(tokens), -1, -1)
            restored = layer(start, [memory, restored], position, self.hidden)
        return self.leave(self.norm(restored))


class UniAD(FeatureDetector):
    """Restoration of features by a blinded transformer.

    Parameters
    ----------
    hyper : UniADHyper
    """

    name: ClassVar[str] = "uniad"
    citation: ClassVar[str] = "uniad"
    presets: ClassVar[dict[str, UniADHyper]] = {
        "paper": UniADHyper(
            backbone=BackboneConfig(name="efficientnet_b4", taps=(0, 1, 2, 3), normalise=False)
        ),
        "default": UniADHyper(),
        "lite": UniADHyper(
            backbone=BackboneConfig(),
            width=96,
            heads=4,
            hidden=192,
            layers=2,
            steps=800,
            batch_size=8,
            learning_rate=1e-3,
        ),
    }

    def __init__(self, hyper: UniADHyper) -> None:
        super().__init__(hyper)
        self.transformer = TokenTransformer(sum(hyper.backbone.channels), hyper)

    def stages(self) -> list[Stage]:
        """The backbone, if it is our own, then the transformer."""
        return [
            *self.backbone_stages(),
            GradientStage.scheduled("transformer", self.transformer, self.loss, self.hyper),
        ]

    def tokens(self, slices: Tensor) -> Tensor:
        """Stack the backbone's maps on the grid, shape (B, grid**2, channels)."""
        grid = (self.hyper.grid, self.hyper.grid)
        return stack_maps(self.features(slices), grid).flatten(2).transpose(1, 2)

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Squared error of the features restored from jittered ones."""
        tokens = self.tokens(batch.slices)
        restored = self.transformer(jittered(tokens, self.hyper.jitter, generator))
        return (restored - tokens).square().mean()

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Euclidean distance of features and restored features, resized."""
        tokens = self.tokens(slices)
        distance = (self.transformer(tokens) - tokens).norm(dim=2)
        coarse = distance.view(-1, 1, self.hyper.grid, self.hyper.grid)
        fine = F.interpolate(coarse, size=slices.shape[-2:], mode="bilinear", align_corners=True)
        return torch.where(brain, fine, 0.0)
