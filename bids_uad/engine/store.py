"""Healthy slices on disk, memory-mapped, ready to be drawn at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.lib.format import open_memmap

from bids_uad import space
from bids_uad.engine.protocol import CORRECTED, Protocol
from bids_uad.methods.base import Batch

MINIMUM_BRAIN = 400  # pixels; slices with less hold little to learn from


@dataclass(frozen=True)
class Subject:
    """One preprocessed scan to learn from.

    Parameters
    ----------
    image, brain : pathlib.Path
        On the SRI24 grid.
    tissue : pathlib.Path, optional
        Tissue classes on the same grid.
    """

    image: Path
    brain: Path
    tissue: Path | None = None


class SliceStore:
    """Slices of many scans in memory-mapped arrays: half floats, one byte for masks and classes.

    Parameters
    ----------
    folder : pathlib.Path
        As written by :meth:`build`.
    """

    def __init__(self, folder: Path) -> None:
        self.slices = np.load(folder / "slices.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")
        self.has_tissue = (folder / "tissue").exists()

    def __len__(self) -> int:
        return len(self.slices)

    @classmethod
    def build(cls, subjects: Sequence[Subject], folder: Path, protocol: Protocol = CORRECTED) -> SliceStore:
        """Write the slices of `subjects` to `folder`.

        Parameters
        ----------
        subjects : sequence of Subject
        folder : pathlib.Path
            Made if missing, overwritten if there.
        protocol : Protocol
            Says how the scans are scaled.

        Returns
        -------
        SliceStore
            Slices with at least 400 brain pixels.
        """
        folder.mkdir(parents=True, exist_ok=True)
        keep = [
            np.flatnonzero((_slices(subject.brain) > 0).sum((1, 2)) >= MINIMUM_BRAIN) for subject in subjects
        ]
        shape = (sum(map(len, keep)), space.CROP, space.CROP)
        images = open_memmap(folder / "slices.npy", "w+", np.float16, shape)
        labels = open_memmap(folder / "labels.npy", "w+", np.uint8, shape)
        tissue = all(subject.tissue for subject in subjects)
        start = 0
        for subject, kept in zip(subjects, keep, strict=True):
            stop = start + len(kept)
            volume, brain = protocol.prepare(_volume(subject.image), _volume(subject.brain) > 0)
            images[start:stop] = space.to_slices(volume)[kept]
            mask = space.to_slices(brain)[kept]
            classes = _slices(subject.tissue)[kept].astype(np.uint8) * mask if tissue else mask
            # Brain without a class still has to be told from background.
            labels[start:stop] = np.where(mask & (classes == 0), 1, classes)
            start = stop
        images.flush()
        labels.flush()
        marker = folder / "tissue"
        marker.touch() if tissue else marker.unlink(missing_ok=True)
        return cls(folder)

    def batch(self, index: np.ndarray, device: torch.device) -> Batch:
        """Slices `index` as a batch on `device`."""
        index = np.sort(index)  # the disk likes it, the loss does not mind
        slices = torch.from_numpy(self.slices[index].astype(np.float32))[:, None].to(device)
        labels = torch.from_numpy(self.labels[index]).to(device)
        return Batch(slices, labels[:, None] > 0, labels.long() if self.has_tissue else None)

    def draw(
        self, count: int, batch_size: int, rng: np.random.Generator, device: torch.device
    ) -> Iterator[Batch]:
        """Batches of `count` slices chosen without replacement (all of them if there are fewer)."""
        chosen = rng.choice(len(self), min(count, len(self)), replace=False)
        for start in range(0, len(chosen), batch_size):
            yield self.batch(chosen[start : start + batch_size], device)

    def shuffled(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> Iterator[Batch]:
        """Batches without end, each pass in a new order."""
        while True:
            order = rng.permutation(len(self))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield self.batch(order[start : start + batch_size], device)
            if len(order) < batch_size:
                yield self.batch(order, device)


def _volume(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def _slices(path: Path) -> np.ndarray:
    return space.to_slices(_volume(path))
