"""The one door to ANTs: single-threaded, seeded, and with arrays at both ends.

With one thread and a seed every ANTs step repeats bit for bit; with two, registration wanders by a
hundredth of a millimetre. The environment is read when ITK is loaded, so the import happens here and
nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ants import ANTsImage

SEED = "20251201"


def load_ants() -> ModuleType:
    """Import antspyx with one thread and a fixed seed.

    Returns
    -------
    module
        ``ants``
    """
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    os.environ["ANTS_RANDOM_SEED"] = SEED
    import ants

    return ants


@contextmanager
def plain_names(paths: Sequence[str]) -> Iterator[list[str]]:
    """Give files names that ANTs can read, whatever their paths hold.

    ANTs takes commas and brackets in a path for its own syntax. The files are linked to from a temporary
    folder, which is the working directory of the process meanwhile.

    Parameters
    ----------
    paths : sequence of str

    Yields
    ------
    list of str
        Names without a folder, with the endings of the files.
    """
    targets = [Path(path).absolute() for path in paths]
    with TemporaryDirectory() as folder, chdir(folder):
        names = [f"{number}{''.join(target.suffixes)}" for number, target in enumerate(targets)]
        for name, target in zip(names, targets, strict=True):
            Path(name).symlink_to(target)
        yield names


def to_ants(volume: np.ndarray, affine: np.ndarray) -> ANTsImage:
    """Make an ANTs image of an array.

    Parameters
    ----------
    volume : numpy.ndarray, three-dimensional
    affine : numpy.ndarray, shape (4, 4)
        Voxel-to-world (RAS+, mm), without shear.

    Returns
    -------
    ants.ANTsImage
        Pixel type float.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return load_ants().from_numpy(
        np.ascontiguousarray(volume, dtype=np.float32),
        origin=lps[:3, 3].tolist(),
        spacing=spacing.tolist(),
        direction=lps[:3, :3] / spacing,
    )
