"""PLS: painted-lesion segmentation, the default detector.

A network is trained to segment synthetic lesions that are painted into healthy slices, and is then applied
to real scans. The idea is that of foreign patch interpolation (Tan et al. 2022, "Detecting outliers with
foreign patch interpolation", first published in 2020), where a network predicts how strongly a patch of
another image was blended in, and of DRAEM (Zavrtanik et al. 2021, "DRAEM: a discriminatively trained
reconstruction embedding for surface anomaly detection"), which segments painted textures. Here the lesions
imitate tumours, strokes and white matter lesions, and the healthy slices are augmented
(:mod:`bids_uad.methods.pls.training_samples`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bids_uad.constraints import Constrained, Count, CountOrZero, NonNegative, Positive, Probability
from bids_uad.methods.base import BRAIN_FIELD, Batch, Detector, FieldOfView, FitStage, GradientStage, Stage
from bids_uad.methods.intensity import fluid_polarity
from bids_uad.methods.pls.training_samples import (
    SyntheticLesionConfig,
    add_bias_field,
    add_flow_voids,
    add_rim_artifacts,
    add_strip_remnants,
    cut_edge,
    darken_nuclei,
    erode_edge,
    paint_lesions,
    scale_ventricles,
    vary_contrast,
)
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import LITE_NETWORK, DDPMpp, DDPMppConfig, check_network
from bids_uad.networks.synthetic_anomalies import AugmentationConfig, cut_windows, vary_intensity

# Settings that presets and curriculum stages share.
NETWORK = replace(LITE_NETWORK, size=192, time_embedding=False, fold=2)
LESIONS = SyntheticLesionConfig(
    small_size=(2.5, 16.0),
    probabilities=(0.55, 0.3, 0.7),
    max_small=6,
    white_matter_prob=0.6,
    fluid_like_prob=0.8,
)
SMALL_LESIONS = replace(LESIONS, probabilities=(0.5, 0.3, 0.8), max_small=8)
PERIVENTRICULAR_LESIONS = replace(SMALL_LESIONS, periventricular_prob=0.4)
AUGMENTATION = AugmentationConfig(spatial=0.5, zoom=(0.85, 1.15), shift=0.05, flip_front_back=False)


@dataclass(frozen=True)
class CurriculumStage(Constrained):
    """One stage of the training curriculum: its training samples, loss weights and schedule.

    Parameters
    ----------
    lesion : SyntheticLesionConfig
        Synthetic lesions that are painted into the slices.
    small_lesion_weight : float, default=1.0
        Weight in the loss of pixels of small and periventricular lesions; other brain pixels have weight 1.
    dark_nuclei_prob, flow_void_prob : float, default=0.0
        Probabilities that deep grey nuclei are darkened, and that flow voids are added at the brain edge,
        where fluid is bright (T2w).
    strip_remnant_prob : float, default=0.0
        Probability of each of up to two remnants of skull-stripping outside the brain edge.
    edge_cut_prob : float, default=0.0
        Probability that part of the brain is cut off along a straight line.
    steps : int, default=0
        Optimiser steps; 0 skips the stage.
    batch_size : int, default=8
        Slices per step.
    learning_rate : float, default=1e-3
        Initial learning rate.
    """

    lesion: SyntheticLesionConfig = field(default_factory=SyntheticLesionConfig)
    small_lesion_weight: NonNegative = 1.0
    dark_nuclei_prob: Probability = 0.0
    flow_void_prob: Probability = 0.0
    strip_remnant_prob: Probability = 0.0
    edge_cut_prob: Probability = 0.0
    steps: CountOrZero = 0
    batch_size: Count = 8
    learning_rate: Positive = 1e-3

    renamed_fields: ClassVar[dict[str, str]] = {
        "blemish": "lesion",
        "small_weight": "small_lesion_weight",
        "iron": "dark_nuclei_prob",
        "flow": "flow_void_prob",
        "remnants": "strip_remnant_prob",
        "cut": "edge_cut_prob",
    }


@dataclass(frozen=True)
class PLSHyper(CurriculumStage):
    """Hyper-parameters of PLS: those of the first curriculum stage, and those of all stages.

    Parameters
    ----------
    network : DDPMppConfig
        Segmentation network.
    field_of_view : tuple of int, default=(160, 192)
        Height and width in pixels of the part of a slice that the network sees.
    augmentation : AugmentationConfig
        Random flips, rotation, zoom and intensity changes of the training slices.
    full_target_change : float, default=0.15
        Absolute intensity change (image range 0 to 1) at which the training target reaches 1; it is
        proportional below.
    rim_artifact_prob : float, default=0.0
        Probability that artefacts of skull-stripping are added to the outermost two pixels of the brain.
    ventricle_scaling_prob : float, default=0.0
        Probability that the centre of the brain is expanded or contracted, to vary the size of ventricles.
    fine_bias_strength : float, default=0.0
        Largest standard deviation of the logarithm of a multiplicative field with about 8 periods per
        side, which is applied in addition to the coarse bias field.
    slice_smoothing : float, default=0.0
        Standard deviation in mm of the Gaussian that smooths the anomaly map across slices; 0 is none.
    stage2, stage3, stage4 : CurriculumStage
        Further stages of the curriculum. Hard cases are added late, because a network that is trained on
        all of them from the start needs more steps for the same loss.
    steps : int, default=3000
        Optimiser steps of the first stage.
    learning_rate : float, default=2e-3
        Initial learning rate of the first stage.
    """

    network: DDPMppConfig = field(default_factory=lambda: replace(LITE_NETWORK, time_embedding=False))
    field_of_view: FieldOfView = BRAIN_FIELD
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    full_target_change: Positive = 0.15
    rim_artifact_prob: Probability = 0.0
    ventricle_scaling_prob: Probability = 0.0
    fine_bias_strength: NonNegative = 0.0
    slice_smoothing: NonNegative = 0.0
    stage2: CurriculumStage = field(default_factory=CurriculumStage)
    stage3: CurriculumStage = field(default_factory=CurriculumStage)
    stage4: CurriculumStage = field(default_factory=CurriculumStage)
    steps: Count = 3_000
    learning_rate: Positive = 2e-3

    renamed_fields: ClassVar[dict[str, str]] = CurriculumStage.renamed_fields | {
        "visible": "full_target_change",
        "soiled": "rim_artifact_prob",
        "swollen": "ventricle_scaling_prob",
        "mottled": "fine_bias_strength",
        "depth": "slice_smoothing",
        "second": "stage2",
        "third": "stage3",
        "fourth": "stage4",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_network(self, "field_of_view", time_embedding=False)


class PLS(Detector):
    """Painted-lesion segmentation.

    Parameters
    ----------
    hyper : PLSHyper
        Hyper-parameters.
    """

    name: ClassVar[str] = "pls"
    citation: ClassVar[str] = "fpi"
    presets: ClassVar[dict[str, PLSHyper]] = {
        "default": PLSHyper(
            network=replace(NETWORK, width=24, multipliers=(1, 2, 3, 4), blocks=(1, 1, 1, 1)),
            lesion=LESIONS,
            augmentation=replace(AUGMENTATION, intensity=0.5),
            small_lesion_weight=3.0,
            rim_artifact_prob=0.3,
            ventricle_scaling_prob=0.6,
            fine_bias_strength=0.06,
            slice_smoothing=2.0,
            steps=3_500,
            learning_rate=1.5e-3,
            stage2=CurriculumStage(
                lesion=SMALL_LESIONS, small_lesion_weight=12.0, dark_nuclei_prob=0.3, steps=2_400
            ),
            stage3=CurriculumStage(
                lesion=PERIVENTRICULAR_LESIONS,
                small_lesion_weight=12.0,
                dark_nuclei_prob=0.5,
                flow_void_prob=0.4,
                steps=800,
                learning_rate=8e-4,
            ),
            stage4=CurriculumStage(
                lesion=PERIVENTRICULAR_LESIONS,
                small_lesion_weight=12.0,
                dark_nuclei_prob=0.5,
                flow_void_prob=0.5,
                strip_remnant_prob=0.3,
                edge_cut_prob=0.2,
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
        """Fit the polarity of fluid, then train the network through its curriculum."""
        hyper = self.hyper
        curriculum = {
            "large lesions": hyper,
            "small lesions": hyper.stage2,
            "periventricular lesions": hyper.stage3,
            "strip remnants": hyper.stage4,
        }
        return [
            FitStage("polarity", self.fit_polarity, slices=256, batch_size=64),
            *(
                GradientStage.scheduled(name, self.network, partial(self.loss, stage), stage)
                for name, stage in curriculum.items()
                if stage.steps
            ),
        ]

    def fit_polarity(self, batches: Iterator[Batch], generator: Generator) -> None:
        """Set whether fluid is bright or dark, from the histogram of healthy slices."""
        self.polarity.copy_(fluid_polarity(batches))

    def loss(self, stage: CurriculumStage, batch: Batch, generator: Generator) -> Tensor:
        """Compute the binary cross-entropy with the painted change, a weighted mean over the brain.

        Contrast and bias field are varied after the lesions are painted, so that they affect lesion and
        healthy tissue alike.

        Parameters
        ----------
        stage : CurriculumStage
            Settings of the training samples and of the weights.
        batch : Batch
            Healthy slices.
        generator : torch.Generator
            Random numbers of the training samples.

        Returns
        -------
        Tensor, scalar
            The loss.
        """
        hyper = self.hyper
        clean, brain = cut_windows(
            batch.slices, batch.brain, hyper.field_of_view, hyper.augmentation, generator
        )
        brain = cut_edge(erode_edge(brain, generator), generator, stage.edge_cut_prob)
        clean, brain = scale_ventricles(clean * brain, brain, generator, hyper.ventricle_scaling_prob)
        clean = add_rim_artifacts(clean, brain, generator, hyper.rim_artifact_prob)
        clean, brain = add_strip_remnants(clean, brain, generator, stage.strip_remnant_prob)
        bright_fluid = self.polarity > 0
        clean = darken_nuclei(clean, brain, bright_fluid, generator, stage.dark_nuclei_prob)
        clean = add_flow_voids(clean, brain, bright_fluid, generator, stage.flow_void_prob)
        painted, small = paint_lesions(clean, brain, bright_fluid, stage.lesion, generator)
        target = ((painted - clean).abs() / hyper.full_target_change).clamp(0, 1)
        varied = add_bias_field(vary_contrast(painted, generator), generator)
        varied = add_bias_field(varied, generator, hyper.fine_bias_strength, periods=8)
        varied = vary_intensity(varied, brain, hyper.augmentation, generator)
        loss = F.binary_cross_entropy_with_logits(self.network(2 * varied - 1), target, reduction="none")
        weight = brain * (1 + (stage.small_lesion_weight - 1) * small)
        return (loss * weight).sum() / weight.sum().clamp_min(1)

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        """Predict the lesion probability, the mean over a slice and its left-right mirror image."""
        x = 2 * slices - 1
        straight = self.network(x).sigmoid()
        mirrored = self.network(x.flip(-2)).sigmoid().flip(-2)
        return torch.where(brain, (straight + mirrored) / 2, 0.0)
