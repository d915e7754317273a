"""UniAD: restoration of features by a transformer with neighbour-masked attention.

You et al. 2022 ("A unified model for multi-class anomaly detection", arXiv 2206.03687). A transformer with
learnt queries restores the features of a frozen network from jittered features. Attention is masked in the
neighbourhood of each token, so that features cannot be copied. The score is the restoration error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bids_uad.constraints import Constrained, Count, Interval, NonNegative, Positive, invalid
from bids_uad.methods.base import (
    OPTIMISER,
    Batch,
    FeatureDetector,
    GradientStage,
    OptimiserConfig,
    Stage,
    stack_maps,
)
from bids_uad.networks.backbones import LESIONS, BackboneConfig
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.space import CROP


@dataclass(frozen=True)
class UniADHyper(Constrained):
    """Hyper-parameters of UniAD.

    Parameters
    ----------
    backbone : BackboneConfig
        Frozen network and its feature maps.
    grid : int, default=14
        Side of the square grid of tokens.
    width, heads, feedforward_width : int, default=256, 8, 1024
        Channels, attention heads and channels of the feed-forward layers of the transformer.
    layers : int, default=4
        Layers of the encoder, and of the decoder.
    neighbour_mask : int, default=7
        Side of the neighbourhood in tokens to which a token does not attend, odd.
    dropout : float, default=0.1
        Dropout probability.
    jitter : float, default=5.0
        Strength of the noise that is added to the features in training.
    published_initialisation : bool, default=False
        Whether the initial weights are drawn as in the published code, see :meth:`TokenTransformer.reset`.
    steps, batch_size, learning_rate : int, int, float, default=30000, 128, 1e-4
        Training schedule of the transformer: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(name="efficientnet_b4", taps=(0, 1, 2, 3))
    )
    grid: Annotated[int, Interval(2, CROP)] = 14
    width: Count = 256
    heads: Count = 8
    feedforward_width: Count = 1024
    layers: Count = 4
    neighbour_mask: Annotated[int, Interval(1, odd=True)] = 7
    dropout: Annotated[float, Interval(0, 1, closed="left")] = 0.1
    jitter: NonNegative = 5.0
    published_initialisation: bool = False
    steps: Count = 30_000
    batch_size: Count = 128
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    renamed_fields: ClassVar[dict[str, str]] = {
        "blind": "neighbour_mask",
        "hidden": "feedforward_width",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2 or self.width % self.heads:
            raise invalid(self, "width", f"an even multiple of 'heads', {self.heads}")
        if self.neighbour_mask // 2 >= self.grid // 2:
            # Otherwise a token at the centre of the grid could attend to no token at all.
            raise invalid(
                self,
                "neighbour_mask",
                f"at most {2 * (self.grid // 2) - 1} on a grid of {self.grid} x {self.grid}",
            )


def neighbourhoods(grid: int, side: int) -> Tensor:
    """Compute which pairs of tokens of a square grid are neighbours.

    Parameters
    ----------
    grid : int
        Side of the grid.
    side : int
        Side of the neighbourhood, odd.

    Returns
    -------
    Tensor of bool, shape (grid**2, grid**2)
        True for pairs of neighbours.
    """
    place = torch.arange(grid)
    near = (place[:, None] - place[None]).abs() <= side // 2
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(grid**2, grid**2)


def jitter_tokens(tokens: Tensor, strength: float, generator: Generator) -> Tensor:
    """Add Gaussian noise to tokens in proportion to their norm.

    Parameters
    ----------
    tokens : Tensor, shape (B, N, C)
        Tokens.
    strength : float
        The noise of each channel has a standard deviation of ``strength * |token| / C``.
    generator : torch.Generator
        Draws the noise.

    Returns
    -------
    Tensor, shape (B, N, C)
        Jittered tokens.
    """
    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
    return tokens + noise * tokens.norm(dim=2, keepdim=True) * (strength / tokens.shape[2])


class Layer(nn.Module):
    """Transformer layer with post-normalisation: attention steps and a feed-forward step.

    Parameters
    ----------
    hyper : UniADHyper
        Hyper-parameters.
    attentions : int
        Number of attention steps: 1 in the encoder, 2 in the decoder.
    """

    def __init__(self, hyper: UniADHyper, attentions: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(hyper.width, hyper.heads, hyper.dropout, batch_first=True)
            for _ in range(attentions)
        )
        self.widen = nn.Linear(hyper.width, hyper.feedforward_width)
        self.narrow = nn.Linear(hyper.feedforward_width, hyper.width)
        self.norms = nn.ModuleList(nn.LayerNorm(hyper.width) for _ in range(attentions + 1))
        self.dropout = nn.Dropout(hyper.dropout)

    def forward(self, x: Tensor, sources: Sequence[Tensor], position: Tensor, mask: Tensor) -> Tensor:
        """Let x, shape (B, N, C), attend to each source in turn, except for pairs in `mask`."""
        for attention, norm, source in zip(self.attentions, self.norms, sources, strict=False):
            mixed, _ = attention(x + position, source + position, source, attn_mask=mask, need_weights=False)
            x = norm(x + self.dropout(mixed))
        return self.norms[-1](x + self.dropout(self.narrow(self.dropout(self.widen(x).relu()))))


class TokenTransformer(nn.Module):
    """Transformer that restores a grid of tokens.

    Parameters
    ----------
    channels : int
        Channels of the tokens.
    hyper : UniADHyper
        Hyper-parameters.
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
        self.register_buffer("mask", neighbourhoods(hyper.grid, hyper.neighbour_mask), persistent=False)
        if hyper.published_initialisation:
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw initial weights as in the published code.

        Weights of linear layers are drawn from Glorot's uniform distribution, biases are 0. The published
        layers are copies of one layer before their linear layers are drawn, so that projections of the inputs
        of attention, and queries, are equal in all layers of the encoder and of the decoder.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layers in (self.encoder, self.decoder):
            for layer in layers[1:]:
                for copy, first in zip(layer.attentions, layers[0].attentions, strict=True):
                    copy.in_proj_weight.copy_(first.in_proj_weight)
        for query in self.queries[1:]:
            query.copy_(self.queries[0])

    def forward(self, tokens: Tensor) -> Tensor:
        """Restore tokens, shape (B, grid**2, channels)."""
        grid = self.hyper.grid
        rows = self.rows[:, None].expand(-1, grid, -1)
        columns = self.columns[None].expand(grid, -1, -1)
        position = torch.cat([columns, rows], 2).flatten(0, 1)
        memory = self.enter(tokens)
        for layer in self.encoder:
            memory = layer(memory, [memory], position, self.mask)
        restored = memory
        for layer, query in zip(self.decoder, self.queries, strict=True):
            start = query.expand(len(tokens), -1, -1)
            restored = layer(start, [memory, restored], position, self.mask)
        return self.leave(self.norm(restored))


class UniAD(FeatureDetector):
    """Restoration of features by a transformer with neighbour-masked attention.

    Parameters
    ----------
    hyper : UniADHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "uniad"
    citation: ClassVar[str] = "uniad"
    presets: ClassVar[dict[str, UniADHyper]] = {
        "paper": UniADHyper(
            backbone=BackboneConfig(name="efficientnet_b4", taps=(0, 1, 2, 3), normalise=False),
            published_initialisation=True,
            steps=25_000,
            optimiser=OptimiserConfig("constant", ema_decay=None, clip_norm=0.1),
        ),
        "default": UniADHyper(published_initialisation=True),
        "lite": UniADHyper(
            backbone=BackboneConfig(name=LESIONS, taps=(0, 1, 2)),
            width=96,
            heads=4,
            feedforward_width=192,
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
        """Train the backbone, if it is not pretrained, then the transformer."""
        return [
            *self.backbone_stages(),
            GradientStage.scheduled("transformer", self.transformer, self.loss, self.hyper),
        ]

    def tokens(self, slices: Tensor, brain: Tensor | None = None) -> Tensor:
        """Stack the feature maps on the grid, shape (B, grid**2, channels)."""
        grid = (self.hyper.grid, self.hyper.grid)
        return stack_maps(self.features(slices, brain), grid).flatten(2).transpose(1, 2)

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean squared error of the features restored from jittered features."""
        tokens = self.tokens(batch.slices)
        restored = self.transformer(jitter_tokens(tokens, self.hyper.jitter, generator))
        return (restored - tokens).square().mean()

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the Euclidean distance of features and restored features, interpolated to the pixels."""
        tokens = self.tokens(slices, brain)
        distance = (self.transformer(tokens) - tokens).norm(dim=2)
        coarse = distance.view(-1, 1, self.hyper.grid, self.hyper.grid)
        fine = F.interpolate(coarse, size=slices.shape[-2:], mode="bilinear", align_corners=True)
        return torch.where(brain, fine, 0.0)
