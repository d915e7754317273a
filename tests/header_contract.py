"""What the header of every written NIfTI-1 file must hold, read from its bytes without nibabel."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

TYPES = {2: "uint8", 8: "int32", 16: "float32"}
"""NIfTI-1 codes of the data types that are written."""
FORMS_APART_MM = 0.2
"""Rounding of a quaternion in single precision, at the corners of a head."""


def read_header(path: Path) -> bytes:
    """Read the first 352 bytes of a `.nii` or `.nii.gz` file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        return stream.read(352)


def sform(header: bytes) -> np.ndarray:
    """Give the sform as it is stored, shape (3, 4), float32."""
    return np.frombuffer(header[280:328], "<f4").reshape(3, 4)


def qform(header: bytes) -> np.ndarray:
    """Compute the qform of the NIfTI-1 standard ("method 2"), shape (3, 4), float64."""
    b, c, d, *offset = (float(x) for x in struct.unpack("<6f", header[256:280]))
    factor, *zooms = (float(x) for x in struct.unpack("<4f", header[76:92]))
    a = np.sqrt(max(1.0 - b * b - c * c - d * d, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    scale = np.array(zooms) * [1.0, 1.0, -1.0 if factor < 0 else 1.0]
    return np.column_stack([rotation * scale, offset])


def header_faults(path: Path) -> list[str]:
    """List in what the header of a file breaks the contract; empty if in nothing."""
    header = read_header(path)
    size, datatype, units = (
        struct.unpack("<i", header[:4])[0],
        struct.unpack("<h", header[70:72])[0],
        header[123],
    )
    qform_code, sform_code = struct.unpack("<2h", header[252:256])
    shape = np.array(struct.unpack("<3h", header[42:48]))
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    difference = sform(header).astype(float) - qform(header)
    apart = np.linalg.norm(difference[:, :3] @ corners + difference[:, 3:], axis=0).max()
    checks = {
        f"is not NIfTI-1, little-endian (size of header {size})": size == 348,
        f"has data type {datatype}": datatype in TYPES,
        f"is scaled: {struct.unpack('<2f', header[112:120])}": struct.unpack("<2f", header[112:120])
        == (1, 0),
        f"is in units {units}": units == 2,  # mm, and no unit of time
        f"has the codes {qform_code} and {sform_code}": qform_code == sform_code > 0,
        f"has forms that are {apart} mm apart": apart < FORMS_APART_MM,
    }
    return [f"{path.name} {fault}" for fault, holds in checks.items() if not holds]


def faults_below(folder: Path) -> list[str]:
    """List the faults of all images of a dataset."""
    images = sorted(path for path in folder.rglob("*.nii*") if path.is_file())
    assert images, f"no image in {folder}"
    return [fault for path in images for fault in header_faults(path)]
