"""What is already done: one small file for each image, written when everything about it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bids_uad import __version__
from bids_uad.atomic import write_json
from bids_uad.dataset.lesions import LesionMask
from bids_uad.dataset.units import ImageUnit
from bids_uad.errors import unreadable
from bids_uad.preprocessing.extraction import Extraction


@dataclass(frozen=True)
class Record:
    """An image that was processed.

    Parameters
    ----------
    key : str
        Name of the image.
    run_id : str
        The run that finished it last.
    fingerprint : dict
        What the outputs depend on, models apart.
    models : dict of str to str
        Identity of each model by name.
    outputs : list of str
        Files written, relative to the dataset.
    """

    key: str
    run_id: str
    fingerprint: dict[str, Any]
    models: dict[str, str] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


def record_path(output_dir: Path, unit: ImageUnit) -> Path:
    """Say where the record of an image lies."""
    return output_dir / unit.session_folder / "log" / f"{unit.key}.json"


def write_record(path: Path, record: Record) -> Path:
    """Write a record atomically."""
    return write_json(path, asdict(record))


def read_record(path: Path) -> Record | None:
    """Read a record; none if there is none, or if it is of another make.

    A record that cannot be understood only means that the image is processed again.
    """
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        return None


def make_fingerprint(
    unit: ImageUnit,
    lesion: LesionMask | None,
    *,
    reference_sha256: str,
    random_seed: int,
    extraction: Extraction,
) -> dict[str, Any]:
    """List what the outputs of an image depend on, models apart.

    The device and the number of processes are left out on purpose: an interrupted run may go on elsewhere.

    Parameters
    ----------
    unit : ImageUnit
    lesion : LesionMask or None
        The lesion mask that belongs to the image.
    reference_sha256 : str
    random_seed : int
    extraction : Extraction
        What finds brains in whole heads.

    Returns
    -------
    dict
        JSON types only.
    """
    return {
        "app_version": __version__,
        "input_sha256": sha256_of(unit.path),
        "anchor": None if unit.anchor is None else unit.anchor.key,
        "anchor_sha256": None if unit.anchor is None else sha256_of(unit.anchor.path),
        "lesion_sha256": [] if lesion is None else [sha256_of(path) for path in lesion.files],
        "lesion_provider": None if lesion is None else [lesion.provider, lesion.output.name],
        "prepared_sha256": _prepared(unit),
        "anchor_prepared_sha256": None if unit.anchor is None else _prepared(unit.anchor),
        "skull_stripped": unit.skull_stripped,
        "reference_sha256": reference_sha256,
        "random_seed": random_seed,
        "brain_extraction": [extraction.program, *map(sha256_of, extraction.files)],
    }


def _prepared(unit: ImageUnit) -> list[str]:
    """Checksums of what another pipeline has done for an image."""
    return [sha256_of(path) for path in unit.prepared.files]


def is_whole(record: Record, output_dir: Path) -> bool:
    """Say whether every file of a record is there and not empty."""
    return all(_has_content(output_dir / name) for name in record.outputs)


@cache
def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes; inputs do not change during a run.

    Raises
    ------
    InputError
        If the file cannot be read, for example because it was removed.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
