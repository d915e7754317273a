"""Tissue priors of the built-in atlas, averaged over label maps: ``python -m bids_uad.simulation.atlas``.

Label maps are registered rigidly, as scans are, so that the priors contain the variability of brain size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bids_uad import space
from bids_uad.files import write_json
from bids_uad.images import make_image, save_image
from bids_uad.simulation.anatomy import CLASSES, TissueMaps, find_label_maps, label_map_source
from bids_uad.simulation.spatial import sample, smooth, tensor

MEMBERS = {
    "csf": ("csf",),
    "ventricle": ("ventricle", "choroid"),
    "cortex": ("cortex", "cerebellar_cortex"),
    "white": ("white", "cerebellar_white"),
    "deep": ("thalamus", "striatum", "pallidum", "hippocampus"),
    "brainstem": ("brainstem",),
}
"""Classes of anatomy of each tissue of `space.TISSUES`; `hippocampus` includes the amygdala."""
SIGMA_MM = 2.0
"""Standard deviation of the Gaussian that smooths each label map: two thirds of the spacing of the grid."""


def grid_points() -> torch.Tensor:
    """Compute the world coordinates (mm) of the grid of the atlas, shape (*space.PRIOR_SHAPE, 3)."""
    affine = space.PRIOR_AFFINE
    axes = [affine[axis, 3] + affine[axis, axis] * np.arange(n) for axis, n in enumerate(space.PRIOR_SHAPE)]
    return tensor(np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32))


def average_tissues(sources: Sequence[TissueMaps]) -> np.ndarray:
    """Average tissue maps to probabilities that are symmetric about the midplane of SRI24.

    Parameters
    ----------
    sources : sequence of TissueMaps
        Tissue maps in SRI24 space of about 1 mm. In maps without the class `csf`, voxels without tissue
        are fluid with the probability that this has in the other maps.

    Returns
    -------
    numpy.ndarray of float32, shape (len(space.TISSUES), *space.PRIOR_SHAPE)
        Probabilities, with a sum of at most 1.

    Raises
    ------
    ValueError
        If no map has the class `csf`.
    """
    points = grid_points()
    tissue = torch.zeros(len(space.TISSUES) - 1, *space.PRIOR_SHAPE)
    fluid, around = torch.zeros(2, *space.PRIOR_SHAPE)
    for source in sources:
        maps = torch.stack(
            [sum(source.fractions[CLASSES.index(name)] for name in MEMBERS[key]) for key in space.TISSUES]
        )
        spacing = np.linalg.norm(source.affine[:3, :3], axis=0)
        maps = sample(smooth(maps, tuple(SIGMA_MM / spacing)), source.affine, points)
        tissue += maps[1:]
        if source.fractions[CLASSES.index("csf")].any():
            fluid += maps[0]
            around += 1 - maps[1:].sum(0)
    if not fluid.any():
        raise ValueError("no label map has cerebrospinal fluid around the brain")
    tissue /= len(sources)
    csf = fluid / around.clamp(min=1e-6) * (1 - tissue.sum(0))
    priors = torch.cat([csf[None], tissue]).clamp(0, 1)
    return ((priors + priors.flip(1)) / 2).cpu().numpy()


def write_tissues(priors: np.ndarray, names: Sequence[str], folder: Path) -> Path:
    """Write tissue priors and their sidecar.

    Parameters
    ----------
    priors : numpy.ndarray, shape (len(space.TISSUES), *space.PRIOR_SHAPE)
        Probabilities.
    names : sequence of str
        Names of the label maps.
    folder : pathlib.Path
        Folder of the files.

    Returns
    -------
    pathlib.Path
        The image, in percent.
    """
    path = folder / space.TISSUE_FILE
    image = make_image(np.rint(np.moveaxis(priors, 0, -1) * 100), space.PRIOR_AFFINE, np.uint8, code=2)
    folder.mkdir(parents=True, exist_ok=True)
    save_image(image, path)
    write_json(
        path.with_name(path.name.replace(".nii.gz", ".json")),
        {
            "Description": "Tissue probabilities in SRI24 space, smoothed, in percent",
            "Channels": {name: list(MEMBERS[name]) for name in space.TISSUES},
            "Method": "Label maps registered rigidly to SRI24, smoothed with a Gaussian (standard deviation "
            f"{SIGMA_MM:g} mm), averaged, and made symmetric about the midplane of the SRI24 grid",
            "LabelMaps": list(names),
            "License": "Apache-2.0, as the label maps of SynthSeg and SynthSR (see NOTICE)",
            "GeneratedBy": "python -m bids_uad.simulation.atlas",
        },
    )
    return path


def main(argv: list[str] | None = None) -> int:
    """Build the atlas from label maps.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit code 0.
    """
    parser = argparse.ArgumentParser(prog="python -m bids_uad.simulation.atlas", description=__doc__)
    parser.add_argument("labelmaps", nargs="+", help="label maps, or folders of *_dseg.nii.gz")
    parser.add_argument("--out", type=Path, default=Path(space.__file__).parent / "data" / "atlas")
    args = parser.parse_args(argv)
    sources = [label_map_source(path) for path in find_label_maps(args.labelmaps)]
    print(write_tissues(average_tissues(sources), [source.name for source in sources], args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
