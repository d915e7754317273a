"""Scans that are already on the SRI24 grid: what `train` and `calibrate` read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bids_uad.dataset.lesion_masks import written_mask
from bids_uad.errors import InputError


@dataclass(frozen=True)
class PreprocessedScan:
    """One preprocessed scan of a derivative dataset.

    Parameters
    ----------
    subject : str
        `sub-<label>`.
    image : pathlib.Path
        Intensities on the SRI24 grid, the 99.5th percentile of the brain at 1.
    brain : pathlib.Path
        Brain mask on the same grid.
    lesion : pathlib.Path, optional
        Lesion mask on the same grid, see :func:`bids_uad.dataset.lesion_masks.written_mask`.
    tissue : pathlib.Path, optional
        Tissue classes on the same grid.
    """

    subject: str
    image: Path
    brain: Path
    lesion: Path | None
    tissue: Path | None

    @property
    def session(self) -> str | None:
        """`ses-<label>`; None without sessions."""
        return next((part for part in self.image.name.split("_") if part.startswith("ses-")), None)

    @property
    def key(self) -> str:
        """The image's file name up to its space, and its modality."""
        return self.image.name.split("_space-")[0] + "_" + self.image.name.split("_")[-1].split(".")[0]


def beside(image: Path, name: str) -> Path:
    """Say where something else of a preprocessed image lies, whether it is there or not.

    Parameters
    ----------
    image : pathlib.Path
    name : str
        What its name has after the space, such as ``desc-brain_mask.nii.gz``.
    """
    return image.with_name(image.name.split("desc-preproc_")[0] + name)


def _images(folder: Path, modality: str) -> list[Path]:
    return sorted(folder.glob(f"sub-*/**/anat/*_space-SRI24_desc-preproc_{modality}.nii.gz"))


def _found(image: Path, name: str) -> Path | None:
    path = beside(image, name)
    return path if path.is_file() else None


def has_preprocessed(folder: Path, modality: str) -> bool:
    """Whether a derivative dataset has a preprocessed scan of a modality."""
    return bool(_images(folder, modality))


def find_preprocessed(folder: Path, modality: str) -> list[PreprocessedScan]:
    """Find the preprocessed scans of one modality.

    Parameters
    ----------
    folder : pathlib.Path
        A derivative dataset, as the participant level or the simulator writes it.
    modality : str
        `T1w` or `T2w`.

    Returns
    -------
    list of PreprocessedScan
        Sorted by file name. A T2w uses its own brain mask, or else its T1w's.

    Raises
    ------
    InputError
        If there is no such scan, or one has no brain mask.
    """
    scans = []
    for image in _images(folder, modality):
        brain = _found(image, f"desc-{modality}Brain_mask.nii.gz") or _found(image, "desc-brain_mask.nii.gz")
        if brain is None:
            raise InputError(image, "no brain mask beside it", "run the participant level again")
        scans.append(
            PreprocessedScan(
                subject=image.name.split("_")[0],
                image=image,
                brain=brain,
                lesion=written_mask(image),
                tissue=_found(image, "desc-tissue_dseg.nii.gz"),
            )
        )
    if not scans:
        raise InputError(
            folder,
            f"no *_space-SRI24_desc-preproc_{modality}.nii.gz below it",
            "give the output folder of the participant level, or of the simulator with --derivatives",
        )
    return scans
