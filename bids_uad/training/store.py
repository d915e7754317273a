"""Memory-mapped slices of training scans."""

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
from bids_uad.engine.bundle import CORRECTED, Protocol
from bids_uad.files import remove_unfinished, temporary_folder
from bids_uad.methods.base import Batch, Scan

LOGGER = logging.getLogger(__name__)

MIN_BRAIN_PIXELS = 400
"""Slices with fewer brain pixels are not stored, except for preset ``paper``."""
HALF, SINGLE = "pixels.f16", "pixels.f32"
"""Names of the file of intensities in float16 and, for preset ``paper``, float32."""
PIXELS = space.CROP**2


@dataclass(frozen=True)
class TrainingScan:
    """Preprocessed scan for training, on the SRI24 grid.

    Parameters
    ----------
    image : pathlib.Path
        Preprocessed image.
    brain : pathlib.Path
        Brain mask.
    tissue : pathlib.Path, default=None
        Tissue classes.
    name : str, default=""
        Name of the subject; all scans of a subject are either held out or not.
    """

    image: Path
    brain: Path
    tissue: Path | None = None
    name: str = ""


class SliceStore:
    """Slices of many scans in memory-mapped files: intensities of brain pixels, and a bit mask of the brain.

    A scan takes about 4 MB (float16, and one more byte per pixel with tissue classes), so that 3,000 scans
    take 12 GB. For preset ``paper``, intensities are float32 and all slices with brain are stored (7 MB).

    Parameters
    ----------
    folder : pathlib.Path
        Folder written by :meth:`build`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.masks = np.load(folder / "masks.npy", mmap_mode="r")
        self.starts = np.load(folder / "starts.npy")
        self.owners = np.load(folder / "owners.npy")
        self.scans, self.numbers = np.load(folder / "places.npy")
        self.names = (folder / "names.txt").read_text(encoding="utf-8").splitlines()
        kind, name = (np.float32, SINGLE) if (folder / SINGLE).exists() else (np.float16, HALF)
        self.pixels = np.memmap(folder / name, kind, "r")
        tissue = folder / "tissue.u8"
        self.tissue = np.memmap(tissue, np.uint8, "r") if tissue.exists() else None
        self._complete = (folder / "complete").exists()

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def has_tissue(self) -> bool:
        """Whether all scans have tissue classes."""
        return self._complete

    @classmethod
    def open_or_build(cls, scans: Sequence[TrainingScan], parent: Path, protocol: Protocol) -> SliceStore:
        """Open the store of these scans, or build it if it does not exist.

        Parameters
        ----------
        scans : sequence of TrainingScan
            Scans to store.
        parent : pathlib.Path
            Folder of stores; each is named by a hash of its scans.
        protocol : Protocol
            Intensity scaling of the scans.

        Returns
        -------
        SliceStore
            Opened store.
        """
        folder = parent / f"slices-{_hash(scans, protocol)}"
        if not folder.is_dir():
            LOGGER.info("Storing the slices of %d scans in %s", len(scans), folder)
            remove_unfinished(parent)
            with temporary_folder(parent, folder.name) as unfinished:
                cls.build(scans, unfinished, protocol)
                try:
                    unfinished.rename(folder)
                except OSError:
                    if not folder.is_dir():  # another process may have written it first
                        raise
        return cls(folder)

    @classmethod
    def build(cls, scans: Sequence[TrainingScan], folder: Path, protocol: Protocol = CORRECTED) -> SliceStore:
        """Write the slices of scans to a folder.

        Parameters
        ----------
        scans : sequence of TrainingScan
            Scans to store.
        folder : pathlib.Path
            Folder of the store; created if missing, overwritten otherwise.
        protocol : Protocol, default=CORRECTED
            Intensity scaling of the scans.

        Returns
        -------
        SliceStore
            Slices with at least 400 brain pixels, or for preset ``paper`` one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        has_tissue = any(scan.tissue for scan in scans)
        for name in ("tissue.u8", "complete", HALF, SINGLE):
            (folder / name).unlink(missing_ok=True)
        if all(scan.tissue for scan in scans):
            (folder / "complete").touch()
        masks, counts, owners, places = [], [], [], []
        names = list(dict.fromkeys(scan.name for scan in scans))
        kind, name, fewest = (np.float16, HALF, MIN_BRAIN_PIXELS)
        if protocol.published:
            kind, name, fewest = np.float32, SINGLE, 1
        with (folder / name).open("wb") as pixels:
            for number, scan in enumerate(scans):
                volume, brain = protocol.prepare(_volume(scan.image), _volume(scan.brain) > 0)
                inside = space.to_slices(brain)
                kept = inside.sum((1, 2)) >= fewest
                mask = inside[kept]
                pixels.write(space.to_slices(volume)[kept][mask].astype(kind).tobytes())
                if has_tissue:
                    # Class 0 is background, so brain without a class becomes class 1. All voxels of a scan
                    # without classes are 0.
                    classes = np.zeros(int(mask.sum()), np.uint8)
                    if scan.tissue:
                        classes = space.to_slices(_volume(scan.tissue))[kept][mask].astype(np.uint8).clip(1)
                    with (folder / "tissue.u8").open("ab") as stream:
                        stream.write(classes.tobytes())
                masks.append(np.packbits(mask.reshape(len(mask), -1), axis=1))
                counts.append(mask.sum((1, 2)))
                owners.append(np.full(len(mask), names.index(scan.name), dtype=np.int32))
                places.append(np.stack([np.full(len(mask), number), np.flatnonzero(kept)]))
        np.save(folder / "masks.npy", np.concatenate(masks))
        np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(np.concatenate(counts))]))
        np.save(folder / "owners.npy", np.concatenate(owners))
        np.save(folder / "places.npy", np.concatenate(places, axis=1).astype(np.int32))
        (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        return cls(folder)

    def batch(self, index: np.ndarray, device: torch.device) -> Batch:
        """Return the slices `index`, in ascending order, as a batch on `device`."""
        index = np.sort(index)  # faster to read
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

    def scan(self, number: int) -> Scan:
        """Return all stored slices of a scan, at their places; the others are 0.

        Parameters
        ----------
        number : int
            Number of the scan, one of `scans`.

        Returns
        -------
        Scan
            Scan of shape (155, 224, 224).
        """
        index = np.flatnonzero(self.scans == number)
        batch = self.batch(index, torch.device("cpu"))
        where = torch.from_numpy(self.numbers[index].astype(np.int64))

        def whole(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            volume = torch.zeros((space.SHAPE[2], space.CROP, space.CROP), dtype=dtype)
            volume[where] = part.to(dtype)
            return volume

        known = batch.tissue is not None and bool(batch.tissue.any())
        tissue = whole(batch.tissue, torch.uint8) if known else None
        return Scan(whole(batch.slices[:, 0], torch.float32), whole(batch.brain[:, 0], torch.bool), tissue)

    def split(self, fraction: float, held_out: float) -> tuple[np.ndarray, np.ndarray]:
        """Split the subjects into training and held-out subjects by hashes of their names.

        The training subjects of a smaller fraction are a subset of those of a larger one, and the held-out
        subjects are the same for all fractions.

        Parameters
        ----------
        fraction : float
            Fraction of the other subjects that is used for training; at least one subject.
        held_out : float
            Fraction of all subjects that is held out.

        Returns
        -------
        training, held_out : numpy.ndarray of int64
            Indices of slices, ascending.
        """
        order = sorted(range(len(self.names)), key=lambda k: _digest(self.names[k]))
        excluded = order[: round(held_out * len(order))]
        others = order[len(excluded) :]
        chosen = others[: max(1, round(fraction * len(others)))]
        return tuple(np.flatnonzero(np.isin(self.owners, part)) for part in (chosen, excluded))

    def draw(
        self, among: np.ndarray, count: int, batch_size: int, rng: np.random.Generator, device: torch.device
    ) -> Iterator[Batch]:
        """Yield batches of at most `count` slices drawn from `among` without replacement."""
        chosen = rng.choice(among, min(count, len(among)), replace=False)
        for start in range(0, len(chosen), batch_size):
            yield self.batch(chosen[start : start + batch_size], device)


def _hash(scans: Sequence[TrainingScan], protocol: Protocol) -> str:
    """Hash the protocol and the names, paths, sizes and modification times of scans."""
    digest = hashlib.sha256(f"places {protocol.name}{' float32' * protocol.published}".encode())
    for scan in scans:
        for path in (scan.image, scan.brain, scan.tissue):
            if path is not None:
                status = path.stat()
                digest.update(f"{scan.name} {path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _volume(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)
