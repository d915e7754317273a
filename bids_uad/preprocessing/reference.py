"""Reference image of the SRI24 space: the SRI24 atlas, or a stand-in made from the ICBM152 template."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from bids_uad import space
from bids_uad.dataset.naming import entities_of
from bids_uad.errors import InputError
from bids_uad.files import write_json
from bids_uad.images import save_image
from bids_uad.preprocessing.check import read_volume
from bids_uad.preprocessing.resampling import resample

STAND_IN = "ICBM152 on the SRI24 grid"
_ATLAS_FILES = {"t1w": ("T1w", "brain"), "t2w": ("T2w", "brain"), "brain_mask": ("mask", "brain")}
_ICBM_LICENCE = (
    "Copyright Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, "
    "McGill University; use, copying, modification and distribution are permitted where this notice is kept"
)


@dataclass(frozen=True)
class Reference:
    """Images that define the space of all outputs, on the SRI24 grid.

    Attributes
    ----------
    t1w : pathlib.Path
        Skull-stripped T1w image.
    t2w : pathlib.Path or None
        Skull-stripped T2w image, if the atlas has one.
    brain_mask : pathlib.Path
        Brain mask.
    name : str
        Name in reports.
    source : str
        Origin of the images, without paths: name of the atlas folder, or origin of the stand-in.
    licence : str
        Licence of the images.
    sha256 : str
        :func:`voxel_sha256` of the T1w image, which does not depend on the compression of the file.
    metadata : dict, default={}
        Fields for sidecars and the run record.
    parcellations : dict of str to pathlib.Path, default={}
        Label images of the atlas by name, each with a ``.tsv`` with columns `index` and `name` beside it.
    """

    t1w: Path
    t2w: Path | None
    brain_mask: Path
    name: str
    source: str
    licence: str
    sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)
    parcellations: dict[str, Path] = field(default_factory=dict)


def resolve_reference(
    atlas_dir: str | os.PathLike[str] | None, cache_dir: str | os.PathLike[str]
) -> Reference:
    """Find the reference images, without downloads.

    In this order: `atlas_dir`; ``tpl-SRI24`` under ``TEMPLATEFLOW_HOME`` if its files are not empty; the
    stand-in, which is nilearn's ICBM152 template resampled to the SRI24 grid.

    Parameters
    ----------
    atlas_dir : path-like or None
        TemplateFlow archive with ``tpl-SRI24``, or that folder itself. May be read-only.
    cache_dir : path-like
        Folder in which the stand-in is written once.

    Returns
    -------
    Reference
        Paths, checksum and metadata.

    Raises
    ------
    bids_uad.errors.InputError
        If `atlas_dir` has no usable SRI24 atlas.
    """
    if atlas_dir is not None:
        return _from_atlas(Path(atlas_dir))
    home = os.environ.get("TEMPLATEFLOW_HOME")
    # TemplateFlow creates empty placeholder files before any download.
    if home and _has_content(Path(home) / "tpl-SRI24"):
        return _from_atlas(Path(home))
    return _stand_in(Path(cache_dir))


def write_template(reference: Reference, out_dir: str | os.PathLike[str]) -> Path:
    """Write the reference images into the outputs, which makes their ``SpatialReference`` resolvable.

    Several processes may do this at once: files are written atomically, with identical bytes.

    Parameters
    ----------
    reference : Reference
        Images to write.
    out_dir : path-like
        Root of the derivative dataset.

    Returns
    -------
    pathlib.Path
        The T1w image under ``tpl-SRI24/anat``.
    """
    folder = Path(out_dir) / "tpl-SRI24" / "anat"
    common = {
        "SpatialReference": "bids::tpl-SRI24/anat/tpl-SRI24_desc-brain_T1w.nii.gz",
        "License": reference.licence,
        "ReferenceName": reference.name,
        "ReferenceSource": reference.source,
        "ReferenceSHA256": reference.sha256,
    }
    target = folder / "tpl-SRI24_desc-brain_T1w.nii.gz"
    images = {
        target: (reference.t1w, "T1w"),
        folder / "tpl-SRI24_desc-brain_T2w.nii.gz": (reference.t2w, "T2w"),
    }
    for path, (source, suffix) in images.items():
        if source is None:
            continue
        description = f"Skull-stripped {suffix} reference image of the space of these derivatives"
        _write(source, path, np.float32, {"Description": description, "SkullStripped": True, **common})
    _write(
        reference.brain_mask,
        folder / "tpl-SRI24_desc-brain_mask.nii.gz",
        np.uint8,
        {
            "Description": "Brain mask of the reference image",
            "Type": "Brain",
            "Sources": [common["SpatialReference"]],
            **common,
        },
    )
    return target


def _from_atlas(root: Path) -> Reference:
    root = root.parent if root.name == "tpl-SRI24" else root
    folder = root / "tpl-SRI24"
    remedy = "set --atlas-dir to a TemplateFlow archive with tpl-SRI24, or leave it out for the stand-in"
    if not folder.is_dir():
        raise InputError(folder, "no SRI24 atlas in this folder", remedy)
    images = {key: _find_image(folder, suffix, desc) for key, (suffix, desc) in _ATLAS_FILES.items()}
    for key in ("t1w", "brain_mask"):
        if images[key] is None:
            raise InputError(
                folder, f"the SRI24 atlas has no desc-brain {_ATLAS_FILES[key][0]} image", remedy
            )
    data = {key: _read_on_grid(path) for key, path in images.items() if path is not None}
    description = _description(folder)
    licence = str(description.get("License", "not stated"))
    checksum = voxel_sha256(data["t1w"])
    name = str(description.get("Name", "SRI24"))
    return Reference(
        t1w=images["t1w"],
        t2w=images["t2w"],
        brain_mask=images["brain_mask"],
        name=name,
        source="TemplateFlow archive, tpl-SRI24",
        licence=licence,
        sha256=checksum,
        metadata={"Name": name, "License": licence, "SHA256": checksum, "StandIn": False},
        parcellations=_parcellations(folder),
    )


def _parcellations(folder: Path) -> dict[str, Path]:
    """List the label images of an atlas that have a lookup table of label names."""
    images = {}
    for table in sorted(folder.glob("tpl-SRI24_*atlas-*_dseg.tsv")):
        image = table.with_suffix(".nii.gz")
        if image.is_file():
            _read_on_grid(image)
            images[table.name.split("_atlas-")[1].split("_")[0]] = image
    return images


def _find_image(folder: Path, suffix: str, desc: str) -> Path | None:
    """Find one image of a template, preferably of 1 mm; return None if there is none that is not empty.

    TemplateFlow's client is not used: it also parses entities in the names of folders above the archive.
    """
    images = [
        path
        for path in sorted(folder.glob(f"tpl-SRI24_*_{suffix}.nii.gz"))
        if path.is_file()
        and path.stat().st_size > 0
        and entities_of(path).get("desc") == desc
        and not {"atlas", "label", "seg"} & set(entities_of(path))
    ]
    at_1mm = [path for path in images if entities_of(path).get("res") in ("1", "01")]
    return next(iter(at_1mm or images), None)


def _read_on_grid(path: Path) -> np.ndarray:
    data, affine = read_volume(path)
    if data.shape != space.SHAPE or not np.allclose(affine, space.AFFINE, atol=1e-3):
        raise InputError(
            path,
            f"the image of shape {data.shape} is not on the SRI24 grid",
            "use the skull-stripped SRI24 images of 240 x 240 x 155 voxels of 1 mm in BraTS orientation",
        )
    return data


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "template_description.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, f"not valid JSON ({error})", "repair the file or remove it") from error


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(
        p.stat().st_size > 0 for p in folder.glob("tpl-SRI24_*desc-brain_T1w.nii.gz")
    )


def _stand_in(cache_dir: Path) -> Reference:
    import nilearn

    geometry = json.loads(
        resources.files("bids_uad").joinpath("data/template/icbm152_to_sri24.json").read_text()
    )
    icbm = (
        Path(nilearn.__file__).parent
        / "datasets"
        / "data"
        / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    )
    key = hashlib.sha256(icbm.read_bytes() + json.dumps(geometry, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir / f"reference-{key}"
    t1w, mask = folder / "T1w.nii.gz", folder / "mask.nii.gz"
    if not (t1w.is_file() and mask.is_file()):
        data, affine = read_volume(icbm)
        pull = np.linalg.inv(np.array(geometry["affine"]))
        head = resample(data, affine, space.SHAPE, space.AFFINE, pull)
        brain = resample(data > 0, affine, space.SHAPE, space.AFFINE, pull) > 0.5
        save_image(space.to_image(brain, np.uint8), mask)
        save_image(space.to_image(np.rint(head * brain * (1000.0 / head.max()))), t1w)
    checksum = voxel_sha256(_read_on_grid(t1w))
    return Reference(
        t1w=t1w,
        t2w=None,
        brain_mask=mask,
        name=STAND_IN,
        source="ICBM 2009a Nonlinear Symmetric T1w template as carried by nilearn, by a 12-parameter affine",
        licence=_ICBM_LICENCE,
        sha256=checksum,
        metadata={"Name": STAND_IN, "License": _ICBM_LICENCE, "SHA256": checksum, "StandIn": True},
    )


def voxel_sha256(data: np.ndarray) -> str:
    """Compute the SHA-256 of the voxels of an image, as little-endian float32 in C order.

    Parameters
    ----------
    data : numpy.ndarray, shape (240, 240, 155)
        Image on the SRI24 grid.

    Returns
    -------
    str
        Hexadecimal digest.
    """
    return hashlib.sha256(np.ascontiguousarray(data, dtype="<f4").tobytes()).hexdigest()


def _write(source: Path, target: Path, dtype: type, metadata: dict[str, Any]) -> None:
    """Write a reference image and then its sidecar, unless both exist."""
    sidecar = target.with_name(target.name.removesuffix(".nii.gz") + ".json")
    if target.is_file() and sidecar.is_file() and json.loads(sidecar.read_text(encoding="utf-8")) == metadata:
        return
    data = _read_on_grid(source)
    save_image(space.to_image(data > 0 if dtype is np.uint8 else data, dtype), target)
    write_json(sidecar, metadata)
