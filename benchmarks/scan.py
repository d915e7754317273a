"""The volume that benchmarks are run on: a real scan where there is one, else a simulated brain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_fill_holes

from bids_uad import space
from bids_uad.preprocessing.intensity import scale_intensity

# A glioma that an independent pipeline brought to SRI24; not part of the project.
REAL = (
    Path(__file__).parents[2]
    / "shared/data/brains/derivatives/sri24ref/sub-tcgafg6692/anat"
    / "sub-tcgafg6692_space-SRI24_desc-preproc_T2w.nii.gz"
)


@dataclass(frozen=True)
class Scan:
    """A preprocessed volume.

    Parameters
    ----------
    name : str
    volume : numpy.ndarray of float32, shape (240, 240, 155)
    brain : numpy.ndarray of bool, same shape
    """

    name: str
    volume: np.ndarray
    brain: np.ndarray


def load_scan(folder: Path) -> Scan:
    """Read the real scan, or simulate one.

    Parameters
    ----------
    folder : pathlib.Path
        Where a simulated brain may be written.
    """
    if REAL.is_file():
        volume = np.asarray(nib.load(REAL).dataobj, dtype=np.float32)
        brain = binary_fill_holes(volume > 0)
        return Scan("sub-tcgafg6692 T2w (real, glioma)", scale_intensity(volume, brain), brain)
    image, mask, _ = simulate(folder, healthy=0, lesion=1)[0]
    volume = np.asarray(nib.load(image).dataobj, dtype=np.float32)
    return Scan("simulated T2w", volume, np.asarray(nib.load(mask).dataobj) > 0)


def simulate(folder: Path, *, healthy: int, lesion: int) -> list[tuple[Path, Path, Path | None]]:
    """Simulate T2w scans on the SRI24 grid; gives each image, its brain mask and its tissue classes."""
    from bids_uad.dataset.preprocessed import find_preprocessed
    from bids_uad.simulation.__main__ import main

    numbers = ["--healthy", str(healthy), "--lesion", str(lesion)]
    main([str(folder), *numbers, "--modalities", "T2w", "--kinds", "tumour", "--seed", "5", "--derivatives"])
    return [(scan.image, scan.brain, scan.tissue) for scan in find_preprocessed(folder, "T2w")]


def number_of_slices(scan: Scan) -> int:
    """Slices of the scan that hold brain."""
    return int(space.to_slices(scan.brain).any((1, 2)).sum())
