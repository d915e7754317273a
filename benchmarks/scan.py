"""Scans that benchmarks are run on, real or simulated, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import binary_fill_holes

from bids_uad import space
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import Bundle, load_bundle, load_detector
from bids_uad.engine.execution import Execution, resolve_precision
from bids_uad.engine.inference import anomaly_map
from bids_uad.images import scale_intensity
from bids_uad.methods.base import Detector
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


def score_volume(bundle: Bundle, volume: np.ndarray, brain: np.ndarray, key: str) -> np.ndarray:
    """Compute the scores of a volume on the CPU, in the precision of ``--precision auto``.

    Parameters
    ----------
    bundle : Bundle
        Model; its network is loaded once per process.
    volume : numpy.ndarray of float32, shape (240, 240, 155)
        Preprocessed scan.
    brain : numpy.ndarray of bool, same shape
        Brain mask. The input of the network is 0 outside it, also in neighbouring slices.
    key : str
        Name of the scan, which determines the random numbers.

    Returns
    -------
    numpy.ndarray of float32, same shape
        Scores, 0 outside the brain.
    """
    detector, execution = _prepared(bundle.folder)
    return anomaly_map(detector, volume, brain, key=key, protocol=bundle.protocol, execution=execution)


@cache
def _prepared(folder: Path) -> tuple[Detector, Execution]:
    bundle, device = load_bundle(folder), torch.device("cpu")
    execution = Execution(
        resolve_precision("auto", device, bundle.detector, published=bundle.protocol.published)
    )
    return execution.prepare(load_detector(bundle)), execution


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
