"""What happens to a volume around the detector: scaling, what counts as brain, filtering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from bids_uad import space
from bids_uad.constraints import Constrained, Matches
from bids_uad.images import SCALING


@dataclass(frozen=True)
class Protocol(Constrained):
    """How volumes become a detector's input, and slice scores a map.

    Parameters
    ----------
    scaling : dict
        As in the input contract of a bundle.
    filtering : str
        As in the sidecars of its maps.
    published : bool
        The protocol of arXiv 2512.01534, on which its thresholds depend: min-max scaling of the whole volume,
        brain where the scaled intensity is not zero, and an even median filter that also sees the background.
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
        """What a bundle says of the volumes it is made for; JSON types only."""
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
            Skull-stripped intensities with the 99.5th percentile of the brain at 1, not cut above.
        brain : numpy.ndarray of bool
            Same shape.

        Returns
        -------
        volume : numpy.ndarray of float32
            0 outside the brain.
        brain : numpy.ndarray of bool
            What the detector takes for brain.
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
    """Give the protocol that belongs to a preset: ``paper`` has the published one."""
    return PUBLISHED if preset == "paper" else CORRECTED
