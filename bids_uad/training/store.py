"""Healthy slices on disk, memory-mapped, ready to be drawn at random."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bids_uad import space
from bids_uad.engine.protocol import CORRECTED, Protocol
from bids_uad.files import remove_unfinished, temporary_folder
from bids_uad.methods.base import Batch

LOGGER = logging.getLogger(__name__)

MINIMUM_BRAIN = 400  # pixels; slices with less hold little to learn from
PIXELS = space.CROP**2


@dataclass(frozen=True)
class Subject:
    """One preprocessed scan to learn from.

    Parameters
    ----------
    image, brain : pathlib.Path
        On the SRI24 grid.
    tissue : pathlib.Path, optional
        Tissue classes on the same grid.
    name : str
        Whose scan it is; scans of one person stay together when subjects are set aside.
    """

    image: Path
    brain: Path
    tissue: Path | None = None
    name: str = ""


class SliceStore:
    """Slices of many scans in memory-mapped files: of the brain its pixels, of the rest one bit.

    A scan takes about 4 MB (half floats, and a byte a pixel more where there are tissue classes), so that
    three thousand take 12 GB.

    Parameters
    ----------
    folder : pathlib.Path
        As written by :meth:`build`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.masks = np.load(folder / "masks.npy", mmap_mode="r")
        self.starts = np.load(folder / "starts.npy")
        self.owners = np.load(folder / "owners.npy")
        self.names = (folder / "names.txt").read_text(encoding="utf-8").splitlines()
        self.pixels = np.memmap(folder / "pixels.f16", np.float16, "r")
        tissue = folder / "tissue.u8"
        self.tissue = np.memmap(tissue, np.uint8, "r") if tissue.exists() else None

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def has_tissue(self) -> bool:
        """Whether there are tissue classes for every slice."""
        return self.tissue is not None

    @classmethod
    def open_or_build(cls, subjects: Sequence[Subject], parent: Path, protocol: Protocol) -> SliceStore:
        """Open the store of these scans, and build it if there is none yet.

        Parameters
        ----------
        subjects : sequence of Subject
        parent : pathlib.Path
            Folder of stores; each is named after what it holds.
        protocol : Protocol

        Returns
        -------
        SliceStore
        """
        folder = parent / f"slices-{_contents(subjects, protocol)}"
        if not folder.is_dir():
            LOGGER.info("Storing the slices of %d scans in %s", len(subjects), folder)
            remove_unfinished(parent)
            with temporary_folder(parent, folder.name) as unfinished:
                cls.build(subjects, unfinished, protocol)
                try:
                    unfinished.rename(folder)
                except OSError:
                    if not folder.is_dir():  # unless another training was quicker
                        raise
        return cls(folder)

    @classmethod
    def build(cls, subjects: Sequence[Subject], folder: Path, protocol: Protocol = CORRECTED) -> SliceStore:
        """Write the slices of `subjects` to `folder`, one scan after the other.

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
        has_tissue = all(subject.tissue for subject in subjects)
        (folder / "tissue.u8").unlink(missing_ok=True)
        masks, counts, owners = [], [], []
        names = list(dict.fromkeys(subject.name for subject in subjects))
        with (folder / "pixels.f16").open("wb") as pixels:
            for subject in subjects:
                volume, brain = protocol.prepare(_volume(subject.image), _volume(subject.brain) > 0)
                inside = space.to_slices(brain)
                kept = inside.sum((1, 2)) >= MINIMUM_BRAIN
                mask = inside[kept]
                pixels.write(space.to_slices(volume)[kept][mask].astype(np.float16).tobytes())
                if has_tissue:
                    classes = space.to_slices(_volume(subject.tissue))[kept][mask].astype(np.uint8)
                    with (folder / "tissue.u8").open("ab") as stream:
                        # Brain without a class still has to be told from background.
                        stream.write(np.maximum(classes, 1).tobytes())
                masks.append(np.packbits(mask.reshape(len(mask), -1), axis=1))
                counts.append(mask.sum((1, 2)))
                owners.append(np.full(len(mask), names.index(subject.name), dtype=np.int32))
        np.save(folder / "masks.npy", np.concatenate(masks))
        np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(np.concatenate(counts))]))
        np.save(folder / "owners.npy", np.concatenate(owners))
        (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        return cls(folder)

    def batch(self, index: np.ndarray, device: torch.device) -> Batch:
        """Slices `index` as a batch on `device`."""
        index = np.sort(index)  # the disk likes it, the loss does not mind
        brain = np.unpackbits(self.masks[index], axis=1, count=PIXELS).astype(bool)
        spans = [slice(self.starts[k], self.starts[k + 1]) for k in index]
        shape = (len(index), 1, space.CROP, space.CROP)
        slices = np.zeros(brain.shape, dtype=np.float32)
        slices[brain] = np.concatenate([self.pixels[span] for span in spans])
        tissue = None
        if self.tissue is not None:
            labels = np.zeros(brain.shape, dtype=np.int64)
            labels[brain] = np.concatenate([self.tissue[span] for span in spans])
            tissue = torch.from_numpy(labels.reshape(len(index), *shape[2:])).to(device)
        return Batch(
            torch.from_numpy(slices.reshape(shape)).to(device),
            torch.from_numpy(brain.reshape(shape)).to(device),
            tissue,
        )

    def split(self, fraction: float, held_out: float) -> tuple[np.ndarray, np.ndarray]:
        """Choose subjects to learn from, and set others aside.

        Which ones follows from their names alone. Of two fractions the smaller is part of the larger, and
        the same subjects are set aside for all.

        Parameters
        ----------
        fraction : float
            Of the subjects that are not set aside, the share that is learnt from; at least one.
        held_out : float
            Share of all subjects that is set aside.

        Returns
        -------
        training, aside : numpy.ndarray of int64
            Indices of slices, ascending.
        """
        order = sorted(range(len(self.names)), key=lambda k: _digest(self.names[k]))
        aside = order[: round(held_out * len(order))]
        others = order[len(aside) :]
        chosen = others[: max(1, round(fraction * len(others)))]
        return tuple(np.flatnonzero(np.isin(self.owners, part)) for part in (chosen, aside))

    def draw(
        self, among: np.ndarray, count: int, batch_size: int, rng: np.random.Generator, device: torch.device
    ) -> Iterator[Batch]:
        """Batches of `count` of the slices `among`, without replacement (all if there are fewer)."""
        chosen = rng.choice(among, min(count, len(among)), replace=False)
        for start in range(0, len(chosen), batch_size):
            yield self.batch(chosen[start : start + batch_size], device)


def _contents(subjects: Sequence[Subject], protocol: Protocol) -> str:
    """Tell one store from another by the names, sizes and times of its scans."""
    told = hashlib.sha256(protocol.name.encode())
    for subject in subjects:
        for path in (subject.image, subject.brain, subject.tissue):
            if path is not None:
                status = path.stat()
                told.update(f"{subject.name} {path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return told.hexdigest()[:12]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _volume(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)
