"""Disyre: restoring synthetic anomalies by cold diffusion.

Naval Marimont et al. 2023 ("DISYRE: diffusion-inspired synthetic restoration for unsupervised anomaly
detection") and 2024 (v2, with disentangled anomaly generation). A U-Net is trained to remove synthetic
anomalies, conditioned on their severity. In scoring it is conditioned on several severities in turn; the
score is the mean absolute change of the slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, Interval, Items, OneOf, Positive, invalid
from bids_uad.methods.base import (
    BRAIN_FIELD,
    OPTIMISER,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    FitStage,
    GradientStage,
    OptimiserConfig,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import LITE_NETWORK, DDPMpp, DDPMppConfig, check_network
from bids_uad.networks.synthetic_anomalies import (
    COMPONENTS,
    SHAPES,
    WINDOW,
    AnomalyConfig,
    AugmentationConfig,
    cut_windows,
    paint_anomalies,
    vary_intensity,
)

LABELS = 100
"""Number of severity labels."""
CODEBOOK_SAMPLES = 100_000
"""Largest number of intensities for k-means."""
PATCHES, CPU_PATCHES = 64, 8
"""Windows that are processed at once on a GPU and on a CPU."""


@dataclass(frozen=True)
class DisyreHyper(Constrained):
    """Hyper-parameters of Disyre.

    Parameters
    ----------
    network : DDPMppConfig
        Restoration network.
    window : tuple of int, default=(128, 128)
        Height and width in pixels of the input of the network.
    stride : int, default=64
        Step of the sliding window in scoring, in pixels.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the part of a slice that the windows cover.
    labels : tuple of int, default=(99, 74, 49, 24)
        Severity labels in scoring, from 0 (strongest) to 99 (weakest).
    foreground_weighting : bool, default=False
        Whether to multiply the map of a slice by its fraction of brain pixels, as published. The threshold
        then depends on head size, and scores near the vertex are reduced.
    predict_residual : bool, default=False
        Whether the network predicts the change of a slice instead of the restored slice. It then starts as
        the identity, which shortens the training of a small network.
    codebook_size : int, default=5
        Number of tissue intensities of the anomaly generator.
    anomaly : AnomalyConfig
        Synthetic anomalies.
    anomalies : tuple of str
        Components of the synthetic anomalies, by default all of
        :data:`bids_uad.networks.synthetic_anomalies.COMPONENTS`; for ablations.
    augmentation : AugmentationConfig
        Augmentation of the training slices.
    steps, batch_size, learning_rate : int, int, float, default=100000, 64, 1e-4
        Training schedule: optimiser steps, slices per step, largest learning rate.
    optimiser : OptimiserConfig
        Learning-rate schedule, averaging of weights and clipping of gradients.
    """

    network: DDPMppConfig = field(default_factory=DDPMppConfig)
    window: FieldOfView = (128, 128)
    stride: Count = 64
    field_of_view: FieldOfView = BRAIN_FIELD
    labels: Annotated[tuple[Annotated[int, Interval(0, LABELS - 1)], ...], Items()] = (99, 74, 49, 24)
    foreground_weighting: bool = False
    predict_residual: bool = False
    codebook_size: Count = 5
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    anomalies: Annotated[tuple[Annotated[str, OneOf(*COMPONENTS)], ...], Items()] = COMPONENTS
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    steps: Count = 100_000
    batch_size: Count = 64
    learning_rate: Positive = 1e-4
    optimiser: OptimiserConfig = OPTIMISER

    renamed_fields: ClassVar[dict[str, str]] = {"predict_change": "predict_residual"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "window", time_embedding=True)
        if any(side > extent for side, extent in zip(self.window, self.field_of_view, strict=True)):
            raise invalid(self, "window", f"no larger than 'field_of_view', {self.field_of_view}")
        if self.stride > min(self.window):
            raise invalid(self, "stride", f"at most {min(self.window)}, the shorter side of 'window'")
        if self.anomaly.published and min(self.window) < WINDOW:
            raise invalid(self, "window", f"at least {WINDOW} x {WINDOW} pixels, the window of an anomaly")
        if not set(self.anomalies) & set(SHAPES) or not set(self.anomalies) & {"texture", "bias"}:
            raise invalid(self, "anomalies", f"at least one of {', '.join(SHAPES)} and one of texture, bias")


def intensity_centres(values: np.ndarray, clusters: int) -> np.ndarray:
    """Compute the centres of intensities by k-means, initialised at evenly spaced quantiles.

    Parameters
    ----------
    values : numpy.ndarray, shape (n,)
        Intensities. If there are more than `CODEBOOK_SAMPLES`, that many evenly spaced quantiles are used.
    clusters : int
        Number of centres.

    Returns
    -------
    numpy.ndarray of float32, shape (clusters,)
        Centres in ascending order. The result is deterministic.
    """
    from sklearn.cluster import KMeans

    n = min(len(values), CODEBOOK_SAMPLES)
    sample = np.sort(values)[np.linspace(0, len(values) - 1, n).astype(int), None]
    start = sample[((np.arange(clusters) + 0.5) / clusters * (n - 1)).astype(int)]
    centres = KMeans(clusters, init=start, n_init=1, max_iter=100).fit(sample).cluster_centers_
    return np.sort(centres[:, 0]).astype(np.float32)


def severity_table() -> Tensor:
    """Compute the severity of each label: sqrt(prod(1 - beta)), beta from 0.001 to 0.2 in 100 steps.

    Returns
    -------
    Tensor, shape (100,)
        Severities, from 0.9995 (label 0, strongest anomaly) to 0.0045 (label 99).
    """
    beta = torch.linspace(0.001, 0.2, LABELS, dtype=torch.float64)
    return torch.cumprod(1 - beta, 0).sqrt().float()


class Disyre(Detector):
    """Diffusion-inspired synthetic restoration.

    Parameters
    ----------
    hyper : DisyreHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "disyre"
    citation: ClassVar[str] = "disyre"
    presets: ClassVar[dict[str, DisyreHyper]] = {
        "paper": DisyreHyper(
            network=DDPMppConfig(causal=True, activate_second=False),
            stride=32,
            field_of_view=WHOLE_SLICE,
            foreground_weighting=True,
            anomaly=AnomalyConfig(matching="mean", published=True),
            augmentation=AugmentationConfig(spatial=0.1, published=True),
            optimiser=OptimiserConfig("constant", ema_decay=0.9999, clip_norm=None),
        ),
        "default": DisyreHyper(),
        "lite": DisyreHyper(
            network=replace(LITE_NETWORK, size=192),
            predict_residual=True,
            # One window contains the whole brain of most slices.
            window=(160, 192),
            stride=80,
            labels=(49,),
            anomaly=AnomalyConfig(size=(5.0, 70.0), log_size=True, max_shapes=4),
            augmentation=AugmentationConfig(
                spatial=0.3, zoom=(0.85, 1.15), shift=0.05, flip_front_back=False, intensity=0.25
            ),
            steps=5_000,
            batch_size=8,
            learning_rate=2e-3,
        ),
    }

    def __init__(self, hyper: DisyreHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)
        self.register_buffer("codebook", torch.linspace(0.1, 0.9, hyper.codebook_size))
        self.register_buffer("severities", severity_table(), persistent=False)

    def stages(self) -> list[Stage]:
        """Fit the tissue intensities, then train the restoration network."""
        return [
            FitStage("codebook", self.fit_codebook, slices=256, batch_size=64),
            GradientStage.scheduled("restoration", self.network, self.loss, self.hyper),
        ]

    def fit_codebook(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Compute the tissue intensities of the training data by k-means."""
        values = torch.cat([batch.slices[batch.brain] for batch in batches])
        self.codebook.copy_(
            torch.from_numpy(intensity_centres(values.cpu().numpy(), self.hyper.codebook_size))
        )

    def severity_label(self, severity: Tensor) -> Tensor:
        """Return the label with the nearest severity, for severities of shape (B,)."""
        return (self.severities[None] - severity[:, None]).abs().argmin(1)

    def restore(self, slices: Tensor, labels: Tensor) -> Tensor:
        """Restore slices, conditioned on severity labels.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, h, w)
            Windows of slices, intensities in [-1, 1].
        labels : Tensor, shape (B,) or (1,)
            Severity labels, or one for all windows.

        Returns
        -------
        Tensor, shape (B, 1, h, w)
            Restored windows.
        """
        output = self.network(slices, labels)
        return slices + output if self.hyper.predict_residual else output

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Compute the mean squared error of the restored slices, intensities in [-1, 1]."""
        hyper = self.hyper
        clean, brain = cut_windows(batch.slices, batch.brain, hyper.window, hyper.augmentation, generator)
        clean = vary_intensity(clean, brain, hyper.augmentation, generator)
        corrupted, severity = paint_anomalies(
            clean, brain, self.codebook, hyper.anomaly, generator, hyper.anomalies
        )
        restored = self.restore(2 * corrupted - 1, self.severity_label(severity))
        return (restored - (2 * clean - 1)).square().mean()

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Compute the mean absolute change over severity labels.

        For each label, the restored windows are blended to one slice before it is compared.
        """
        hyper = self.hyper
        height, width = hyper.window
        windows = [
            (..., slice(row, row + height), slice(column, column + width))
            for row in window_starts(slices.shape[-2], height, hyper.stride)
            for column in window_starts(slices.shape[-1], width, hyper.stride)
        ]
        x = 2 * slices - 1
        patches = torch.cat([x[inside] for inside in windows])
        count = CPU_PATCHES if slices.device.type == "cpu" else PATCHES
        weight = window_weight(height, width, slices.device)
        norm = torch.zeros_like(slices[:1])
        for inside in windows:
            norm[inside] += weight
        change = torch.zeros_like(slices)
        for label in torch.tensor(hyper.labels, device=slices.device)[:, None]:
            restored = torch.cat([self.restore(part, label) for part in patches.split(count)])
            blended = torch.zeros_like(slices)
            for inside, window in zip(windows, restored.split(len(slices)), strict=True):
                blended[inside] += weight * window
            change += (x - blended / norm).abs()
        result = torch.where(brain, change / len(hyper.labels), 0.0)
        if hyper.foreground_weighting:
            result = result * brain.to(result.dtype).mean((1, 2, 3), keepdim=True)
        return result


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """Return the first indices of the windows that cover one axis.

    Parameters
    ----------
    extent : int
        Length of the axis in pixels.
    window : int
        Length of a window in pixels, at most `extent`.
    stride : int
        Step of the windows in pixels.

    Returns
    -------
    list of int
        Indices in ascending order; the last window ends at the end of the axis.
    """
    end = extent - window
    return [*range(0, end, stride), end]


@cache
def window_weight(height: int, width: int, device: torch.device) -> Tensor:
    """Compute Gaussian weights of the pixels of a window.

    Parameters
    ----------
    height, width : int
        Size of the window in pixels. The standard deviation is an eighth of it.
    device : torch.device
        Device of the result.

    Returns
    -------
    Tensor, shape (height, width)
        Weights, 1 at the centre and at least 0.001.
    """

    def profile(size: int) -> Tensor:
        offset = torch.arange(size, device=device) - (size - 1) / 2
        return torch.exp(-0.5 * (offset / (size / 8)) ** 2)

    return (profile(height)[:, None] * profile(width)[None]).clamp_min(1e-3)
