"""The volume that benchmarks are run on: a real scan where there is one, else a simulated brain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_fill_holes

from bids_uad import space
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.images import scale_intensity
from bids_uad.simulation.__main__ import main as simulation

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
        volume = read(REAL)
        brain = binary_fill_holes(volume > 0)
        return Scan("sub-tcgafg6692 T2w (real, glioma)", scale_intensity(volume, brain), brain)
    image, mask, _ = simulate_lesions(folder, ("tumour",))[0]
    return Scan("simulated T2w (tumour)", read(image), read(mask) > 0)


def read(path: Path) -> np.ndarray:
    """Read a volume as float32."""
    return np.asarray(nib.load(path).dataobj, dtype=np.float32)


def simulate(folder: Path, *, healthy: int) -> list[tuple[Path, Path, Path]]:
    """Simulate healthy T2w scans on the SRI24 grid; gives image, brain mask and tissue classes of each."""
    scans = _simulated(folder, ["--healthy", str(healthy)])
    return [(scan.image, scan.brain, scan.tissue) for scan in scans]


def simulate_lesions(folder: Path, kinds: tuple[str, ...]) -> list[tuple[Path, Path, Path]]:
    """Simulate one T2w scan for each kind of lesion; gives image, brain mask and lesion mask of each."""
    scans = _simulated(folder, [word for kind in kinds for word in (f"--{kind}", "1")])
    return [(scan.image, scan.brain, scan.lesion) for scan in scans]


def _simulated(folder: Path, cohort: list[str]) -> list[PreprocessedScan]:
    simulation([str(folder), *cohort, "--modalities", "T2w", "--seed", "5", "--derivatives"])
    return find_preprocessed(folder, "T2w")


def number_of_slices(scan: Scan) -> int:
    """Slices of the scan that hold brain."""
    return int(space.to_slices(scan.brain).any((1, 2)).sum())
