"""Frozen feature extractors: networks trained on ImageNet, or our own, trained on brains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bids_uad.constraints import Constrained, Count, CountOrZero, Interval, Items, OneOf, Positive, invalid
from bids_uad.networks.corruptions import AnomalyConfig, AugmentationConfig
from bids_uad.networks.efficientnet import EfficientNetB4
from bids_uad.networks.resnet import resnet18, wide_resnet50_2
from bids_uad.networks.tissuenet import TissueNet
from bids_uad.space import SliceSide

MRI = "mri"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class _Published:
    """A network of the ImageNet challenge: how it is built, its depth, channels and strides of its maps."""

    build: Callable[[int], nn.Module]
    stages: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]


_IMAGENET = {
    "resnet18": _Published(resnet18, 2, (64, 64, 128), (4, 4, 8)),
    "wide_resnet50_2": _Published(wide_resnet50_2, 3, (64, 256, 512, 1024), (4, 4, 8, 16)),
    "efficientnet_b4": _Published(EfficientNetB4, 4, (24, 32, 56, 112), (2, 4, 8, 16)),
}
_MRI_STRIDES = (2, 4, 8)


@dataclass(frozen=True)
class BackboneConfig(Constrained):
    """Which features a detector looks at.

    Parameters
    ----------
    name : {"mri", "resnet18", "wide_resnet50_2", "efficientnet_b4"}
        ``mri`` is trained with the detector, on scans with tissue classes; the others come with weights
        trained on ImageNet.
    taps : tuple of int
        Which of the network's maps are taken, fine to coarse. ``mri`` has those at half, quarter and
        eighth resolution.
    normalise : bool
        Give ImageNet networks the mean and spread they were trained with.
    classes : int
        What ``mri`` learns to tell apart: background, tissue classes and, last, painted anomalies.
    widths : tuple of int
        Channels of ``mri`` at full, half, quarter and eighth resolution.
    augmentation : AugmentationConfig
        Variation of the slices while ``mri`` learns.
    anomaly : AnomalyConfig
        What is painted over them.
    window : tuple of int
        Height and width in pixels of the windows it learns from.
    steps, batch_size, learning_rate
        Its training schedule.

    Raises
    ------
    InvalidParameterError
        If a value is not allowed, the network has no such map, or the window cannot be halved three times.
    """

    name: Annotated[str, OneOf(MRI, *_IMAGENET)] = MRI
    taps: Annotated[tuple[CountOrZero, ...], Items(1, "strictly")] = (1, 2)
    normalise: bool = True
    classes: Annotated[int, Interval(3)] = 7
    widths: tuple[Count, Count, Count, Count] = (8, 24, 48, 96)
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(spatial=0.3, zoom=(0.85, 1.15), intensity=0.25)
    )
    anomaly: AnomalyConfig = field(
        default_factory=lambda: AnomalyConfig(size=(5.0, 70.0), log_size=True, max_shapes=4)
    )
    window: tuple[SliceSide, SliceSide] = (160, 192)
    steps: Count = 600
    batch_size: Count = 8
    learning_rate: Positive = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        maps = len(self._available("strides"))
        if self.taps[-1] >= maps:
            raise invalid(self, "taps", f"in the range [0, {maps - 1}], the maps of {self.name!r}")
        if any(side % _MRI_STRIDES[-1] for side in self.window):
            raise invalid(self, "window", f"divisible by {_MRI_STRIDES[-1]}")

    @property
    def pretrained(self) -> bool:
        """Whether the weights come from a file."""
        return self.name != MRI

    def same_network(self, other: BackboneConfig) -> bool:
        """Say whether another detector looks at the same network, be it at other maps of it."""
        return (self.name, self.classes, self.widths) == (other.name, other.classes, other.widths)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps that are taken."""
        available = self._available("channels")
        return tuple(available[tap] for tap in self.taps)

    @property
    def strides(self) -> tuple[int, ...]:
        """How many pixels of a slice a pixel of each map that is taken spans, along a side."""
        available = self._available("strides")
        return tuple(available[tap] for tap in self.taps)

    def _available(self, what: str) -> tuple[int, ...]:
        """Return channels or strides of all maps of the network."""
        if self.pretrained:
            return getattr(_IMAGENET[self.name], what)
        return {"channels": self.widths[1:], "strides": _MRI_STRIDES}[what]


def check_maps(
    hyper: Any, number: int, *, halving: bool = False, doubling: bool = False, finest: int | None = None
) -> None:
    """Refuse hyper-parameters whose `backbone` gives other maps than their detector can use.

    Parameters
    ----------
    hyper : dataclass instance
        Has a field `backbone`, a :class:`BackboneConfig`.
    number : int
        How many maps are needed; 0 allows any number.
    halving : bool, default=False
        Whether each map must be half as fine as the one before.
    doubling : bool, default=False
        Whether each map must have twice the channels of the one before.
    finest : int, optional
        Stride of the first map, in pixels; any by default.

    Raises
    ------
    InvalidParameterError
        If the maps are others.
    """
    backbone, owner = hyper.backbone, type(hyper).__name__
    strides, channels = backbone.strides, backbone.channels
    if number and len(strides) != number:
        raise invalid(backbone, "taps", f"a tuple of {number} items in {owner}")
    if finest is not None and strides[0] != finest:
        raise invalid(backbone, "taps", f"such that the first map has a stride of {finest} pixels in {owner}")
    if halving and any(2 * a != b for a, b in pairwise(strides)):
        raise invalid(backbone, "taps", f"such that the size halves from map to map in {owner}")
    if doubling and any(2 * a != b for a, b in pairwise(channels)):
        name = "taps" if backbone.pretrained else "widths"
        raise invalid(backbone, name, f"such that the channels double from map to map in {owner}")


class ImageNetFeatures(nn.Module):
    """A frozen network of the ImageNet challenge that looks at grey slices.

    Parameters
    ----------
    name : str
    normalise : bool
    """

    def __init__(self, name: str, normalise: bool) -> None:
        super().__init__()
        published = _IMAGENET[name]
        self.name = name
        self.network = published.build(published.stages).requires_grad_(False)
        mean, spread = (IMAGENET_MEAN, IMAGENET_STD) if normalise else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spread).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> ImageNetFeatures:
        """Stay in evaluation mode: what is frozen keeps its batch statistics, too."""
        return super().train(False)

    def forward(self, slices: Tensor) -> list[Tensor]:
        """All maps of the network for slices of shape (B, 1, H, W) in [0, 1]."""
        images = (slices.expand(-1, 3, -1, -1) - self.mean) / self.spread
        read = self.network.stage_maps if self.name == "efficientnet_b4" else self.network.features
        return read(images)

    def load_published(self, path: Path) -> None:
        """Take the weights that torchvision publishes for this network.

        Parameters
        ----------
        path : pathlib.Path
            A ``.safetensors`` file, or torchvision's ``.pth``, of which only tensors are read.

        Raises
        ------
        ValueError
            If the file cannot be read or is another network's.
        """
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, SafetensorError, ValueError, EOFError) as error:
            raise ValueError(f"its weights cannot be read: {error}") from error
        except (
            Exception
        ) as error:  # the restricted reader refuses whatever is no tensor with errors of its own
            raise ValueError(f"it holds more than tensors: {type(error).__name__}") from error
        own = self.network.state_dict()
        odd = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if odd:
            raise ValueError(
                f"these are not the weights of {self.name}: {odd[0]} is missing or of another shape"
            )
        self.network.load_state_dict({name: state[name] for name in own})


def find_published(place: Path, name: str) -> Path:
    """Find the file that holds a network's published weights.

    Parameters
    ----------
    place : pathlib.Path
        The file itself, or a folder that holds it under the name that torchvision publishes it by, such as
        torch's own cache (``~/.cache/torch/hub``).
    name : str
        ``resnet18``, ``wide_resnet50_2`` or ``efficientnet_b4``.

    Raises
    ------
    ValueError
        If the folder holds no such file, or several.
    """
    if not place.is_dir():
        return place
    folders = (place, place / "checkpoints", place / "hub" / "checkpoints")
    found = [
        path
        for folder in folders
        for pattern in (f"{name}[-_.]*.pth", f"{name}*.safetensors")
        for path in sorted(folder.glob(pattern))
    ]
    if not found:
        raise ValueError(f"no weights of {name} in this folder ({name}-*.pth or {name}*.safetensors)")
    if len(found) > 1:
        raise ValueError(f"several weights of {name}: {', '.join(path.name for path in found)}")
    return found[0]


def build_backbone(config: BackboneConfig) -> TissueNet | ImageNetFeatures:
    """Build a feature extractor; it gives the list of its maps, fine to coarse."""
    if config.pretrained:
        return ImageNetFeatures(config.name, config.normalise)
    return TissueNet(config.classes, config.widths)
