"""Small BIDS datasets made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (24, 24, 24)
AFFINE = np.array([[8.0, 0, 0, -92], [0, 8.0, 0, -92], [0, 0, 8.0, -92], [0, 0, 0, 1]])


def write_dataset(root: Path, files: dict[str, dict | None]) -> Path:
    """Write images (path below root: sidecar or None) and a dataset description."""
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": "Phantoms", "BIDSVersion": "1.9.0", "License": "CC0", "Authors": ["A. One"]}
    (root / "dataset_description.json").write_text(json.dumps(description))
    for name, sidecar in files.items():
        write_image(root / name)
        if sidecar is not None:
            path = root / name
            path.with_name(path.name.split(".")[0] + ".json").write_text(json.dumps(sidecar))
    return root


def write_image(path: Path, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE) -> Path:
    """Write a blob; the content depends on the name, so that no two files are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(sum(path.name.encode()))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    blob = np.where((grid**2).sum(axis=0) < 0.7, 100 + random.normal(0, 5, shape), 0)
    nib.save(nib.Nifti1Image(np.clip(blob, 0, 200).astype(np.float32), affine), path)
    return path


def write_mask(path: Path, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE) -> Path:
    """Write a binary mask with a small cube in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(shape, dtype=np.uint8)
    data[tuple(slice(size // 2 - 1, size // 2 + 1) for size in shape)] = 1
    nib.save(nib.Nifti1Image(data, affine), path)
    return path
