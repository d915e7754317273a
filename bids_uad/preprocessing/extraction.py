"""What finds the brain in whole heads: built in, or a program that the user has installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bids_uad.errors import UnavailableError
from bids_uad.preprocessing.external import HD_BET_FOLDER, PROGRAMS

COMBINED, TEMPLATE, NETWORK = "combined", "template", "network"
"""Built in: registration of the template, the network of :mod:`bids_uad.extraction`, or both."""
EXTRACTIONS = (COMBINED, TEMPLATE, NETWORK, *PROGRAMS)


@dataclass(frozen=True)
class Extraction:
    """What finds the brain in a whole head.

    Parameters
    ----------
    program : str
        One of `EXTRACTIONS`.
    weights : pathlib.Path, optional
        File, or HD-BET's folder.
    """

    program: str
    weights: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files of the weights."""
        if self.weights is None:
            return []
        if self.weights.is_dir():
            return sorted(path for path in self.weights.rglob("*") if path.is_file())
        return [self.weights]


def packaged_weights() -> Path:
    """Say where the network's weights lie that come with the package."""
    return Path(str(resources.files("bids_uad") / "data" / "extraction" / "weights.safetensors"))


def resolve_extraction(program: str, weights: Path | None) -> Extraction:
    """Refuse what cannot be run, before any scan is touched.

    Parameters
    ----------
    program : str
        One of `EXTRACTIONS`.
    weights : pathlib.Path, optional
        As named by the user; the network has packaged ones.

    Returns
    -------
    Extraction

    Raises
    ------
    UnavailableError
        If the program is not installed, or its weights are not named or not there.
    """
    if program == TEMPLATE:
        return Extraction(TEMPLATE)
    if program in (COMBINED, NETWORK) and weights is None:
        weights = packaged_weights()
    if program in PROGRAMS:
        PROGRAMS[program].find()
    if weights is None:
        raise UnavailableError(
            f"--brain-extraction {program} needs --brain-extraction-weights, since nothing is downloaded at "
            "run time"
        )
    if program == "hd-bet" and not (weights.is_dir() and weights.name == HD_BET_FOLDER):
        raise UnavailableError(
            f"--brain-extraction-weights {weights}: HD-BET wants its folder {HD_BET_FOLDER}"
        )
    if not weights.exists():
        raise UnavailableError(f"--brain-extraction-weights {weights} does not exist")
    return Extraction(program, weights)
