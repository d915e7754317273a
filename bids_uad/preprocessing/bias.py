"""Bias-field correction with N4."""

from __future__ import annotations

import numpy as np

from bids_uad.preprocessing.antspy import load_ants, to_ants
from bids_uad.preprocessing.registration import Volume
from bids_uad.preprocessing.resampling import isotropic, resample

FIELD_SPACING_MM = 5.0
ITERATIONS = (40, 40, 40)
"""Per level. One span of the spline covers the brain at first and a quarter of it (40 mm) at the third
level; a fourth would be fine enough to swallow the contrast of a large lesion."""


def correct_bias(
    volume: np.ndarray, affine: np.ndarray, mask: np.ndarray, iterations: tuple[int, ...] = ITERATIONS
) -> np.ndarray:
    """Divide a scan by its smooth bias field, estimated inside a mask on 5 mm voxels.

    N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908). The scan is averaged, within the mask, to
    isotropic 5 mm voxels rather than subsampled by a shrink factor: thick slices keep their detail in the
    plane, and the few voxels left are less noisy. It is cropped to the mask, so that the spline's knots do
    not depend on how much air the scan holds. The field comes back to the full grid by linear interpolation
    of its logarithm.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
        Raw intensities; negative ones are set to 0.
    affine : numpy.ndarray, shape (4, 4)
    mask : numpy.ndarray of bool
        Same shape; where the field is estimated. The correction is applied to the whole volume.
    iterations : tuple of int
        Most iterations per level of the spline.

    Returns
    -------
    numpy.ndarray of float32
        Corrected intensities, with the median inside the mask kept.

    Raises
    ------
    ValueError
        If most of the mask has no signal.
    """
    ants = load_ants()
    volume = np.maximum(np.asarray(volume, dtype=np.float32), 0.0)
    typical = float(np.median(volume[mask]))
    if not typical > 0:
        raise ValueError("most of the mask has no signal")
    weight, coarse_affine = isotropic(mask, affine, FIELD_SPACING_MM)
    total, _ = isotropic(np.where(mask, volume, 0.0), affine, FIELD_SPACING_MM)
    region = weight > 0.5
    # A fixed median makes the logarithm of N4 independent of the scanner's units.
    coarse = np.divide(total * (100.0 / typical), weight, out=np.zeros_like(total), where=region)
    box = Volume(coarse, coarse_affine, region).cropped(1)
    field = ants.n4_bias_field_correction(
        to_ants(box.data, box.affine),
        mask=to_ants(box.mask, box.affine),
        shrink_factor=1,
        convergence={"iters": list(iterations), "tol": 1e-6},
        return_bias_field=True,
    ).numpy()
    logarithm = np.log(np.maximum(field, 1e-3))
    full = resample(logarithm, box.affine, volume.shape, affine, extend=True)
    corrected = volume / np.exp(full)
    return (corrected * (typical / float(np.median(corrected[mask])))).astype(np.float32)
