"""Registered detectors: name, class, and title and colour in reports."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from bids_uad.resources import has_native_bf16

if TYPE_CHECKING:
    from bids_uad.methods.base import Detector

LOGGER = logging.getLogger("bids_uad")


class Entry(NamedTuple):
    """One registered detector.

    Title and colour are kept here and not in the class, because importing a class imports PyTorch, which
    takes seconds and hundreds of MB and which reports do not need.
    """

    module: str
    """Module that defines the class."""
    class_name: str
    """Name of the class, a subclass of :class:`bids_uad.methods.base.Detector`."""
    title: str
    """Name in reports, tables and the documentation."""
    colour: str
    """Colour in charts, as ``#RRGGBB``."""


# Colours of Okabe and Ito without yellow, and five more; colour-blind readers can distinguish them.
DETECTORS: dict[str, Entry] = {
    "ddpmpp": Entry("bids_uad.methods.ddpmpp", "PartialDiffusion", "DDPM++ (partial)", "#882255"),
    "andi": Entry("bids_uad.methods.andi", "ANDi", "ANDi", "#D55E00"),
    "itermask": Entry("bids_uad.methods.itermask", "IterMask", "IterMask", "#009E73"),
    "disyre": Entry("bids_uad.methods.disyre", "Disyre", "Disyre", "#CC79A7"),
    "riad": Entry("bids_uad.methods.riad", "RIAD", "RIAD", "#E69F00"),
    "uniad": Entry("bids_uad.methods.uniad", "UniAD", "UniAD", "#56B4E9"),
    "rd": Entry("bids_uad.methods.rd", "ReverseDistillation", "RD", "#4D4D4D"),
    "patchcore": Entry("bids_uad.methods.patchcore", "PatchCore", "PatchCore", "#8C564B"),
    "fae": Entry("bids_uad.methods.fae", "FAE", "FAE", "#7A5FB5"),
    "pls": Entry("bids_uad.methods.pls.detector", "PLS", "PLS", "#0072B2"),
    "intensity": Entry("bids_uad.methods.intensity", "Intensity", "Intensity", "#9AA60A"),
}
"""Detectors by the name that ``--models`` and ``--detector`` take."""
CPU_BF16 = frozenset({"pls", "ddpmpp", "andi", "disyre", "riad", "patchcore", "fae"})
"""Detectors whose masks in bf16 on a CPU have a Dice of at least .99 with those in fp32."""


def cpu_precision(name: str) -> str:
    """Return the precision that ``--precision auto`` selects on this CPU.

    Parameters
    ----------
    name : str
        Key of `DETECTORS`.

    Returns
    -------
    str
        ``bf16`` for `CPU_BF16` if the CPU computes in bfloat16, else ``fp32``.
    """
    return "bf16" if name in CPU_BF16 and has_native_bf16() else "fp32"


def warn_if_emulated(precision: str, device: str) -> None:
    """Log a warning if ``bf16`` was requested on a CPU that has no instructions for it.

    PyTorch then emulates them: the network of PLS takes six times as long as in ``fp32`` with AVX2.

    Parameters
    ----------
    precision : {"auto", "fp32", "bf16"}
        Requested precision.
    device : str
        Kind of device, such as ``cpu``.
    """
    if precision == "bf16" and device == "cpu" and not has_native_bf16():
        LOGGER.warning(
            "--precision bf16: no bfloat16 instructions (AVX512-BF16, AMX) were found on this CPU; without "
            "them, networks take several times as long as with fp32"
        )


def detector_class(name: str) -> type[Detector]:
    """Import the class of a detector.

    Parameters
    ----------
    name : str
        Key of `DETECTORS`.

    Returns
    -------
    type
        Subclass of :class:`bids_uad.methods.base.Detector`.

    Raises
    ------
    KeyError
        If no detector has this name; the message lists the registered ones.
    """
    if name not in DETECTORS:
        raise KeyError(f"no detector named {name!r}; there are {', '.join(DETECTORS)}")
    entry = DETECTORS[name]
    return getattr(import_module(entry.module), entry.class_name)


def detector_name(detector: str) -> str:
    """Return the title of a detector, with `(Z)` if its scores are deviations from a normative reference.

    Parameters
    ----------
    detector : str
        Name as in tables (`disyre+normative`) or, in lower case, as in file names (`disyrenormative`).
    """
    plain = detector.removesuffix("normative").rstrip("+")
    name = DETECTORS[plain].title if plain in DETECTORS else plain.capitalize()
    return name if plain == detector else f"{name} (Z)"


def preset_of(name: str, preset: str, modality: str | None = None) -> Any:
    """Return the hyper-parameters of a preset.

    Parameters
    ----------
    name : str
        Key of `DETECTORS`.
    preset : str
        Name of the preset, for example ``lite``.
    modality : str, optional
        ``T1w``, ``T2w`` or ``FLAIR``; some hyper-parameters of preset ``paper`` differ for T1w. By default,
        those of T2w are returned.

    Returns
    -------
    dataclass
        Hyper-parameters, of the type that belongs to the detector.

    Raises
    ------
    KeyError
        If the detector or its preset is unknown; the message lists those there are.
    """
    detector = detector_class(name)
    if preset not in detector.presets:
        raise KeyError(f"{name} has no preset {preset!r}; it has {', '.join(detector.presets)}")
    return replace(detector.presets[preset], **detector.modality_settings.get((preset, modality), {}))


def build_detector(name: str, hyper: Any) -> Detector:
    """Build an untrained detector.

    Parameters
    ----------
    name : str
        Key of `DETECTORS`.
    hyper : str or dataclass
        Name of a preset, or hyper-parameters.

    Returns
    -------
    Detector
        With random weights, in training mode.

    Raises
    ------
    KeyError
        If the detector or its preset is unknown; the message lists those there are.
    """
    if isinstance(hyper, str):
        hyper = preset_of(name, hyper)
    return detector_class(name)(hyper)
