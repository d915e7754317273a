"""Initialisation of a detector's weights from published ones or from another bundle."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from bids_uad.engine.bundle import WEIGHTS, Bundle, load_bundle, load_detector
from bids_uad.errors import ConfigError, InputError
from bids_uad.methods.base import Detector, FeatureDetector
from bids_uad.methods.pls.detector import PLS
from bids_uad.networks.backbones import find_published


def initialise_backbone(detector: Detector, weights: Path | None) -> Bundle | None:
    """Load the weights of a detector's backbone, or those with which the training of PLS starts.

    Parameters
    ----------
    detector : Detector
        Detector whose backbone is set in place.
    weights : pathlib.Path or None
        For an ImageNet backbone, torchvision's weights file or a folder that contains it. For the package's
        own backbone, a bundle with the same backbone; if None, the backbone is trained. For PLS, a bundle
        whose network is trained further; if None, the initial weights are random.

    Returns
    -------
    Bundle or None
        Bundle of the backbone, if it comes from one.

    Raises
    ------
    ConfigError
        If weights are needed and missing, or not needed.
    InputError
        If the file or bundle has other weights.
    ModelError
        If the bundle is missing or damaged.
    """
    if isinstance(detector, PLS):
        return None if weights is None else _continue_from_bundle(detector, weights)
    if not isinstance(detector, FeatureDetector):
        if weights is not None:
            raise ConfigError(f"{detector.name} needs no --backbone-weights in this preset")
        return None
    if detector.hyper.backbone.pretrained:
        _load_published(detector, weights)
        return None
    return None if weights is None else _load_from_bundle(detector, weights)


def _continue_from_bundle(detector: PLS, folder: Path) -> Bundle:
    bundle = load_bundle(folder)
    try:
        detector.continue_from(load_file(bundle.folder / WEIGHTS))
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            folder, f"the network of this bundle has another shape ({error})", "use a bundle of this preset"
        ) from error
    return bundle


def _load_published(detector: FeatureDetector, weights: Path | None) -> None:
    name = detector.hyper.backbone.name
    if weights is None:
        raise ConfigError(
            f"{detector.name} needs the ImageNet weights of {name}, which are not part of bids_uad; "
            "download torchvision's file and set --backbone-weights to it or to its folder "
            "(~/.cache/torch/hub), or use --preset lite, whose backbone is trained on your scans"
        )
    try:
        detector.backbone.load_published(find_published(weights, name))
    except ValueError as error:
        raise InputError(weights, str(error), f"use the weights file of {name}") from error


def _load_from_bundle(detector: FeatureDetector, folder: Path) -> Bundle:
    bundle = load_bundle(folder)
    other = load_detector(bundle)
    own = detector.hyper.backbone
    if not isinstance(other, FeatureDetector) or not own.same_network(other.hyper.backbone):
        raise InputError(
            folder, "the detector of this bundle has another backbone", "use a bundle with the same backbone"
        )
    detector.use_backbone(other.backbone)
    return bundle
