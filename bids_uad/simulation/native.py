"""Raw scans: a head somewhere in the scanner, on its own grid, in arbitrary units."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch

from bids_uad.images import make_image
from bids_uad.simulation.acquisition import (
    Protocol,
    add_rician_noise,
    bias_field,
    slice_matrix,
)
from bids_uad.simulation.anatomy import rotation
from bids_uad.simulation.spatial import (
    BOX_AFFINE,
    apply_axis,
    sample,
    smooth,
    tensor,
)
from bids_uad.simulation.subject import TISSUE_LABELS, Anatomy

NATIVE_SHAPE = (192, 224, 192)
HEAD_CENTRE = np.array([-119.0, 107.0, 77.0])


@dataclass(frozen=True)
class NativeScan:
    """A raw scan.

    Attributes
    ----------
    image : nibabel.Nifti1Image
        int16, RAS+, 1 mm in plane.
    lesion : nibabel.Nifti1Image or None
        uint8 mask on the same grid.
    tissue : nibabel.Nifti1Image or None
        uint8 labels of `subject.TISSUES` on the same grid, 0 outside the brain.
    drawn : dict
        Pose and units, for the record.
    """

    image: nib.Nifti1Image
    lesion: nib.Nifti1Image | None
    tissue: nib.Nifti1Image | None
    drawn: dict


def _rigid(angles: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Rigid transform from angles (degrees) and a shift (mm), shape (4, 4)."""
    turn = rotation(tensor(np.deg2rad(angles))).cpu().numpy()
    return nib.affines.from_matvec(turn, shift)


def native_scan(
    image: torch.Tensor,
    protocol: Protocol,
    anatomy: Anatomy,
    pose: np.random.Generator,
    rng: np.random.Generator,
    *,
    truth: bool,
) -> NativeScan:
    """Acquire a scan on its own grid.

    Parameters
    ----------
    image : torch.Tensor, shape (X, Y, Z)
        Noise-free signal on the box.
    protocol : Protocol
    anatomy : Anatomy
    pose : numpy.random.Generator
        Head position, the same for all scans of a session.
    rng : numpy.random.Generator
        Of this scan: motion since the first, bias field, noise, units.
    truth : bool
        Bring lesion and tissue to its grid, too.

    Returns
    -------
    NativeScan
    """
    session = _rigid(pose.normal(0.0, 4.0, 3), pose.normal(0.0, 4.0, 3))
    motion = _rigid(rng.normal(0.0, 0.7, 3), rng.normal(0.0, 1.0, 3))
    affine = nib.affines.from_matvec(np.eye(3), -(np.array(NATIVE_SHAPE) - 1) / 2)
    to_sri24 = nib.affines.from_matvec(np.eye(3), HEAD_CENTRE) @ session @ motion

    index = np.stack(np.meshgrid(*[np.arange(n) for n in NATIVE_SHAPE], indexing="ij"), -1).astype(np.float32)
    matrix = tensor(to_sri24 @ affine).float()
    points = tensor(index) @ matrix[:3, :3].T + matrix[:3, 3]
    top = float(torch.quantile(image[anatomy.brain][::17], 0.995))
    volumes = [(image / top).clamp_min(0) ** protocol.gamma, anatomy.brain.float()]
    if truth:
        labels = anatomy.tissue_labels()
        volumes += [(labels == tissue).float() for tissue in TISSUE_LABELS]
    if truth and anatomy.lesion is not None:
        volumes.append(anatomy.lesion.share)
    moved = sample(torch.stack(volumes), BOX_AFFINE, points)
    blur = protocol.blur if protocol.thickness == 1 else 0.0
    moved[0] = smooth(moved[0], (protocol.blur, protocol.blur, blur))
    moved[0] *= bias_field(rng, protocol.bias, NATIVE_SHAPE)
    if protocol.thickness > 1:
        thick = slice_matrix(NATIVE_SHAPE[2], protocol.thickness, 0.0)
        moved = apply_axis(moved, thick, 3)
        affine = affine @ nib.affines.from_matvec(
            np.diag([1, 1, protocol.thickness]), [0, 0, (protocol.thickness - 1) / 2]
        )
    brain = moved[1] > 0.5
    units = float(rng.uniform(500.0, 3000.0))
    scan = (add_rician_noise(moved[0], protocol.noise, rng) * brain * units).round().clamp(0, 32767)
    result = make_image(scan.to(torch.int16).cpu().numpy(), affine, np.int16)
    lesion = tissue = None
    if truth:
        shares = moved[2 : 2 + len(TISSUE_LABELS)]
        largest = shares.argmax(0) + TISSUE_LABELS[0]
        tissue = make_image((largest * brain).cpu().numpy(), affine, np.uint8)
    if truth and anatomy.lesion is not None:
        lesion = make_image(((moved[-1] > 0.5) & brain).cpu().numpy(), affine, np.uint8)
    return NativeScan(result, lesion, tissue, {"units": units, "native_to_sri24": to_sri24.tolist()})
