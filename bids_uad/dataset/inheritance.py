"""Sidecars of images by BIDS's inheritance principle."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bids_uad.dataset.tsv import read_object
from bids_uad.errors import InputError

LOGGER = logging.getLogger("bids_uad")


class SidecarReader:
    """Read the metadata of the images of one dataset; files that several images share are read once.

    Parameters
    ----------
    root : pathlib.Path
        The dataset.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read = cache(read_object)
        self._listed = cache(lambda folder: sorted(folder.glob("*.json")))

    def files(self, image: PurePosixPath) -> list[Path]:
        """List the sidecars that apply to an image, the most specific last.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Relative to the dataset.

        Returns
        -------
        list of pathlib.Path
            JSON files of the same suffix in the folders above the image, whose names hold entities of the
            image only: those of outer folders first, and in one folder those with fewer entities.
        """
        entities, suffix = _split(image.name)
        found = []
        for folder in reversed(image.parents):
            own = [
                (len(named), path)
                for path in self._listed(self._root / folder)
                for named, kind in [_split(path.name)]
                if kind == suffix and named <= entities
            ]
            found += [path for _, path in sorted(own)]
        return found

    def fields(self, image: PurePosixPath) -> dict[str, Any]:
        """Merge the sidecars of an image; where two have the same field, the more specific file counts.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Relative to the dataset.

        Returns
        -------
        dict
            Empty without a sidecar.

        Raises
        ------
        InputError
            If one of the files cannot be read or is not a JSON object.
        """
        fields: dict[str, Any] = {}
        for path in self.files(image):
            fields |= self._read(path)
        return fields

    def fields_if_readable(self, image: PurePosixPath) -> dict[str, Any]:
        """Merge the sidecars of an image as :meth:`fields` does; log a warning if one cannot be read.

        Parameters
        ----------
        image : pathlib.PurePosixPath
            Relative to the dataset.

        Returns
        -------
        dict
            Empty if one of the sidecars cannot be read.
        """
        try:
            return self.fields(image)
        except InputError as error:
            LOGGER.warning("%s. The metadata of %s are not used", error, image.name)
            return {}


def _split(name: str) -> tuple[frozenset[str], str]:
    """Split a file name into its entities and its suffix."""
    *entities, suffix = name.split(".", 1)[0].split("_")
    return frozenset(entities), suffix
