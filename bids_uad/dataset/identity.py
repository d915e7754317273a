"""Who is who across datasets, told by hashes, so that a model can be asked whom it has met.

A subject goes by two sorts of hash. One is of its source dataset's name and its label; the other, where the
raw images are known, is of their content, and holds under any name. Neither gives away a name or an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from bids_uad.dataset.describe import read_json

LENGTH = 16  # hexadecimal digits
URN = "urn:bids-dataset:"


def by_name(dataset: str, subject: str) -> str:
    """Hash of a subject's name.

    Parameters
    ----------
    dataset : str
        Name of the source dataset.
    subject : str
        ``sub-<label>``.
    """
    return _hash(f"subject\n{dataset}\n{subject}")


def by_content(sha256: str) -> str:
    """Hash of a raw image, given the SHA-256 of its bytes."""
    return _hash(f"image\n{sha256}")


def source_name(folder: Path) -> str | None:
    """Name of the dataset that the subjects of a folder come from.

    Parameters
    ----------
    folder : pathlib.Path
        A raw dataset, or a derivative whose description links to it as ``raw``.

    Returns
    -------
    str or None
        None where the description does not say.
    """
    told = read_json(folder / "dataset_description.json")
    link = told.get("DatasetLinks", {}).get("raw", "")
    return unquote(link.removeprefix(URN)) if link.startswith(URN) else told.get("Name")


def identities(folder: Path, subjects: Iterable[str]) -> set[str]:
    """Hashes of subjects of a preprocessed dataset, both sorts.

    Parameters
    ----------
    folder : pathlib.Path
        As the participant level or the simulator writes it. The former leaves a record of each raw image.
    subjects : iterable of str
        ``sub-<label>``.
    """
    name = source_name(folder)
    found = set()
    for subject in subjects:
        if name:
            found.add(by_name(name, subject))
        for record in (folder / subject).glob("**/log/*.json"):
            told = read_json(record).get("fingerprint", {})
            if "input_sha256" in told:
                found.add(by_content(told["input_sha256"]))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
