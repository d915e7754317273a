"""Where a detector's backbone comes from: a published file, another bundle, or the training itself."""

from __future__ import annotations

from pathlib import Path

from bids_uad.engine.bundle import Bundle, load_bundle, load_detector
from bids_uad.errors import ConfigError, InputError
from bids_uad.methods.base import Detector, FeatureDetector
from bids_uad.networks.backbones import find_published


def initialise_backbone(detector: Detector, weights: Path | None) -> Bundle | None:
    """Give a detector the weights of its backbone, if they come from elsewhere.

    Parameters
    ----------
    detector : Detector
    weights : pathlib.Path, optional
        For a network of the ImageNet challenge, the file that torchvision publishes or a folder that holds
        it. For our own, a bundle whose detector looks at the same network; without one it is
        trained.

    Returns
    -------
    Bundle or None
        That bundle.

    Raises
    ------
    ConfigError
        If weights are needed and not given, or the other way round.
    InputError
        If the file or bundle does not hold them.
    ModelError
        If the bundle is missing or damaged.
    """
    if not isinstance(detector, FeatureDetector):
        if weights is not None:
            raise ConfigError(f"{detector.name} needs no --backbone-weights in this preset")
        return None
    if detector.hyper.backbone.pretrained:
        _give_published(detector, weights)
        return None
    return None if weights is None else _give_trained(detector, weights)


def _give_published(detector: FeatureDetector, weights: Path | None) -> None:
    name = detector.hyper.backbone.name
    if weights is None:
        raise ConfigError(
            f"{detector.name} looks at features of {name}, which is trained on ImageNet and not "
            "part of bids_uad: download torchvision's weights and name the file, or the cache that holds it "
            "(~/.cache/torch/hub), with --backbone-weights, or "
            "choose --preset lite, whose features are trained on your scans"
        )
    try:
        detector.backbone.load_published(find_published(weights, name))
    except ValueError as error:
        raise InputError(weights, str(error), f"name the file of {name}") from error


def _give_trained(detector: FeatureDetector, folder: Path) -> Bundle:
    bundle = load_bundle(folder)
    other = load_detector(bundle)
    own = detector.hyper.backbone
    if not isinstance(other, FeatureDetector) or not own.same_network(other.hyper.backbone):
        raise InputError(folder, "its detector has another backbone", "name a bundle with the same one")
    detector.use_backbone(other.backbone)
    return bundle
