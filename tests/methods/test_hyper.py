"""Hyper-parameters: what is allowed, and what a user changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from bids_uad.constraints import Constrained, annotations, describe, is_constrained
from bids_uad.engine.bundle import CORRECTED, Protocol
from bids_uad.engine.execution import Execution
from bids_uad.methods.andi import ANDi, ANDiHyper
from bids_uad.methods.base import (
    Batch,
    FitStage,
    GradientStage,
    OptimiserConfig,
    change_hyper,
    changed_names,
    hyper_from_values,
)
from bids_uad.methods.ddpmpp import PartialDiffusionHyper
from bids_uad.methods.disyre import Disyre, DisyreHyper
from bids_uad.methods.fae import FAEHyper
from bids_uad.methods.intensity import IntensityHyper
from bids_uad.methods.itermask import IterMaskHyper
from bids_uad.methods.patchcore import PatchCoreHyper
from bids_uad.methods.pls.detector import PLSHyper
from bids_uad.methods.pls.painting import HealthyConfig, LesionConfig, PaintingConfig
from bids_uad.methods.rd import RDHyper
from bids_uad.methods.registry import DETECTORS, build_detector, detector_class
from bids_uad.methods.riad import RIADHyper
from bids_uad.methods.uniad import UniADHyper
from bids_uad.networks.backbones import BackboneConfig, build_backbone
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.networks.ddpmpp import DDPMppConfig
from bids_uad.networks.synthetic_anomalies import AnomalyConfig, AugmentationConfig
from bids_uad.preprocessing.registration import RegistrationSchedule
from bids_uad.training.loop import TrainingSettings
from tests.methods.tiny import batch_for

NAN, INF = float("nan"), float("inf")

# Values that are not allowed, of each field of each class.
RATES = {"steps": [0, 2.5], "batch_size": [0, -8], "learning_rate": [0.0, -1e-3, NAN]}
SCHEDULE = {**RATES, "optimiser": [None, "adam"]}
FIELD = [(160,), (0, 192), (160, 240), (160.0, 192.0), 160]
ILLEGAL: dict[type, dict[str, list[Any]]] = {
    DDPMppConfig: {
        "size": [0, 128.0],
        "width": [0, -4],
        "multipliers": [(), (1, 0), [1, 2]],
        "blocks": [(1, -1, 1, 1, 1), 3],
        "attention": [(0,), 16],
        "middle_attention": [1, "yes"],
        "head_width": [0],
        "dropout": [-0.1, 1.0, NAN],
        "dropout_at": [-1, 8.0],
        "rescale": [None],
        "time_embedding": ["true"],
        "causal": [0],
        "activate_second": [None],
        "norm": ["layer", "Group", None],
        "fold": [0, 2.0],
    },
    OptimiserConfig: {
        "schedule": ["linear", None],
        "ema_decay": [1.0, -0.1, NAN, "none"],
        "clip_norm": [0.0, -1.0, NAN],
    },
    AnomalyConfig: {
        "size": [(0.0, 44.0), (44.0, 10.0), (10.0,)],
        "log_size": ["no"],
        "max_shapes": [0],
        "max_blur": [-1.0, INF],
        "blur_probability": [-0.1, 1.2],
        "matching": ["min-max", "median"],
        "class_offset": [-1.0],
        "published": [1],
    },
    AugmentationConfig: {
        "spatial": [1.5],
        "rotation": [-15.0, 181.0],
        "zoom": [(0.0, 1.0), (1.2, 0.8), 1.0],
        "shift": [-0.1, 1.1],
        "flip_front_back": [None],
        "intensity": [-0.15],
        "published": [None],
    },
    LesionConfig: {
        "healthy_prob": [-0.1, 1.1],
        "large_counts": [(), (0.5, 1.5), 0.5, (0.0, 0.0)],
        "large_size": [(0.0, 90.0), (90.0, 10.0)],
        "along_white_prob": [-0.5],
        "mass_prob": [1.01, NAN],
        "mass_volume": [(0.0, 220.0), (15.0, INF)],
        "small_prob": [2],
        "max_small": [0, 4.5],
        "small_size": [(-2.0, 16.0), (3.0, INF)],
        "white_matter_prob": [2],
        "periventricular_prob": [-0.4],
        "real_shape_prob": [1.5],
    },
    HealthyConfig: {
        "max_erosion": [-1, 1.5],
        **{entry.name: [-0.1, 1.1, NAN] for entry in fields(HealthyConfig) if entry.name != "max_erosion"},
    },
    PaintingConfig: {
        "lesion": [None, {}],
        "healthy": [None],
        "rotation": [-6.0, INF],
        "zoom": [(0.0, 1.1), (1.1, 0.9)],
        "shift": [-4.0],
        "small_lesion_weight": [-1.0, NAN],
    },
    BackboneConfig: {
        "name": ["resnet50", "MRI"],
        "taps": [(), (2, 1), (1, 1), (-1, 2), (0, 3), [1, 2]],
        "normalise": [1],
        "classes": [2],
        "widths": [(8, 24, 48), (8, 24, 48, 0)],
        "augmentation": [None],
        "anomaly": [{}],
        "window": [(160, 190), *FIELD],
        **RATES,
    },
    ANDiHyper: {
        "network": [None],
        "time_scale": [0.0, -1000.0],
        "discount": [-0.9, NAN],
        "published_noise": ["published"],
        "stride": [0, 101, 2.0],
        "field_of_view": [(160, 190), *FIELD],
        "residual_floor": [-1e-8],
        **SCHEDULE,
    },
    PartialDiffusionHyper: {
        "network": [None],
        "time_scale": [0.0],
        "discount": [-1.0],
        "start": [0.0, 1.5],
        "denoising_steps": [0],
        "field_of_view": FIELD,
        **SCHEDULE,
    },
    IterMaskHyper: {
        "network": [None],
        "radius": [-15.0],
        "initial_mask_fraction": [0.0, 1.1],
        "error_tail_fraction": [-0.2, 1.1],
        "min_shrinkage": [-0.1, 2.0],
        "whole_brain": ["brain"],
        "field_of_view": FIELD,
        "threshold_slices": [0],
        "held_out_threshold": [0],
        **SCHEDULE,
    },
    DisyreHyper: {
        "network": [None],
        "window": [(128, 120), (192, 192), *FIELD],
        "stride": [0, 129],
        "field_of_view": [(112, 128), *FIELD],
        "labels": [(), (100,), (-1,), (49.0,)],
        "foreground_weighting": [None],
        "predict_residual": ["change"],
        "codebook_size": [0],
        "anomaly": [None],
        "anomalies": [(), ("rectangle", "haze"), ("texture", "bias"), ("disc", "blur"), "disc"],
        "augmentation": [None],
        **SCHEDULE,
    },
    RIADHyper: {
        "network": [None],
        "cell_sizes": [(), (0, 16), (225,), 8],
        "n_sets": [0, 1],
        "weight_by_cells": [None],
        "field_of_view": FIELD,
        **SCHEDULE,
    },
    UniADHyper: {
        "backbone": [None],
        "grid": [1, 225],
        "width": [0, 250, 257],
        "heads": [0, 7],
        "feedforward_width": [0],
        "layers": [0],
        "neighbour_mask": [0, 6, 15],
        "dropout": [1.0, -0.1],
        "jitter": [-5.0],
        "published_initialisation": [None, 1],
        **SCHEDULE,
    },
    RDHyper: {
        "backbone": [None],
        "embedding_blocks": [0],
        "student_blocks": [(3, 4), (3, 0, 6)],
        "published_initialisation": ["yes"],
        **SCHEDULE,
    },
    PatchCoreHyper: {
        "backbone": [None],
        "descriptor": ["poold", "Pooled", ""],
        "neighbourhood": [0, 4, 29],
        "squared_distance": ["yes"],
        "score_outside_brain": [1.0],
        "candidates": [0],
        "projection_dim": [-1, 0.5],
        "bank_size": [0, 200_001],
        "bank_slices": [0],
        "published_coreset": [1],
    },
    FAEHyper: {
        "backbone": [None],
        "widths": [(100, 150, 200), (100, 150, 200, 0)],
        "dropout": [1.0],
        "training_window": [0, 10, 57],
        "scoring_window": [-11, 4],
        **SCHEDULE,
    },
    PLSHyper: {
        "network": [None],
        "field_of_view": [(162, 192), *FIELD],
        "neighbours": [-1, 1.5],
        "place": ["yes"],
        "place_dropout": [-0.1],
        "painting": [None, {}],
        "intensity": [1.5],
        "fine_bias_strength": [-0.06],
        "tversky_weight": [-1.0, NAN],
        "slice_smoothing": [-2.0, INF],
        **RATES,
    },
    IntensityHyper: {"slices": [0, 2.0], "modality": ["PDw"]},
}
OTHERS = {
    TrainingSettings: {
        "seed": [-1, 2**32, None],
        "steps": [0],
        "batch_size": [0],
        "precision": ["fp16", "auto"],
    },
    Execution: {"precision": ["auto", "half"], "batch_size": [0], "compiled": [None]},
    Protocol: {"scaling": [None], "filtering": ["", None], "published": [1]},
    GradientStage: {
        "name": [None],
        "module": [None],
        "loss": ["mse"],
        "needs_tissue": [None],
        "paint": ["lesions"],
        **SCHEDULE,
    },
    FitStage: {"name": [None], "fit": [None], "slices": [0], "batch_size": [0], "held_out": ["yes"]},
    RegistrationSchedule: {
        "iterations": [(), (0,), 5],
        "shrink_factors": [(4, 2), (4, 2, 0)],
        "smoothing_sigmas": [(2, 1), (2, 1, -1)],
        "sampling_rate": [0.0, 1.1],
    },
}
START = {
    TrainingSettings: TrainingSettings(0),
    Execution: Execution(),
    Protocol: CORRECTED,
    GradientStage: GradientStage("x", torch.nn.Identity(), print, 1, 1, 1e-3),
    FitStage: FitStage("x", print, 1, 1),
}


def cases(tables):
    return [
        pytest.param(kind, name, value, id=f"{kind.__name__}-{name}-{value}")
        for kind, table in tables.items()
        for name, values in table.items()
        for value in values
    ]


def nested(kind: type):
    """Iterate over a dataclass and the dataclasses in its fields."""
    yield kind
    for annotation in annotations(kind).values():
        if is_dataclass(annotation):
            yield from nested(annotation)


HYPERS = sorted(
    {
        part
        for detector in map(detector_class, DETECTORS)
        for hyper in detector.presets.values()
        for part in nested(type(hyper))
    },
    key=lambda kind: kind.__name__,  # workers that collect in different orders cannot share the tests
)


@pytest.mark.parametrize(("kind", "name", "value"), cases(ILLEGAL | OTHERS))
def test_construction_refuses_wrong_values(kind, name, value):
    start = START[kind] if kind in START else kind()
    with pytest.raises(ValueError, match=r"The '\w+' parameter of \w+ must be ") as refused:
        replace(start, **{name: value})
    text = str(refused.value)
    # A value that is inconsistent with another field may be reported under the name of that field.
    assert f" parameter of {kind.__name__} must be " in text
    if f"The {name!r} parameter" in text:
        assert text.endswith(f" Got {value!r} instead.")
    else:
        assert f"'{name}'" in text
    assert "\n" not in text


@pytest.mark.parametrize("kind", HYPERS, ids=lambda kind: kind.__name__)
class TestEveryHyperClass:
    def test_has_a_constraint_for_every_field(self, kind):
        assert issubclass(kind, Constrained)
        free = [name for name, annotation in annotations(kind).items() if not is_constrained(annotation)]
        assert free == []
        assert all(describe(annotation) for annotation in annotations(kind).values())

    def test_has_a_refused_value_for_every_field_in_the_table(self, kind):
        assert set(ILLEGAL[kind]) == {entry.name for entry in fields(kind)}

    def test_renamed_fields_lead_to_present_fields(self, kind):
        names = {entry.name for entry in fields(kind)}
        renamed = getattr(kind, "renamed_fields", {})
        assert set(renamed.values()) <= names
        assert not set(renamed) & names


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_other_classes_have_a_refused_value_for_every_field_in_the_table(kind):
    assert issubclass(kind, Constrained)
    assert set(OTHERS[kind]) == {entry.name for entry in fields(kind)}


TIMELESS, TIMED = DDPMppConfig(time_embedding=False), DDPMppConfig()
WIDE = BackboneConfig(name="wide_resnet50_2", taps=(2, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDPMppConfig(blocks=(1, 1)), "'blocks' .* of the length of 'multipliers', 5"),
        (lambda: DDPMppConfig(width=65, attention=(), middle_attention=False), "'width' .* an even int"),
        (lambda: DDPMppConfig(width=2, attention=(), middle_attention=False), "'width' .* an even int"),
        (lambda: DDPMppConfig(head_width=48), "'head_width' .* a divisor of the 256 channels"),
        (lambda: ANDiHyper(network=TIMELESS), "'time_embedding' .* of DDPMppConfig must be True in ANDi"),
        (lambda: PartialDiffusionHyper(network=TIMELESS), "must be True in PartialDiffusionHyper"),
        (lambda: DisyreHyper(network=TIMELESS), "must be True in DisyreHyper"),
        (lambda: RIADHyper(network=TIMED), "must be False in RIADHyper"),
        (lambda: IterMaskHyper(network=TIMED), "must be False in IterMaskHyper"),
        (lambda: PLSHyper(network=TIMED), "must be False in PLSHyper"),
        (lambda: ANDiHyper(field_of_view=(160, 176)), r"'field_of_view' .* divisible by 32 .*\(160, 176\)"),
        (lambda: DisyreHyper(window=(128, 136)), "'window' .* divisible by 16"),
        (lambda: DisyreHyper(window=(192, 192)), "'window' .* no larger than 'field_of_view'"),
        (lambda: AnomalyConfig(size=(10.0, 70.0), published=True), "'size' .* at most 44 pixels"),
        (
            lambda: DisyreHyper(window=(32, 64), stride=32, anomaly=AnomalyConfig(published=True)),
            "'window' .* at least 64 x 64",
        ),
        (lambda: DisyreHyper(stride=130), "'stride' .* at most 128, the shorter side of 'window'. Got 130"),
        (
            lambda: RIADHyper(
                network=DDPMppConfig(multipliers=(1,), blocks=(1,), time_embedding=False),
                field_of_view=(16, 32),
            ),
            "'field_of_view' .* at least 24 pixels",
        ),
        (lambda: UniADHyper(width=252), "'width' .* an even multiple of 'heads', 8"),
        (lambda: UniADHyper(width=9, heads=3), "'width' .* an even multiple"),
        (lambda: UniADHyper(grid=6), "'neighbour_mask' .* at most 5 on a grid of 6 x 6"),
        (lambda: PatchCoreHyper(bank_size=100, candidates=99), "'bank_size' .* at most 'candidates', 99"),
        (lambda: PatchCoreHyper(backbone=BackboneConfig(taps=(0, 1, 2))), "'taps' .* a tuple of 2 items"),
        (lambda: PatchCoreHyper(backbone=replace(WIDE, taps=(0, 1))), "'taps' .* the size halves"),
        (lambda: PatchCoreHyper(backbone=BackboneConfig(widths=(8, 24, 40, 96))), "'widths' .* double"),
        (lambda: RDHyper(backbone=WIDE), "'taps' parameter of BackboneConfig .* 3 items in RDHyper"),
        (lambda: FAEHyper(backbone=BackboneConfig(taps=(0, 1))), "'taps' .* stride of 4 pixels in FAEHyper"),
        (lambda: BackboneConfig(name="resnet18", taps=(0, 3)), r"'taps' .* in the range \[0, 2\]"),
        (lambda: BackboneConfig(window=(160, 180)), "'window' .* divisible by 8"),
    ],
)  # fmt: skip
def test_construction_refuses_inconsistent_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_allowed_at_the_limits_can_be_run(name):
    """The combinations that are refused are those that would fail or give NaN, and no more."""
    limits = {
        "andi": {"stride": 100, "discount": 0.0, "residual_floor": 0.0, "field_of_view": (32, 224)},
        "ddpmpp": {"start": 1.0, "denoising_steps": 1, "discount": 0.0, "field_of_view": (32, 32)},
        "itermask": {"radius": 0.0, "initial_mask_fraction": 1.0, "min_shrinkage": 1.0,
                     "field_of_view": (32, 64)},
        "disyre": {"window": (32, 32), "stride": 32, "labels": (0, 99), "codebook_size": 1,
                   "anomalies": ("disc", "bias"), "field_of_view": (80, 96)},
        "riad": {"cell_sizes": (1, 224), "n_sets": 2, "field_of_view": (32, 32)},
        "uniad": {"grid": 2, "neighbour_mask": 1, "layers": 1, "heads": 1, "width": 2, "feedforward_width": 1,
                  "jitter": 0.0},
        "rd": {"embedding_blocks": 1, "student_blocks": (1, 1, 1)},
        "patchcore": {"neighbourhood": 27, "bank_size": 1, "candidates": 1, "projection_dim": 1,
                      "bank_slices": 1},
        "fae": {"training_window": 55, "scoring_window": 55, "dropout": 0.0, "widths": (1, 1, 1, 1)},
        "pls": {"neighbours": 0, "place_dropout": 1.0, "intensity": 1.0,
                "fine_bias_strength": 0.0, "tversky_weight": 5.0, "field_of_view": (32, 32)},
        "intensity": {"slices": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    detector = build_detector(name, replace(detector_class(name).presets["lite"], **limits[name]))
    height, width = detector.field_of_view
    slices = torch.rand(2, 1, height, width, generator=generator)
    brain = torch.zeros(2, 1, height, width, dtype=torch.bool)
    brain[:, :, 4:-4, 4:-4] = True
    batch = Batch(slices * brain, brain, brain[:, 0].long())
    for stage in detector.stages():
        if isinstance(stage, FitStage):
            with torch.no_grad():
                stage.fit(iter([batch]), generator)
        else:
            painted = batch_for(stage, detector, batch.slices, brain, batch.tissue)
            assert stage.loss(painted, generator).isfinite()
    inputs = detector.inputs(batch.slices[:, 0], [0, 1], slice(0, height), slice(0, width))
    with torch.no_grad():
        scores = detector.eval().score(inputs, brain, SliceGenerator(torch.arange(2)))
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *[("mri", 3), ("pls", 3), ("resnet18", 3), ("wide_resnet50_2", 4), ("efficientnet_b4", 4)],
        ("efficientnet_lite0", 5),
    ],
)
def test_strides_and_channels_are_those_of_the_maps(name, count):
    config = BackboneConfig(name=name, taps=tuple(range(count)))
    with torch.no_grad():
        maps = build_backbone(config).eval()(torch.zeros(1, 1, 224, 224))
    assert tuple(224 // part.shape[-1] for part in maps) == config.strides
    assert tuple(part.shape[1] for part in maps) == config.channels


@dataclass(frozen=True)
class WithoutDefault:
    """Hyper-parameters of which one has no default."""

    depth: int
    width: int = 3


LITE = ANDi.presets["lite"]


def test_change_hyper_keeps_the_type_of_a_field():
    changed = change_hyper(LITE, ["stride=4", "residual_floor=0", "published_noise=true"])
    assert (changed.stride, changed.residual_floor, changed.published_noise) == (4, 0.0, True)
    assert type(changed.residual_floor) is float
    assert changed.network == LITE.network
    assert change_hyper(Disyre.presets["lite"], ["labels=[74, 24]"]).labels == (74, 24)
    assert change_hyper(LITE, []) == LITE
    rd = change_hyper(RDHyper(), ["backbone.name=efficientnet_lite0", "backbone.taps=[1,2,3]", "steps=9"])
    assert rd == RDHyper(backbone=BackboneConfig(name="efficientnet_lite0", taps=(1, 2, 3)), steps=9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("strides=4", "no hyper-parameter 'strides'; there are .*stride"),
        ("network=4", "no hyper-parameter 'network'"),
        ("network.depth=4", "no hyper-parameter 'depth'"),
        ("stride.depth=4", "no hyper-parameter 'stride.depth'"),
        ("stride=many", r"'stride' parameter of ANDiHyper must be an int in the range .* Got 'many'"),
        ("stride=2.5", r"an int in the range \[1, 100\]\. Got 2\.5"),
        ("stride=true", "Got True"),
        ("stride", "Got ''"),
        ("stride=0", "Got 0"),
        ("discount=NaN", "Got nan"),
        ("field_of_view=[160]", r"Got \(160,\)"),
        ("field_of_view=[162, 192]", "divisible by 16"),
    ],
)  # fmt: skip
def test_change_hyper_refuses_wrong_names_and_values(change, words):
    with pytest.raises(ValueError, match=words):
        change_hyper(LITE, [change])


def test_change_hyper_checks_types_of_a_plain_dataclass():
    with pytest.raises(ValueError, match=r"'width' parameter of WithoutDefault must be an int\. Got 'wide'"):
        change_hyper(WithoutDefault(1), ["width=wide"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": 4}, "'network' parameter of ANDiHyper must be an instance of 'DDPMppConfig'. Got 4"),
        ({"network": {"norm": "layer"}}, "'norm' parameter of DDPMppConfig must be one of .*'layer'"),
        ({"stride": None}, "'stride' parameter of ANDiHyper .* Got None"),
        ({"field_of_view": [160, 192, 3]}, r"'field_of_view' .* Got \(160, 192, 3\)"),
    ],
)
def test_hyper_from_values_refuses_wrong_values(values, words):
    with pytest.raises(ValueError, match=words):
        hyper_from_values(ANDiHyper, values)


def test_hyper_from_values_uses_defaults_for_missing_fields():
    values = asdict(Disyre.presets["lite"])
    del values["anomalies"]
    assert hyper_from_values(type(Disyre.presets["lite"]), values) == Disyre.presets["lite"]
    with pytest.raises(ValueError, match="depth"):
        hyper_from_values(WithoutDefault, {"width": 4})
    with pytest.raises(ValueError, match="height"):
        hyper_from_values(WithoutDefault, {"depth": 1, "height": 4})


def test_hyper_from_values_reads_former_names():
    """Also of dataclasses in fields."""
    hyper = replace(
        Disyre.presets["lite"],
        predict_residual=True,
        augmentation=AugmentationConfig(flip_front_back=False),
    )
    values = asdict(hyper)
    values["predict_change"] = values.pop("predict_residual")
    values["augmentation"]["back_to_front"] = values["augmentation"].pop("flip_front_back")
    assert hyper_from_values(DisyreHyper, values) == hyper


def test_change_hyper_warns_about_former_names(caplog):
    with caplog.at_level("WARNING", logger="bids_uad"):
        assert change_hyper(DisyreHyper(), ["predict_change=true"]).predict_residual
    assert (
        "--hyper predict_change is deprecated: the hyper-parameter is called predict_residual" in caplog.text
    )
    changes = ["predict_change=true", "stride=32"]
    assert changed_names(DisyreHyper, changes) == ["predict_residual", "stride"]
