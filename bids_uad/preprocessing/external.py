"""Brain extraction by a program that the user has installed, with weights that the user names."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bids_uad.errors import InputError, UnavailableError

HD_BET_FOLDER = "hd-bet_params"  # in HOME: where the program looks for its weights


@dataclass(frozen=True)
class Program:
    """A program that finds brains.

    Attributes
    ----------
    commands : tuple of str
        Its names, best first.
    citation : str
        Key of its reference.
    title : str
    """

    commands: tuple[str, ...]
    citation: str
    title: str

    def find(self) -> str:
        """Say where it lies.

        Raises
        ------
        UnavailableError
            If it is not installed.
        """
        for command in self.commands:
            if found := shutil.which(command):
                return found
        raise UnavailableError(
            f"--brain-extraction: {' or '.join(self.commands)} is not on the PATH; install {self.title}, or "
            "leave the option out for the built-in extraction"
        )


PROGRAMS = {
    "synthstrip": Program(("mri_synthstrip", "nipreps-synthstrip"), "synthstrip", "SynthStrip"),
    "hd-bet": Program(("hd-bet",), "hdbet", "HD-BET"),
}


def extract_with(name: str, weights: Path, image: Path, folder: Path) -> Path:
    """Run a program on a scan.

    Parameters
    ----------
    name : str
        Key of `PROGRAMS`.
    weights : pathlib.Path
    image : pathlib.Path
        Three-dimensional NIfTI file.
    folder : pathlib.Path
        Where its files go.

    Returns
    -------
    pathlib.Path
        Brain mask on the grid of the scan.

    Raises
    ------
    InputError
        If it fails or leaves no mask.
    """
    command, environment = [PROGRAMS[name].find()], dict(os.environ)
    if name == "hd-bet":
        brain, mask = folder / "brain.nii.gz", folder / "brain_bet.nii.gz"
        command += ["-i", str(image), "-o", str(brain), "-device", "cpu", "--disable_tta", "--save_bet_mask"]
        environment["HOME"] = str(weights.parent)
    else:
        mask = folder / "brain_mask.nii.gz"
        command += ["-i", str(image), "-m", str(mask), "--model", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0 or not mask.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise InputError(
            image,
            f"{PROGRAMS[name].title} found no brain in it (exit code {done.returncode}: {said})",
            "give a brain mask, or leave --brain-extraction out",
        )
    return mask
