"""Installation of the SRI24 atlas from a downloaded package.

``bids_uad atlas FILE ARCHIVE``. The atlas (Rohlfing et al. 2010,
doi:10.1002/hbm.20906) is distributed by NITRC (https://www.nitrc.org/projects/sri24) in several packages
whose headers differ: a trailing axis, no qform, other origins, voxels in LAS order. They are converted to a
TemplateFlow ``tpl-SRI24`` folder, and identified by the checksum of their voxels.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from bids_uad import space
from bids_uad.config import Parser
from bids_uad.errors import InputError
from bids_uad.files import write_json, write_text, write_tsv
from bids_uad.images import save_image
from bids_uad.preprocessing.reference import resolve_reference, voxel_sha256
from bids_uad.preprocessing.registration import dice

LOGGER = logging.getLogger("bids_uad")

FOLDER = "tpl-SRI24"
KNOWN = {
    "80767d1b6559bf2675e9e229a9d1e1b83d1f5618446b6c44764b42c60609adfe": "NITRC, skull-stripped SPGR channel"
}
"""Known packages by the SHA-256 of the T1w channel's voxels on the SRI24 grid."""
MIN_OVERLAP = 0.9
"""Dice of the brain mask and the stand-in's brain mask below which an image is refused."""
CHANNELS = {
    "desc-brain_T1w": ("spgr", "t1_brain", "spgr_brain"),
    "desc-brain_T2w": ("late", "t2_brain", "late_brain"),
    "desc-brain_PDw": ("erly", "pd_brain", "erly_brain"),
    "desc-tissues_dseg": ("tissues",),
    "atlas-LPBA40_dseg": ("lpba40",),
    "atlas-TZO116plus_dseg": ("tzo116plus",),
}
"""File names in the packages (without suffix) by the entities of the installed file."""
TZO_NAMES = re.compile(r"tzo116plus.*\.txt$", re.IGNORECASE)
LPBA40 = {
    21: "superior frontal gyrus",
    23: "middle frontal gyrus",
    25: "inferior frontal gyrus",
    27: "precentral gyrus",
    29: "middle orbitofrontal gyrus",
    31: "lateral orbitofrontal gyrus",
    33: "gyrus rectus",
    41: "postcentral gyrus",
    43: "superior parietal gyrus",
    45: "supramarginal gyrus",
    47: "angular gyrus",
    49: "precuneus",
    61: "superior occipital gyrus",
    63: "middle occipital gyrus",
    65: "inferior occipital gyrus",
    67: "cuneus",
    81: "superior temporal gyrus",
    83: "middle temporal gyrus",
    85: "inferior temporal gyrus",
    87: "parahippocampal gyrus",
    89: "lingual gyrus",
    91: "fusiform gyrus",
    101: "insular cortex",
    121: "cingulate gyrus",
    161: "caudate",
    163: "putamen",
    165: "hippocampus",
}
"""Left regions of the LONI Probabilistic Brain Atlas (Shattuck et al. 2008); right is the label + 1."""
UNPAIRED = {181: "cerebellum", 182: "brainstem"}

LICENCE = """The SRI24 atlas
T. Rohlfing, N. M. Zahr, E. V. Sullivan and A. Pfefferbaum. The SRI24 multichannel atlas of normal adult human
brain structure. Human Brain Mapping 31(5):798-819, 2010. doi:10.1002/hbm.20906
https://www.nitrc.org/projects/sri24

Licence: Creative Commons Attribution-ShareAlike 3.0 Unported, https://creativecommons.org/licenses/by-sa/3.0/

Changes: trailing axes dropped, voxels stored in LPS order, header rewritten, brain mask derived from the T1w
channel. The same licence applies to these files.
"""


def install_atlas(source: Path, archive: Path) -> Path:
    """Convert a downloaded SRI24 package to the archive that ``--atlas-dir`` expects.

    Parameters
    ----------
    source : pathlib.Path
        Zip file, or folder, with the skull-stripped channels (``spgr`` and so on, or ``T1_brain``); the
        parcellations (``lpba40``, ``tzo116plus``) are installed if they are there.
    archive : pathlib.Path
        Folder in which ``tpl-SRI24`` is created.

    Returns
    -------
    pathlib.Path
        The ``tpl-SRI24`` folder.

    Raises
    ------
    InputError
        If ``tpl-SRI24`` exists already, or the source has no skull-stripped T1w channel, or its voxels are
        not those of the SRI24 grid or brain.
    """
    target = archive / FOLDER
    if target.exists():
        raise InputError(target, "exists already", "remove it, or choose another archive")
    archive.mkdir(parents=True, exist_ok=True)
    with _unpacked(source) as files, tempfile.TemporaryDirectory(dir=archive) as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        channels = {name: path for name in CHANNELS if (path := _find(files, CHANNELS[name])) is not None}
        if "desc-brain_T1w" not in channels:
            raise InputError(
                source,
                "no skull-stripped T1w channel (spgr.nii or T1_brain.nii)",
                "download the skull-stripped package from https://www.nitrc.org/projects/sri24",
            )
        volumes = {name: read_on_grid(path) for name, path in channels.items()}
        checksum = voxel_sha256(volumes["desc-brain_T1w"])
        mask = ndimage.binary_fill_holes(volumes["desc-brain_T1w"] > 0)
        _check_brain(channels["desc-brain_T1w"], mask, Path(scratch))
        if checksum not in KNOWN:
            LOGGER.warning(
                "%s: unknown version of the T1w channel (SHA-256 of its voxels %s)", source, checksum
            )
        for name, volume in volumes.items():
            dtype = np.int32 if name.endswith("dseg") else np.float32
            save_image(space.to_image(volume, dtype), folder / f"{FOLDER}_res-1_{name}.nii.gz")
        save_image(space.to_image(mask, np.uint8), folder / f"{FOLDER}_res-1_desc-brain_mask.nii.gz")
        _write_names(folder, files, set(volumes))
        write_text(folder / "LICENSE", LICENCE)
        write_json(folder / "template_description.json", _description(checksum))
        os.replace(folder, target)
    return target


def read_on_grid(path: Path) -> np.ndarray:
    """Read a channel and reorder its voxels to the SRI24 grid; the origin in its header is ignored.

    Parameters
    ----------
    path : pathlib.Path
        NIfTI file.

    Returns
    -------
    numpy.ndarray, shape (240, 240, 155)
        Intensities or labels in LPS order.

    Raises
    ------
    InputError
        If shape or voxel size are not those of the SRI24 grid.
    """
    image = nib.load(path)
    data = np.asarray(image.dataobj)
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    order = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.io_orientation(space.AFFINE)
    )
    data = nib.orientations.apply_orientation(data, order)
    zooms = nib.affines.voxel_sizes(image.affine)
    if data.shape != space.SHAPE or not np.allclose(zooms, 1.0, atol=1e-3):
        size = " x ".join(str(n) for n in data.shape)
        millimetres = " x ".join(f"{zoom:g}" for zoom in zooms)
        raise InputError(
            path,
            f"has {size} voxels of {millimetres} mm, not 240 x 240 x 155 of 1 mm",
            "use a package on the original grid",
        )
    return data


@contextmanager
def _unpacked(source: Path) -> Iterator[list[Path]]:
    """List the files of a folder or an unpacked zip file."""
    if source.is_dir():
        yield sorted(path for path in source.rglob("*") if path.is_file())
        return
    if not zipfile.is_zipfile(source):
        raise InputError(source, "neither a folder nor a zip file", "use the package as it was downloaded")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(source) as package:
            package.extractall(folder)
        yield sorted(path for path in Path(folder).rglob("*") if path.is_file())


def _find(files: list[Path], names: tuple[str, ...]) -> Path | None:
    """Find a channel by its names in the packages."""
    for name in names:
        for path in files:
            if path.name.lower() in (f"{name}.nii", f"{name}.nii.gz"):
                return path
    return None


def _check_brain(path: Path, mask: np.ndarray, scratch: Path) -> None:
    """Raise an error if the brain mask differs from that of the stand-in in shape or position."""
    stand_in = nib.load(resolve_reference(None, scratch / "stand-in").brain_mask)
    expected = np.asarray(stand_in.dataobj) > 0
    overlap = dice(mask, expected)
    if overlap < MIN_OVERLAP:
        raise InputError(
            path,
            f"Dice of only {overlap:.2f} with the brain on the SRI24 grid",
            "use the skull-stripped channel in the orientation of its header",
        )


def _write_names(folder: Path, files: list[Path], volumes: set[str]) -> None:
    """Write the lookup tables of the parcellations."""
    if "atlas-LPBA40_dseg" in volumes:
        names = {index + side: f"{label} {name}" for index, name in LPBA40.items() for side, label in _SIDES}
        _write_table(folder, "LPBA40", names | UNPAIRED)
    text = next((path for path in files if TZO_NAMES.search(path.name)), None)
    if "atlas-TZO116plus_dseg" in volumes and text is not None:
        rows = [line.split() for line in text.read_text(encoding="utf-8", errors="replace").splitlines()]
        _write_table(
            folder, "TZO116plus", {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].isdigit()}
        )


_SIDES = ((0, "left"), (1, "right"))


def _write_table(folder: Path, atlas: str, names: dict[int, str]) -> None:
    table = pd.DataFrame({"index": list(names), "name": list(names.values())})
    write_tsv(folder / f"{FOLDER}_res-1_atlas-{atlas}_dseg.tsv", table)


def _description(checksum: str) -> dict[str, object]:
    return {
        "Name": "SRI24 multichannel atlas of normal adult human brain structure (skull-stripped)",
        "BIDSVersion": "1.10.0",
        "Identifier": "SRI24",
        "License": "CC BY-SA 3.0",
        "ReferencesAndLinks": ["https://doi.org/10.1002/hbm.20906", "https://www.nitrc.org/projects/sri24"],
        "SHA256": checksum,
        "Version": KNOWN.get(checksum, "unknown"),
    }


def build_parser() -> Parser:
    """Build the parser of ``bids_uad atlas``."""
    parser = Parser(
        prog="bids_uad atlas", description="Install the SRI24 atlas from a file downloaded from NITRC."
    )
    parser.add_argument("source", type=Path, help="downloaded zip file or folder")
    parser.add_argument("archive", type=Path, help="folder for tpl-SRI24, the value of --atlas-dir")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Install the atlas; exit code 0, or 66 if the source cannot be used."""
    args = build_parser().parse_args(arguments)
    try:
        folder = install_atlas(args.source, args.archive)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Installed {folder}; use it with --atlas-dir {args.archive}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
