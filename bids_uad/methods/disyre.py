"""Disyre: restoring synthetic anomalies by cold diffusion.

Naval Marimont et al. 2023 ("DISYRE: diffusion-inspired synthetic restoration for unsupervised anomaly
detection") and 2024 (v2, with disentangled anomaly generation). A U-Net learns to undo synthetic anomalies of
known severity; at test time it is told several severities, and what it would change is the anomaly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    Interval,
    Items,
    OneOf,
    Positive,
    invalid,
)
from bids_uad.methods.base import (
    BRAIN_FIELD,
    WHOLE_SLICE,
    Batch,
    Detector,
    FieldOfView,
    FitStage,
    GradientStage,
    Stage,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import (
    LITE_NETWORK,
    DDPMpp,
    DDPMppConfig,
    check_network,
)
from bids_uad.networks.synthetic_anomalies import (
    COMPONENTS,
    SHAPES,
    AnomalyConfig,
    AugmentationConfig,
    cut_windows,
    paint_anomalies,
    vary_intensity,
)

LABELS = 100
CODEBOOK_SAMPLES = 100_000
PATCHES = 64  # windows times labels that go through the network at once


@dataclass(frozen=True)
class DisyreHyper(Constrained):
    """Hyper-parameters of Disyre.

    Parameters
    ----------
    network : DDPMppConfig
    window : tuple of int
        Height and width in pixels of what the network sees at once.
    stride : int
        Step of the sliding window at test time, in pixels.
    field_of_view : tuple of int
        Height and width of the part of a slice that the windows are laid over.
    labels : tuple of int
        Severity labels told to the network at test time, 0 strongest, 99 almost none.
    foreground_weighting : bool
        Multiply a slice's map by its share of brain pixels, as published. It ties the threshold to head
        size and hides the vertex, so only ``paper`` does it.
    predict_change : bool
        Let the network give what to add to a slice instead of the restored slice. It then starts from the
        identity and need not learn to copy, which a small network and a short training are spared.
    codebook_size : int
        Tissue intensities of the anomaly generator.
    anomaly : AnomalyConfig
    anomalies : tuple of str
        What synthetic anomalies are made of, see `synthetic_anomalies.COMPONENTS`; for ablations.
    augmentation : AugmentationConfig
    steps, batch_size, learning_rate
        Training schedule.
    """

    network: DDPMppConfig = field(default_factory=DDPMppConfig)
    window: FieldOfView = (128, 128)
    stride: Count = 64
    field_of_view: FieldOfView = BRAIN_FIELD
    labels: Annotated[tuple[Annotated[int, Interval(0, LABELS - 1)], ...], Items()] = (99, 74, 49, 24)
    foreground_weighting: bool = False
    predict_change: bool = False
    codebook_size: Count = 5
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    anomalies: Annotated[tuple[Annotated[str, OneOf(*COMPONENTS)], ...], Items()] = COMPONENTS
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    steps: Count = 100_000
    batch_size: Count = 64
    learning_rate: Positive = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "window", time_embedding=True)
        if any(side > extent for side, extent in zip(self.window, self.field_of_view, strict=True)):
            raise invalid(self, "window", f"no larger than 'field_of_view', {self.field_of_view}")
        if self.stride > min(self.window):
            raise invalid(self, "stride", f"at most {min(self.window)}, the shorter side of 'window'")
        if not set(self.anomalies) & set(SHAPES) or not set(self.anomalies) & {"texture", "bias"}:
            raise invalid(self, "anomalies", f"at least one of {', '.join(SHAPES)} and one of texture, bias")


def intensity_centres(values: np.ndarray, clusters: int) -> np.ndarray:
    """Find the centres of intensities by k-means, started at evenly spaced quantiles.

    Parameters
    ----------
    values : numpy.ndarray, shape (n,)
        Of more than `CODEBOOK_SAMPLES` values, as many evenly spaced quantiles are used.
    clusters : int

    Returns
    -------
    numpy.ndarray of float32, shape (clusters,)
        Ascending. Deterministic.
    """
    from sklearn.cluster import KMeans

    n = min(len(values), CODEBOOK_SAMPLES)
    sample = np.sort(values)[np.linspace(0, len(values) - 1, n).astype(int), None]
    start = sample[((np.arange(clusters) + 0.5) / clusters * (n - 1)).astype(int)]
    centres = KMeans(clusters, init=start, n_init=1, max_iter=100).fit(sample).cluster_centers_
    return np.sort(centres[:, 0]).astype(np.float32)


def severity_table() -> Tensor:
    """Severity of each label: the signal scale of a 100-step diffusion, beta linear from 0.001 to 0.2.

    Returns
    -------
    Tensor, shape (100,)
        Falls from 0.9995 (label 0, strongest corruption) to 0.0045 (label 99).
    """
    beta = torch.linspace(0.001, 0.2, LABELS, dtype=torch.float64)
    return torch.cumprod(1 - beta, 0).sqrt().float()


class Disyre(Detector):
    """Diffusion-inspired synthetic restoration.

    Parameters
    ----------
    hyper : DisyreHyper
    """

    name: ClassVar[str] = "disyre"
    citation: ClassVar[str] = "disyre"
    presets: ClassVar[dict[str, DisyreHyper]] = {
        "paper": DisyreHyper(
            network=DDPMppConfig(causal=True, activate_second=False),
            stride=32,
            field_of_view=WHOLE_SLICE,
            foreground_weighting=True,
            anomaly=AnomalyConfig(matching="mean"),
        ),
        "default": DisyreHyper(),
        "lite": DisyreHyper(
            network=replace(LITE_NETWORK, size=192),
            predict_change=True,
            # One window holds the whole brain of a slice, so that nothing is computed twice.
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
        """First the tissue intensities, then the restoration network."""
        return [
            FitStage("codebook", self.fit_codebook, slices=256, batch_size=64),
            GradientStage.scheduled("restoration", self.network, self.loss, self.hyper),
        ]

    def fit_codebook(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Find the tissue intensities of the training data by k-means."""
        values = torch.cat([batch.slices[batch.brain] for batch in batches])
        self.codebook.copy_(
            torch.from_numpy(intensity_centres(values.cpu().numpy(), self.hyper.codebook_size))
        )

    def severity_label(self, severity: Tensor) -> Tensor:
        """Label whose severity is nearest, shape and order kept."""
        return (self.severities[None] - severity[:, None]).abs().argmin(1)

    def restore(self, slices: Tensor, labels: Tensor) -> Tensor:
        """Undo an anomaly of the severity told.

        Parameters
        ----------
        slices : Tensor, shape (B, 1, h, w)
            In [-1, 1].
        labels : Tensor, shape (B,)

        Returns
        -------
        Tensor, shape (B, 1, h, w)
        """
        output = self.network(slices, labels)
        return slices + output if self.hyper.predict_change else output

    def loss(self, batch: Batch, generator: Generator) -> Tensor:
        """Mean squared error of the restored slices, in [-1, 1] units."""
        hyper = self.hyper
        clean, brain = cut_windows(batch.slices, batch.brain, hyper.window, hyper.augmentation, generator)
        clean = vary_intensity(clean, brain, hyper.augmentation, generator)
        corrupted, severity = paint_anomalies(
            clean, brain, self.codebook, hyper.anomaly, generator, hyper.anomalies
        )
        restored = self.restore(2 * corrupted - 1, self.severity_label(severity))
        return (restored - (2 * clean - 1)).square().mean()

    def _changes(self, patches: Tensor) -> Tensor:
        """Mean absolute change over the severity labels, patches and labels batched."""
        labels = torch.tensor(self.hyper.labels, device=patches.device)
        changes = []
        for some in patches.split(max(1, PATCHES // len(labels))):
            restored = self.restore(some.repeat(len(labels), 1, 1, 1), labels.repeat_interleave(len(some)))
            changes.append((some - restored.view(len(labels), *some.shape)).abs().mean(0))
        return torch.cat(changes)

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Mean absolute change the network makes, over the severity labels."""
        hyper = self.hyper
        height, width = hyper.window
        rows = window_starts(slices.shape[-2], height, hyper.stride)
        columns = window_starts(slices.shape[-1], width, hyper.stride)
        windows = [
            (..., slice(row, row + height), slice(column, column + width))
            for row in rows
            for column in columns
        ]
        x = 2 * slices - 1
        changes = self._changes(torch.cat([x[inside] for inside in windows]))
        weight = importance(height, width, slices.device)
        total, norm = torch.zeros_like(slices), torch.zeros_like(slices[:1])
        for inside, change in zip(windows, changes.split(len(slices)), strict=True):
            total[inside] += weight * change
            norm[inside] += weight
        result = torch.where(brain, total / norm, 0.0)
        if hyper.foreground_weighting:
            result = result * brain.to(result.dtype).mean((1, 2, 3), keepdim=True)
        return result


def window_starts(extent: int, window: int, stride: int) -> list[int]:
    """First indices of the windows that cover one axis.

    Parameters
    ----------
    extent, window, stride : int
        `window` is at most `extent`.

    Returns
    -------
    list of int
        Ascending; the last window ends where the axis does.
    """
    end = extent - window
    return [*range(0, end, stride), end]


@cache
def importance(height: int, width: int, device: torch.device) -> Tensor:
    """Gaussian weight of a window's pixels, standard deviation an eighth of each side, at least 0.001.

    Returns
    -------
    Tensor, shape (height, width)
        1 at the centre.
    """

    def profile(size: int) -> Tensor:
        offset = torch.arange(size, device=device) - (size - 1) / 2
        return torch.exp(-0.5 * (offset / (size / 8)) ** 2)

    return (profile(height)[:, None] * profile(width)[None]).clamp_min(1e-3)
