"""Scaling of volumes before the detector, and the filter of anomaly maps after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from bids_uad import space
from bids_uad.constraints import Constrained, Matches
from bids_uad.images import SCALING


@dataclass(frozen=True)
class Protocol(Constrained):
    """Scaling, brain mask and filter around a detector.

    Parameters
    ----------
    scaling : dict
        Description of the scaling, for `input` in ``bundle.json``.
    filtering : str
        Description of the filter, for the sidecars of anomaly maps.
    published : bool
        Whether to follow arXiv 2512.01534, whose thresholds depend on it: min-max scaling of the volume,
        brain where the scaled intensity is not 0, and a median filter of even size that includes background.
    """

    scaling: dict[str, Any]
    filtering: Annotated[str, Matches(".+", "a str that is not empty")]
    published: bool

    @property
    def name(self) -> str:
        """``published`` or ``corrected``."""
        return "published" if self.published else "corrected"

    @property
    def input_contract(self) -> dict[str, Any]:
        """Grid and scaling of the input volumes, for ``bundle.json``; JSON types only."""
        return {
            "space": space.NAME,
            "shape": list(space.SHAPE),
            "affine": space.AFFINE.tolist(),
            "scaling": self.scaling,
        }

    def prepare(self, volume: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scale a preprocessed volume to [0, 1].

        Parameters
        ----------
        volume : numpy.ndarray of float
            Skull-stripped intensities with the 99.5th percentile of the brain at 1, not clipped.
        brain : numpy.ndarray of bool
            Brain mask, same shape.

        Returns
        -------
        volume : numpy.ndarray of float32
            Intensities in [0, 1], 0 outside the brain.
        brain : numpy.ndarray of bool
            Brain mask for the detector.
        """
        stripped = np.where(brain, volume, 0).astype(np.float32)
        if not self.published:
            return stripped.clip(0, 1), brain
        low, high = stripped.min(), stripped.max()
        scaled = (stripped - low) / (high - low) if high > low else np.zeros_like(stripped)
        return scaled, scaled != 0


CORRECTED = Protocol(SCALING, "median of the 3 x 3 x 3 neighbours inside the brain mask", published=False)
PUBLISHED = Protocol(
    {"method": "minmax", "region": "volume"},
    "median of 4 x 4 x 4 voxels, background included",
    published=True,
)


def protocol_of(preset: str) -> Protocol:
    """Return the protocol of a preset.

    Parameters
    ----------
    preset : str
        Name of the preset.

    Returns
    -------
    Protocol
        `PUBLISHED` for ``paper``, else `CORRECTED`.
    """
    return PUBLISHED if preset == "paper" else CORRECTED
