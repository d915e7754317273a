"""Search for preprocessed scans on the SRI24 grid, the inputs of `train` and `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bids_uad.dataset.lesion_masks import written_mask
from bids_uad.errors import InputError


@dataclass(frozen=True)
class PreprocessedScan:
    """Preprocessed scan of a derivative dataset.

    Parameters
    ----------
    subject : str
        Participant, `sub-<label>`.
    image : pathlib.Path
        Skull-stripped image on the SRI24 grid, with the 99.5th percentile of the brain at 1.
    brain : pathlib.Path
        Brain mask on the same grid.
    lesion : pathlib.Path or None
        Lesion mask on the same grid, see :func:`bids_uad.dataset.lesion_masks.written_mask`.
    tissue : pathlib.Path or None
        Tissue segmentation on the same grid.
    """

    subject: str
    image: Path
    brain: Path
    lesion: Path | None
    tissue: Path | None

    @property
    def session(self) -> str | None:
        """Session, `ses-<label>`; None without sessions."""
        return next((part for part in self.image.name.split("_") if part.startswith("ses-")), None)

    @property
    def key(self) -> str:
        """File name of the image up to `_space-`, and its modality."""
        return self.image.name.split("_space-")[0] + "_" + self.image.name.split("_")[-1].split(".")[0]


def sibling_output(image: Path, ending: str) -> Path:
    """Return the path of another output of a preprocessed image, which need not exist.

    Parameters
    ----------
    image : pathlib.Path
        Preprocessed image (`*_desc-preproc_*`).
    ending : str
        Part of the output's name after the space, such as ``desc-brain_mask.nii.gz``.

    Returns
    -------
    pathlib.Path
        Path in the folder of the image.
    """
    return image.with_name(image.name.split("desc-preproc_")[0] + ending)


def _images(folder: Path, modality: str) -> list[Path]:
    return sorted(folder.glob(f"sub-*/**/anat/*_space-SRI24_desc-preproc_{modality}.nii.gz"))


def _existing_output(image: Path, ending: str) -> Path | None:
    path = sibling_output(image, ending)
    return path if path.is_file() else None


def has_preprocessed(folder: Path, modality: str) -> bool:
    """Return whether a derivative dataset has a preprocessed scan of a modality."""
    return bool(_images(folder, modality))


def find_preprocessed(folder: Path, modality: str) -> list[PreprocessedScan]:
    """Find the preprocessed scans of one modality.

    Parameters
    ----------
    folder : pathlib.Path
        Derivative dataset written by the participant level or the simulator.
    modality : {"T1w", "T2w", "FLAIR"}
        Modality of the scans.

    Returns
    -------
    list of PreprocessedScan
        Scans sorted by path. A T2w or FLAIR has its own brain mask, else that of the T1w.

    Raises
    ------
    InputError
        If there is no such scan, or one has no brain mask.
    """
    scans = []
    for image in _images(folder, modality):
        brain = _existing_output(image, f"desc-{modality}Brain_mask.nii.gz")
        brain = brain or _existing_output(image, "desc-brain_mask.nii.gz")
        if brain is None:
            raise InputError(image, "no brain mask in its folder", "run the participant level again")
        scans.append(
            PreprocessedScan(
                subject=image.name.split("_")[0],
                image=image,
                brain=brain,
                lesion=written_mask(image),
                tissue=_existing_output(image, "desc-tissue_dseg.nii.gz"),
            )
        )
    if not scans:
        raise InputError(
            folder,
            f"no *_space-SRI24_desc-preproc_{modality}.nii.gz in this folder",
            "give the output folder of the participant level, or of the simulator with --derivatives",
        )
    return scans
