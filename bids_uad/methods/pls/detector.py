"""PLS: a network that has learnt to see foreign tissue, on tissue that was made foreign.

Tan et al. 2022 ("Detecting outliers with foreign patch interpolation"): patches are blended into healthy
slices, and a network learns to say of every pixel how strongly. Here the patches are blemishes of many looks
(:mod:`bids_uad.methods.pls.training_samples`), and the slices vary as brains and scanners do
(:mod:`bids_uad.methods.pls.training_samples`, :mod:`bids_uad.methods.pls.training_samples`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import (
    Constrained,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Probability,
)
from bids_uad.methods.base import (
    BRAIN_FIELD,
    Batch,
    Detector,
    FieldOfView,
    FitStage,
    GradientStage,
    Stage,
)
from bids_uad.methods.intensity import fluid_polarity
from bids_uad.methods.pls.training_samples import (
    BlemishConfig,
    bend_contrast,
    cut_edge,
    darken_nuclei,
    darken_sinuses,
    leave_remnants,
    paint_blemishes,
    shade,
    shrink_rim,
    soil_rim,
    swell_middle,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import (
    LITE_NETWORK,
    DDPMpp,
    DDPMppConfig,
    check_network,
)
from bids_uad.networks.synthetic_anomalies import AugmentationConfig, cut_windows, vary_intensity

# What presets and courses have in common.
NETWORK = replace(LITE_NETWORK, size=192, time_embedding=False, fold=2)
BLEMISH = BlemishConfig(small=(2.5, 16.0), chance=(0.55, 0.3, 0.7), most_small=6, in_white=0.6, wet=0.8)
SMALL_BLEMISH = replace(BLEMISH, chance=(0.5, 0.3, 0.8), most_small=8)
LINING_BLEMISH = replace(SMALL_BLEMISH, lining=0.4)
AUGMENTATION = AugmentationConfig(spatial=0.5, zoom=(0.85, 1.15), shift=0.05, back_to_front=False)


@dataclass(frozen=True)
class Course(Constrained):
    """A course of training: what is shown, and for how long.

    Parameters
    ----------
    blemish : BlemishConfig
    small_weight : float
        How much more the pixels of small blemishes and linings count. Their area is small, and so would
        their say be.
    iron, flow : float
        How often deep nuclei, and spots of the brain's rim, are darkened where fluid is bright.
    remnants, cut : float
        How often skull-stripping leaves something on the brain, and how often an edge of it is cut off.
    steps, batch_size, learning_rate
        Training schedule; without steps there is no such course.
    """

    blemish: BlemishConfig = field(default_factory=BlemishConfig)
    small_weight: NonNegative = 1.0
    iron: Probability = 0.0
    flow: Probability = 0.0
    remnants: Probability = 0.0
    cut: Probability = 0.0
    steps: CountOrZero = 0
    batch_size: Count = 8
    learning_rate: Positive = 1e-3


@dataclass(frozen=True)
class PLSHyper(Course):
    """Hyper-parameters of PLS: the first course, and what holds for all.

    Parameters
    ----------
    network : DDPMppConfig
    field_of_view : tuple of int
        Height and width in pixels of what the network sees.
    augmentation : AugmentationConfig
    visible : float
        Change of grey value, of 1 in all, that counts as wholly foreign; smaller ones count in proportion.
    soiled : float
        How often the brain's rim is soiled.
    swollen : float
        How often the middle of the brain is swollen or shrunken.
    mottled : float
        Strength of shading between tissues (standard deviation of its logarithm), beside that of the coil.
    depth : float
        Standard deviation in mm of the Gaussian across slices that smooths the map.
    second, third, fourth : Course
        What follows once large blemishes are seen, and once small ones are: a network that learns all at once
        learns the hardest last.
    """

    network: DDPMppConfig = field(default_factory=lambda: replace(LITE_NETWORK, time_embedding=False))
    field_of_view: FieldOfView = BRAIN_FIELD
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    visible: Positive = 0.15
    soiled: Probability = 0.0
    swollen: Probability = 0.0
    mottled: NonNegative = 0.0
    depth: NonNegative = 0.0
    second: Course = field(default_factory=Course)
    third: Course = field(default_factory=Course)
    fourth: Course = field(default_factory=Course)
    steps: Count = 3_000
    learning_rate: Positive = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)


class PLS(Detector):
    """Foreign patch interpolation.

    Parameters
    ----------
    hyper : FPIHyper
    """

    name: ClassVar[str] = "pls"
    citation: ClassVar[str] = "fpi"
    presets: ClassVar[dict[str, PLSHyper]] = {
        "default": PLSHyper(
            network=replace(NETWORK, width=24, multipliers=(1, 2, 3, 4), blocks=(1, 1, 1, 1)),
            blemish=BLEMISH,
            augmentation=replace(AUGMENTATION, intensity=0.5),
            small_weight=3.0,
            soiled=0.3,
            swollen=0.6,
            mottled=0.06,
            depth=2.0,
            steps=3_500,
            learning_rate=1.5e-3,
            second=Course(blemish=SMALL_BLEMISH, small_weight=12.0, iron=0.3, steps=2_400),
            third=Course(
                blemish=LINING_BLEMISH,
                small_weight=12.0,
                iron=0.5,
                flow=0.4,
                steps=800,
                learning_rate=8e-4,
            ),
            fourth=Course(
                blemish=LINING_BLEMISH,
                small_weight=12.0,
                iron=0.5,
                flow=0.5,
                remnants=0.3,
                cut=0.2,
                steps=6_000,
                learning_rate=1e-3,
            ),
        ),
        "lite": PLSHyper(
            network=replace(NETWORK, width=12, multipliers=(1, 2, 4, 8), blocks=(0, 1, 1, 1)),
            augmentation=replace(AUGMENTATION, intensity=0.4),
        ),
    }

    def __init__(self, hyper: PLSHyper) -> None:
        super().__init__(hyper)
        self.network = DDPMpp(hyper.network)
        self.register_buffer("polarity", torch.ones(()))

    def stages(self) -> list[Stage]:
        """First whether fluid is bright, then the network, in one course or more."""
        hyper = self.hyper
        courses = {
            "blemishes": hyper,
            "small blemishes": hyper.second,
            "linings": hyper.third,
            "remnants": hyper.fourth,
        }
        return [
            FitStage("polarity", self.fit_polarity, slices=256, batch_size=64),
            *(
                GradientStage.scheduled(name, self.network, partial(self.loss, course), course)
                for name, course in courses.items()
                if course.steps
            ),
        ]

    def fit_polarity(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Learn from the healthy histogram whether fluid is bright or dark."""
        self.polarity.copy_(fluid_polarity(batches))

    def loss(self, course: Course, batch: Batch, generator: Generator) -> Tensor:
        """Cross-entropy of how foreign each brain pixel looks, averaged over the brain."""
        hyper = self.hyper
        clean, brain = cut_windows(
            batch.slices, batch.brain, hyper.field_of_view, hyper.augmentation, generator
        )
        brain = cut_edge(shrink_rim(brain, generator), generator, course.cut)
        clean, brain = swell_middle(clean * brain, brain, generator, hyper.swollen)
        clean = soil_rim(clean, brain, generator, hyper.soiled)
        clean, brain = leave_remnants(clean, brain, generator, course.remnants)
        bright_fluid = self.polarity > 0
        clean = darken_nuclei(clean, brain, bright_fluid, generator, course.iron)
        clean = darken_sinuses(clean, brain, bright_fluid, generator, course.flow)
        painted, small = paint_blemishes(clean, brain, bright_fluid, course.blemish, generator)
        target = ((painted - clean).abs() / hyper.visible).clamp(0, 1)
        seen = shade(bend_contrast(painted, generator), generator)
        seen = shade(seen, generator, hyper.mottled, bumps=8)
        seen = vary_intensity(seen, brain, hyper.augmentation, generator)
        loss = F.binary_cross_entropy_with_logits(self.network(2 * seen - 1), target, reduction="none")
        weight = brain * (1 + (course.small_weight - 1) * small)
        return (loss * weight).sum() / weight.sum().clamp_min(1)

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """How foreign each pixel looks, between 0 and 1; the mean over a slice and its mirror image."""
        x = 2 * slices - 1
        straight = self.network(x).sigmoid()
        mirrored = self.network(x.flip(-2)).sigmoid().flip(-2)
        return torch.where(brain, (straight + mirrored) / 2, 0.0)
