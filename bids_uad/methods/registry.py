"""The detectors by name."""

from __future__ import annotations

from typing import Any

from bids_uad.methods.andi import ANDi
from bids_uad.methods.base import Detector
from bids_uad.methods.ddpmpp import PartialDiffusion
from bids_uad.methods.disyre import Disyre
from bids_uad.methods.fae import FAE
from bids_uad.methods.intensity import Intensity
from bids_uad.methods.itermask import IterMask
from bids_uad.methods.patchcore import PatchCore
from bids_uad.methods.pls.detector import PLS
from bids_uad.methods.rd import ReverseDistillation
from bids_uad.methods.riad import RIAD
from bids_uad.methods.uniad import UniAD

DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector
    for detector in (
        PartialDiffusion,
        ANDi,
        IterMask,
        Disyre,
        RIAD,
        UniAD,
        ReverseDistillation,
        PatchCore,
        FAE,
        PLS,
        Intensity,
    )
}


def build_detector(name: str, hyper: Any) -> Detector:
    """Make an untrained detector.

    Parameters
    ----------
    name : str
        Registry name.
    hyper : str or dataclass
        A preset's name, or hyper-parameters.

    Returns
    -------
    Detector

    Raises
    ------
    KeyError
        If the detector or its preset is unknown; the message lists those there are.
    """
    if isinstance(hyper, str):
        hyper = preset_of(name, hyper)
    return _kind(name)(hyper)


def preset_of(name: str, preset: str) -> Any:
    """Give the hyper-parameters of a preset.

    Raises
    ------
    KeyError
        If the detector or its preset is unknown; the message lists those there are.
    """
    presets = _kind(name).presets
    if preset not in presets:
        raise KeyError(f"{name} has no preset {preset!r}; it has {', '.join(presets)}")
    return presets[preset]


def _kind(name: str) -> type[Detector]:
    if name not in DETECTORS:
        raise KeyError(f"no detector named {name!r}; there are {', '.join(DETECTORS)}")
    return DETECTORS[name]
