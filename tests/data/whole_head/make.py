"""Make the whole-head fixture: ``python tests/data/whole_head/make.py`` from the root of the repository.

The brain, its tumour and the signal of both scans come from :mod:`bids_uad.simulation`. Skull, scalp, eyes,
face and neck are drawn around it from distances and ellipsoids, and all is moved to scanner coordinates by a
known rigid transform. The files were made once and are kept; a change of the simulator requires no new ones.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_uad.simulation import deformation
from bids_uad.simulation.spatial import BOX_AFFINE, box_points
from bids_uad.simulation.subject import (
    Population,
    draw_subject_info,
    make_anatomy,
    make_signal,
)

FOLDER = Path(__file__).parent
SEED, INDEX = 23, 0
MARGINS = ((28, 28), (34, 34), (62, 22))
"""Voxels of 1 mm drawn around the simulator's box: right and left, front and back, below and above."""
CENTRE = np.array([-119.0, 107.0, 77.0])
POSE = ((6.0, -4.0, 8.0), (5.0, -12.0, 9.0))
"""Rotation (degrees about x, y, z) and position (mm) of the T1w scan."""
MOTION = ((1.5, 1.0, -2.0), (1.0, 2.0, -1.5))
"""Of the T2w scan against the T1w scan."""
GRIDS = {"T1w": ((120, 152, 140), (1.6, 1.6, 1.6)), "T2w": ((120, 152, 70), (1.6, 1.6, 3.2))}
"""Voxels and their size in mm."""
NOISE, BIAS, SCALE = 0.012, 0.3, 160.0
SIGNAL = {
    "T1w": {"fluid": 0.2, "bone": 0.05, "marrow": 0.45, "fat": 1.25, "muscle": 0.5, "cord": 0.9, "eye": 0.2},
    "T2w": {"fluid": 1.0, "bone": 0.03, "marrow": 0.4, "fat": 1.1, "muscle": 0.2, "cord": 0.35, "eye": 1.0},
}
"""Relative to the 99.5th percentile of the brain."""


def rigid(degrees: tuple[float, ...], shift: tuple[float, ...]) -> np.ndarray:
    """Rotate about the origin and shift; shape (4, 4)."""
    return nib.affines.from_matvec(Rotation.from_euler("xyz", degrees, degrees=True).as_matrix(), shift)


def anatomy_of_head(brain: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
    """Draw what surrounds a brain.

    Parameters
    ----------
    brain : numpy.ndarray of bool, three-dimensional, 1 mm
    affine : numpy.ndarray, shape (4, 4)

    Returns
    -------
    dict of str to numpy.ndarray of bool
        Masks in the order in which they are painted, the later over the earlier ones.
    """
    index = np.indices(brain.shape).reshape(3, -1)
    x, y, z = (affine[:3, :3] @ index + affine[:3, 3:] - CENTRE[:, None]).reshape(3, *brain.shape)
    middle = affine[:3, :3] @ np.array(ndimage.center_of_mass(brain)) + affine[:3, 3] - CENTRE
    x, y = x - middle[0], y - middle[1]

    def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
        return sum(((a - c) / r) ** 2 for a, c, r in zip((x, y, z), centre, radii, strict=True)) < 1

    # A convex surface around the brain: its sulci and fissures are fluid.
    closed = ndimage.distance_transform_edt(~brain) <= 14
    closed = ndimage.distance_transform_edt(closed) > 14
    outside = ndimage.distance_transform_edt(~(closed | brain))
    face = ellipsoid((0, 45, -70), (62, 52, 62)) & (y > -10)
    neck = (x / 56) ** 2 + ((y + 18) / 62) ** 2 < 1
    neck &= z < -45
    head = (outside <= 17) | face | neck
    depth = ndimage.distance_transform_edt(head)
    airway = ((x / 9) ** 2 + ((y - 22) / 7) ** 2 < 1) & (z < -62)
    cord = ((x / 7) ** 2 + ((y + 22) / 7) ** 2 < 1) & (z < -70)
    canal = ((x / 11) ** 2 + ((y + 22) / 11) ** 2 < 1) & (z < -66)
    eyes = ellipsoid((32, 68, -38), (12, 12, 12)) | ellipsoid((-32, 68, -38), (12, 12, 12))
    sinus = ellipsoid((0, 70, -52), (14, 14, 18))
    return {
        "muscle": head,
        "fat": head & (depth > 1.5) & (depth < 5.5),
        "bone": (outside <= 9.5) & head,
        "marrow": (outside > 5) & (outside <= 7) & (z > -25),
        "canal": canal,
        "cord": cord,
        "fluid": outside <= 3,
        "eye": eyes & (outside > 9.5),
        "air": (airway | sinus) & (outside > 9.5),
    }


def scan(
    image: np.ndarray, affine: np.ndarray, modality: str, to_world: np.ndarray, rng: np.random.Generator
) -> nib.Nifti1Image:
    """Acquire a scan on the grid of a modality: point spread, bias field and Rician noise; uint8."""
    shape, size = GRIDS[modality]
    grid = nib.affines.from_matvec(np.diag([-size[0], size[1], size[2]]), [0, 0, 0])
    grid[:3, 3] = -grid[:3, :3] @ ((np.array(shape) - 1) / 2)
    spread = np.sqrt(np.maximum(np.array(size) ** 2 - 1, 0)) / np.sqrt(8 * np.log(2))
    moved = resampled(ndimage.gaussian_filter(image, spread), affine, shape, grid, to_world)
    coarse = rng.normal(0, 1, (4, 4, 4))
    field = ndimage.zoom(coarse, [n / 4 for n in shape], order=3, grid_mode=True, mode="nearest")
    moved *= np.exp(BIAS * field / 3)
    noise = rng.normal(0, NOISE, (2, *shape))
    values = np.hypot(moved + noise[0], noise[1]) * SCALE
    return to_image(values.round().clip(0, 255).astype(np.uint8), grid)


def resampled(
    volume: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], grid: np.ndarray, to_world: np.ndarray
) -> np.ndarray:
    """Sample a volume at the voxels of a grid in scanner coordinates, linearly."""
    matrix = np.linalg.inv(affine) @ to_world @ grid
    return ndimage.affine_transform(volume.astype(np.float32), matrix[:3, :3], matrix[:3, 3], shape, order=1)


def to_image(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Wrap an array as an image in scanner coordinates."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    return image


def save(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image compressed, without a time stamp."""
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=9, mtime=0))


def best_rigid(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Fit the rigid transform from points to targets, shape (N, 3), by least squares (Kabsch 1976)."""
    centre, target = points.mean(axis=0), targets.mean(axis=0)
    u, _, vt = np.linalg.svd((targets - target).T @ (points - centre))
    rotation = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
    return nib.affines.from_matvec(rotation, target - rotation @ centre)


def main(folder: Path = FOLDER) -> None:
    """Write the scans, the masks and the transforms.

    The person differs from the template by a smooth deformation. A registration should find the rigid
    transform that brings the template closest to the person: fitted to the points of the template from which
    the simulator takes the tissue of each brain voxel.
    """
    torch.set_num_threads(1)
    world = Population(SEED, lesion_volume=(40.0, 40.0))
    sources: list[torch.Tensor] = []

    def recorded(*arguments: object, original=deformation.source_points, **options: object) -> torch.Tensor:
        sources.append(original(*arguments, **options))
        return sources[-1]

    with torch.no_grad(), mock.patch.object(deformation, "source_points", recorded):
        person = draw_subject_info(world, INDEX)
        anatomy = make_anatomy(world, INDEX, person, "tumour")
        signals = {m: make_signal(world, INDEX, person, anatomy, m)[0].numpy() for m in GRIDS}
    brain = np.pad(anatomy.brain.numpy(), MARGINS)
    affine = BOX_AFFINE @ nib.affines.from_matvec(np.eye(3), [-low for low, _ in MARGINS])
    lesion = np.pad((anatomy.lesion.share.numpy() > 0.5) & anatomy.brain.numpy(), MARGINS)
    parts = anatomy_of_head(brain, affine)
    to_sri24 = nib.affines.from_matvec(np.eye(3), CENTRE) @ rigid(*POSE)
    transforms = {"T1w": to_sri24, "T2w": to_sri24 @ rigid(*MOTION)}
    inside = anatomy.brain.numpy()
    from_template = best_rigid(*(points.double().numpy()[inside] for points in (sources[-1], box_points())))
    for number, (modality, signal) in enumerate(signals.items()):
        levels = SIGNAL[modality]
        image = np.zeros(brain.shape, dtype=np.float32)
        for name, mask in parts.items():
            image[mask] = levels.get({"canal": "fluid"}.get(name, name), 0.0)
        signal = signal / np.percentile(signal[anatomy.brain.numpy()], 99.5)
        image[brain] = np.pad(signal, MARGINS)[brain]
        rng = np.random.default_rng([SEED, number])
        acquired = scan(image, affine, modality, transforms[modality], rng)
        save(acquired, folder / f"{modality}.nii.gz")
        truths = {"brain": brain, "lesion": lesion} if modality == "T1w" else {}
        for name, mask in truths.items():
            shares = resampled(mask, affine, acquired.shape, acquired.affine, transforms[modality])
            save(to_image((shares > 0.5).astype(np.uint8), acquired.affine), folder / f"{name}_mask.nii.gz")
    record = {
        "scanner_to_head": {modality: matrix.tolist() for modality, matrix in transforms.items()},
        "template_to_head": from_template.tolist(),
    }
    text = json.dumps(record, indent=1)
    (folder / "transforms.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
