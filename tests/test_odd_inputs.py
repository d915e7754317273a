"""Odd and malformed inputs, all in one dataset and one run: the outcome of each, and the message about it."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nipype.interfaces.base import BaseInterfaceInputSpec, File, SimpleInterface, TraitedSpec, traits
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.engine import Node
from niworkflows.engine.workflows import LiterateWorkflow

from bids_uad.cli.main import main
from bids_uad.config import RunConfig
from bids_uad.dataset.inputs import collect
from bids_uad.files import CHECKSUMS
from bids_uad.levels.participant import run, summary, workflow
from bids_uad.levels.participant.workflow import FROM_PREPROCESSING, connect_record
from bids_uad.preprocessing.check import check_image
from bids_uad.preprocessing.interfaces import Conform
from bids_uad.preprocessing.workflow import INPUTS, OUTPUTS
from tests.levels.fakes import fake_reference, write_page

SHAPE = (20, 22, 24)
AFFINE = np.array([[8.0, 0, 0, -76], [0, 8.0, 0, -84], [0, 0, 8.0, -92], [0, 0, 0, 1]])
CENTRE = tuple(size // 2 for size in SHAPE)
RADIUS = np.sqrt(
    sum((8.0 * (index - size // 2)) ** 2 for index, size in zip(np.indices(SHAPE), SHAPE, strict=True))
)
HEAD = np.where(RADIUS < 70, 100 - RADIUS, 0).round().astype(np.int16)
"""100 at the centre, 30 at the edge, 0 around."""
T1W, T2W = "T1w.nii.gz", "T2w.nii.gz"
TAKEN, LEFT_OUT, REFUSED = "taken", "left out", "refused"


def nifti(
    data: np.ndarray = HEAD,
    affine: np.ndarray = AFFINE,
    change: Callable[[nib.Nifti1Image], None] | None = None,
    version: type[nib.Nifti1Image] = nib.Nifti1Image,
    big_endian: bool = False,
) -> bytes:
    """Return an uncompressed image as bytes."""
    header = version.header_class(endianness=">" if big_endian else "<")
    header.set_data_dtype(data.dtype)
    image = version(data, affine, header)
    if change is not None:
        change(image)
    return image.to_bytes()


def patched(offset: int, layout: str, *values: float, content: bytes | None = None) -> bytes:
    """Overwrite fields of the header; offsets are those of nifti1.h."""
    raw = bytearray(nifti() if content is None else content)
    struct.pack_into(f"<{layout}", raw, offset, *values)
    return bytes(raw)


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def with_forms(sform: np.ndarray | None, qform: np.ndarray | None, codes: tuple[int, int] = (1, 1)) -> bytes:
    def change(image: nib.Nifti1Image) -> None:
        image.set_sform(sform, codes[0] if sform is not None else 0)
        image.set_qform(qform, codes[1] if qform is not None else 0)

    return nifti(change=change)


def with_value(value: float, where: np.ndarray | tuple[int, ...] = CENTRE, dtype: type = np.float32) -> bytes:
    data = HEAD.astype(dtype)
    data[where] = value
    return nifti(data)


def moved(millimetres: float) -> np.ndarray:
    return AFFINE + np.array([[0, 0, 0, millimetres]] + [[0, 0, 0, 0]] * 3)


def coloured(channels: str) -> bytes:
    data = np.zeros(SHAPE, dtype=[(channel, "u1") for channel in channels])
    data["R"] = HEAD
    return nifti(data)


PERMUTED = AFFINE[:, [2, 0, 1, 3]]
FLIPPED = AFFINE @ np.diag([-1.0, 1, 1, 1])
SHEARED = AFFINE + np.array([[0, 2.0, 0, 0]] + [[0, 0, 0, 0]] * 3)
OBLIQUE = AFFINE.copy()
OBLIQUE[:3, :3] = AFFINE[:3, :3] @ np.linalg.qr(np.array([[1, 0.2, 0.1], [-0.2, 1, 0.3], [0.1, -0.3, 1]]))[0]
GOOD = nifti()
PACKED = zipped(GOOD)
AIR = HEAD == 0
AIR_AND_POCKET = AIR.copy()
AIR_AND_POCKET[14, 11, 12] = True
MGH = nib.MGHImage(HEAD.astype(np.float32), AFFINE).to_bytes()
ANALYZE = patched(344, "4s", b"\0\0\0\0")
WEB_PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
ANNEX = b"/annex/objects/SHA256E-s123--abc.nii.gz\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@dataclass(frozen=True)
class Row:
    """One participant: files by what follows `sub-<label>_`, and the outcome of each.

    A file is given as bytes or as a function that makes its path. An expectation is taken, left out or
    refused, with the start of the message (of the quality warning if it is taken). `value` is that of the
    centre voxel of all images that are taken, as it was read.
    """

    label: str
    files: Mapping[str, bytes | Callable[[Path], None]]
    expected: Mapping[str, tuple[str, str]]
    value: float = 100.0
    folder: str = "anat"
    started: str = field(default="")

    def path(self, root: Path, name: str) -> Path:
        start = f"sub-{self.label}_" if not self.started else self.started
        return (
            root / f"sub-{self.label}" / self.folder / (name if name.startswith("sub-") else f"{start}{name}")
        )


def taken(label: str, content: bytes, name: str = T1W, note: str = "", value: float = 100.0) -> Row:
    return Row(
        label, {name: zipped(content) if name.endswith(".gz") else content}, {name: (TAKEN, note)}, value
    )


def refused(label: str, content: bytes | Callable[[Path], None], message: str, name: str = T1W) -> Row:
    return Row(label, {name: content}, {name: (REFUSED, message)})


def spoilt(label: str, content: bytes, message: str) -> Row:
    """An image whose content is refused once it has been decompressed."""
    return refused(label, zipped(content), message)


def among_others(label: str, names: Mapping[str, tuple[str, str]]) -> Row:
    """Files that differ in their names alone."""
    return Row(label, {name: PACKED if name.endswith(".gz") else GOOD for name in names}, names)


def beside(label: str, sidecar: bytes | Callable[[Path], None]) -> Row:
    """A good image beside an odd sidecar."""
    return Row(label, {T1W: PACKED, "T1w.json": sidecar}, {T1W: (TAKEN, "")})


def alone(label: str, folder: str = "anat", **files: bytes) -> Row:
    """A participant without a usable image."""
    return Row(
        label, files, {"": (REFUSED, f"sub-{label}: no usable T1w, T2w or FLAIR image")}, folder=folder
    )


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def directory(path: Path) -> None:
    path.mkdir()


FORMATS = [
    taken("good", GOOD),
    taken("plain", GOOD, "T1w.nii"),
    taken("niftitwo", nifti(version=nib.Nifti2Image)),
    taken("niftitwoplain", nifti(version=nib.Nifti2Image), "T1w.nii"),
    taken("bigendian", nifti(big_endian=True)),
    taken("bigendiantwo", nifti(version=nib.Nifti2Image, big_endian=True)),
    Row("linked", {T1W: link("../../good.nii.gz")}, {T1W: (TAKEN, "")}),
    Row("trailing", {T1W: PACKED + bytes(64)}, {T1W: (TAKEN, "")}),
    refused("rubbish", PACKED + b"rubbish", "the image data cannot be read (Compressed file ended"),
    Row("members", {T1W: zipped(GOOD[:5000]) + zipped(GOOD[5000:])}, {T1W: (TAKEN, "")}),
    refused("empty", b"", "the file is empty; copy"),
    refused("emptyplain", b"", "the file is empty; copy", "T1w.nii"),
    refused("onebyte", b"x", "not a gzip file, though its name ends in .gz"),
    refused("onebyteplain", b"x", "not a readable image", "T1w.nii"),
    refused("zeros", bytes(4000), "not a readable image", "T1w.nii"),
    refused("webpage", WEB_PAGE, "a web page, not an image; download", "T1w.nii"),
    refused("webpagepacked", WEB_PAGE, "a web page, not an image; download"),
    refused("webpagebare", b"\n <HTML><head></head></HTML>", "a web page, not an image; download"),
    refused(
        "xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML text, not an image"
    ),
    refused("zip", b"PK\x03\x04" + bytes(400), "a ZIP archive, not an image; unpack"),
    refused("dicom", bytes(128) + b"DICM" + bytes(400), "a DICOM file, not a NIfTI file; convert", "T1w.nii"),
    refused("annexpointer", ANNEX, "a git-annex pointer, not its content; fetch it with `datalad get`"),
    refused(
        "annexplain", ANNEX, "a git-annex pointer, not its content; fetch it with `datalad get`", "T1w.nii"
    ),
    refused("lfspointer", LFS, "a Git LFS pointer, not its content; fetch it with `git lfs pull`"),
    refused("lfsplain", LFS, "a Git LFS pointer, not its content; fetch it with `git lfs pull`", "T1w.nii"),
    refused(
        "dangling",
        link("../../.git/annex/objects/x/SHA256E-s1--a.nii.gz"),
        "the file is a link to content that is not here; fetch it with `datalad get`",
    ),
    refused("danglingplain", link("/nowhere/x.nii"), "the file is a link to content that is not", "T1w.nii"),
    refused("loop", link("sub-loop_T1w.nii.gz"), "the file is a link to content that is not here"),
    refused("truncated", PACKED[: len(PACKED) // 2], "the image data cannot be read (Compressed file ended"),
    refused("truncatedearly", PACKED[:20], "not a readable image"),
    refused(
        "badchecksum", PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "the image data cannot be read (CRC check"
    ),
    refused("brokenblock", PACKED[:900] + b"\xff" * 64 + PACKED[964:], "the image data cannot be read"),
    refused("truncatedplain", GOOD[:9000], "the image data are cut short (8648 of 21120 bytes)", "T1w.nii"),
    refused("headeronly", GOOD[:352], "the image data are cut short (0 of 21120 bytes)", "T1w.nii"),
    refused("barelyheader", GOOD[:348], "the image data are cut short (0 of 21120 bytes)", "T1w.nii"),
    refused("halfheader", GOOD[:200], "not a readable image", "T1w.nii"),
    spoilt("headerpacked", GOOD[:352], "the image data are cut short (0 of 21120 bytes)"),
    spoilt("textpacked", b"nothing but text", "not a readable image"),
    spoilt("twicepacked", PACKED, "not a readable image"),
    spoilt("mghpacked", MGH, "not a readable image"),
    spoilt("analyzepacked", ANALYZE, "not a readable image"),
    refused("notgzip", GOOD, "an uncompressed NIfTI file, though its name ends in .gz; name it .nii"),
    refused(
        "notgziptwo", nifti(version=nib.Nifti2Image), "an uncompressed NIfTI file, though its name ends in"
    ),
    refused("gzipplain", PACKED, "a gzip file with a name that lacks .gz; name it .nii.gz", "T1w.nii"),
    Row(
        "directory",
        {T1W: directory, T2W: PACKED},
        {T1W: (LEFT_OUT, "a folder, not a file"), T2W: (TAKEN, "")},
    ),
    among_others(
        "uppercase",
        {
            "T1w.NII.GZ": (LEFT_OUT, "not a .nii or .nii.gz file; convert it, or rename"),
            "acq-b_T1w.NII": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "acq-c_T1w.Nii.gz": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "acq-d_T1w.nii.gz": (TAKEN, ""),
        },
    ),
    among_others(
        "foreign",
        {
            "T1w.img": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "T1w.hdr": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "acq-a_T1w.mgz": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "acq-b_T1w.nii.bz2": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "acq-c_T1w.dcm": (LEFT_OUT, "not a .nii or .nii.gz file"),
            "acq-d_T1w.nrrd": (LEFT_OUT, "not a .nii or .nii.gz file"),
            T2W: (TAKEN, ""),
        },
    ),
]

TYPES = [
    *[
        taken(np.dtype(dtype).name, nifti(HEAD.astype(dtype)))
        for dtype in (
            np.uint8,
            np.int8,
            np.uint16,
            np.int32,
            np.uint32,
            np.int64,
            np.uint64,
            np.float32,
            np.float64,
        )
    ],
    spoilt(
        "complex64",
        nifti(HEAD.astype(np.complex64)),
        "the voxels are complex numbers (complex64); provide the mag",
    ),
    spoilt(
        "complex128",
        nifti(HEAD.astype(np.complex128)),
        "the voxels are complex numbers (complex128); provide",
    ),
    spoilt("rgb", coloured("RGB"), "an RGB colour image, not a scan; provide"),
    spoilt("rgba", coloured("RGBA"), "an RGBA colour image, not a scan; provide"),
    spoilt("unknowntype", patched(70, "h", 999), "not a readable image (data code 999 not"),
    spoilt("notype", patched(70, "h", 0), "not a readable image"),
    spoilt("float128", patched(70, "2h", 1536, 128), "not a readable image"),
    spoilt("bits", patched(70, "h", 1), "not a readable image"),
    taken("wrongbitpix", patched(72, "h", 8)),
]

SHAPES = [
    taken("onevolume", nifti(HEAD[..., None])),
    taken("sevendimensions", nifti(HEAD[..., None, None, None, None])),
    spoilt(
        "twovolumes",
        nifti(np.stack([HEAD, HEAD], -1)),
        "the image has 4 dimensions (20, 22, 24, 2); provide one",
    ),
    spoilt("vectors", nifti(np.stack([HEAD] * 3, -1)[:, :, :, None]), "the image has 5 dimensions"),
    spoilt("volumelast", nifti(HEAD[:, :, None]), "the image has 4 dimensions (20, 22, 1, 24)"),
    spoilt("slice", nifti(HEAD[:, :, 12]), "the image of shape (20, 22) is not a volume; provide"),
    spoilt("line", nifti(HEAD[:, 11, 12]), "the image of shape (20,) is not a volume"),
    spoilt("thinaxial", nifti(HEAD[:, :, 12:13]), "the image of shape (20, 22, 1) is not a volume"),
    spoilt("thincoronal", nifti(HEAD[:, 11:12]), "the image of shape (20, 1, 24) is not a volume"),
    spoilt("thinsagittal", nifti(HEAD[10:11]), "the image of shape (1, 22, 24) is not a volume"),
    spoilt("sevenslices", nifti(HEAD[:, :, 8:15]), "the image of shape (20, 22, 7) is not a volume"),
    spoilt("nodimensions", patched(40, "h", 0), "the image of shape (0,) is not a volume"),
    spoilt("zerodimension", patched(46, "h", 0), "the image of shape (20, 22, 0) is not a volume"),
    spoilt("negative", patched(46, "h", -24), "the image of shape (20, 22, -24) is not a volume"),
    spoilt("ninedimensions", patched(40, "h", 9), "not a readable image"),
    spoilt(
        "toolarge", patched(42, "3h", 80, 80, 87), "the image data are cut short (21120 of 1113600 bytes)"
    ),
    spoilt(
        "gigantic",
        patched(42, "3h", 700, 700, 700, content=nifti(affine=np.diag([0.9, 0.9, 0.9, 1]))),
        "the image data are cut short",
    ),
    refused("toolargeplain", patched(46, "h", 30), "the image data are cut short (21120 of 26400", "T1w.nii"),
]

HEADERS = [
    taken("slopezero", patched(112, "f", 0)),
    taken("slopenan", patched(112, "f", np.nan)),
    taken("slopeinf", patched(112, "f", np.inf)),
    taken("bothnan", patched(112, "2f", np.nan, np.nan)),
    taken("slope", patched(112, "2f", 2, 0), value=200),
    taken("intercept", patched(112, "2f", 1, 10), value=110),
    taken("slopeandintercept", patched(112, "2f", 0.5, 1), value=51),
    spoilt("slopenegative", patched(112, "2f", -1, 0), "many voxels are negative; provide magnitude"),
    spoilt(
        "interceptnan",
        patched(112, "2f", 1, np.nan),
        "not a readable image (Valid slope but invalid intercept",
    ),
    taken("sformonly", with_forms(AFFINE, None)),
    taken("qformonly", with_forms(None, AFFINE)),
    taken("permuted", with_forms(PERMUTED, PERMUTED)),
    taken("flipped", with_forms(FLIPPED, FLIPPED)),
    taken("oblique", with_forms(OBLIQUE, OBLIQUE)),
    taken("templatecodes", with_forms(AFFINE, AFFINE, (4, 2))),
    spoilt("sheared", with_forms(SHEARED, None), "the header's affine has shear; resample"),
    spoilt("nocodes", with_forms(None, None), "the header has no orientation (sform and qform codes are 0)"),
    taken(
        "apart",
        with_forms(AFFINE, moved(7)),
        note="The header's sform and qform differ by up to 7 mm; the sform was",
    ),
    taken(
        "handedness",
        with_forms(AFFINE, FLIPPED),
        note="The header's sform and qform disagree about left and right",
    ),
    taken(
        "pixdim",
        patched(80, "3f", 1, 1, 2, content=with_forms(AFFINE, None)),
        note="The header's pixdim (1 x 1 x 2 mm) and sform (8 x 8 x 8 mm) disagree; the sform was used",
    ),
    taken(
        "pixdimorder",
        patched(80, "3f", 5, 8, 8, content=with_forms(AFFINE @ np.diag([1, 1, 0.625, 1]), None)),
        note="The header's pixdim (5 x 8 x 8 mm) and sform (8 x 8 x 5 mm) disagree",
    ),
    spoilt(
        "zeroform",
        patched(280, "12f", *[0] * 12, content=with_forms(AFFINE, None)),
        "the header's affine is singular or not finite",
    ),
    spoilt(
        "nanform",
        patched(280, "f", np.nan, content=with_forms(AFFINE, None)),
        "the header's affine is singular",
    ),
    spoilt(
        "metres",
        nifti(affine=AFFINE / 1000),
        "the voxel size 0.008 x 0.008 x 0.008 mm is implausible for a head",
    ),
    spoilt("micrometres", nifti(affine=AFFINE * 1000), "the voxel size 8000 x 8000 x 8000 mm is implausible"),
    spoilt(
        "smallfield", nifti(affine=AFFINE / 8), "the field of view 20 x 22 x 24 mm is implausible for a head"
    ),
    spoilt(
        "largefield", nifti(np.pad(HEAD, 40), AFFINE), "the field of view 800 x 816 x 832 mm is implausible"
    ),
    taken("smallvoxels", nifti(np.repeat(HEAD, 12, axis=0), AFFINE @ np.diag([1 / 12, 1, 1, 1]))),
    refused("offsetzero", patched(108, "f", 0), "the header places the image data inside itself", "T1w.nii"),
    refused("offsetlarge", patched(108, "f", 1e6), "the image data are cut short", "T1w.nii"),
    refused("offsetnan", patched(108, "f", np.nan), "not a readable image", "T1w.nii"),
    taken("wrongsize", patched(0, "i", 0), "T1w.nii"),
    taken("pairmagic", patched(344, "4s", b"ni1\0"), "T1w.nii"),
]

VALUES = [
    taken(
        "nanoutside", with_value(np.nan, AIR), note=f"{AIR.sum():,} NaN or infinite voxels of the background"
    ),
    taken(
        "infoutside", with_value(np.inf, AIR), note=f"{AIR.sum():,} NaN or infinite voxels of the background"
    ),
    taken(
        "minusinf",
        with_value(-np.inf, (0, 0, 0)),
        note="1 NaN or infinite voxels of the background were set to",
    ),
    taken(
        "nanintheair",
        with_value(np.nan, (2, 2, 2)),
        note="1 NaN or infinite voxels of the background were set",
    ),
    taken("nanborder", with_value(np.nan, np.s_[0]), note="528 NaN or infinite voxels of the background"),
    taken("nandouble", with_value(np.nan, AIR, np.float64), note=f"{AIR.sum():,} NaN or infinite voxels"),
    taken(
        "nanpocket",
        with_value(np.nan, AIR_AND_POCKET),
        note=f"{AIR.sum() + 1:,} NaN or infinite voxels of the",
    ),
    spoilt("naninside", with_value(np.nan), "the image has NaN or infinite voxels in the head; replace"),
    spoilt("infinside", with_value(np.inf), "the image has NaN or infinite voxels in the head"),
    spoilt(
        "nanmany", with_value(np.nan, (RADIUS < 20) | AIR), "the image has NaN or infinite voxels in the head"
    ),
    spoilt(
        "nanslice", with_value(np.nan, np.s_[:, :, 12]), "the image has NaN or infinite voxels in the head"
    ),
    spoilt("nanslices", with_value(np.nan, np.s_[9:12]), "the image has NaN or infinite voxels in the head"),
    spoilt(
        "nanall",
        nifti(np.full(SHAPE, np.nan, np.float32)),
        "the image has NaN or infinite voxels in the head",
    ),
    spoilt(
        "overflow", with_value(1e300, dtype=np.float64), "the image has NaN or infinite voxels in the head"
    ),
    spoilt("constant", nifti(np.full(SHAPE, 7, np.int16)), "every voxel has the value 7; exclude"),
    spoilt("black", nifti(np.zeros(SHAPE, np.int16)), "every voxel has the value 0"),
    spoilt(
        "nearlyempty", nifti(np.where(RADIUS < 20, HEAD, 0)), "only 41.5 mL of the image are not background"
    ),
    spoilt(
        "zscore",
        nifti(np.where(AIR, 0, HEAD - 65).astype(np.float32)),
        "many voxels are negative; provide magnit",
    ),
    taken("fewnegative", with_value(-1, (10, 11, 5))),
    taken("tiny", nifti(HEAD.astype(np.float64) * 1e-12), value=1e-10),
    taken("large", nifti(HEAD.astype(np.float64) * 1e12), value=1e14),
    taken("raisedbackground", nifti(HEAD + np.int16(1000)), value=1100),
]

NAMES = [
    among_others(
        "several",
        {
            "T1w.nii.gz": (TAKEN, ""),
            "run-1_T1w.nii.gz": (TAKEN, ""),
            "run-2_T1w.nii.gz": (TAKEN, ""),
            "run-10_T1w.nii.gz": (TAKEN, ""),
            "acq-mprage_T1w.nii.gz": (TAKEN, ""),
            "rec-norm_T1w.nii.gz": (TAKEN, ""),
            "acq-mprage_rec-norm_run-1_T1w.nii.gz": (TAKEN, ""),
            "ce-gd_T1w.nii.gz": (LEFT_OUT, "contrast-enhanced; a --bids-filter-file"),
            "T2w.nii.gz": (TAKEN, ""),
            "ce-gd_T2w.nii.gz": (LEFT_OUT, "contrast-enhanced; a --bids-filter-file"),
        },
    ),
    among_others("echoes", {f"echo-{echo}_T1w.nii.gz": (TAKEN, "") for echo in (1, 2, 3)}),
    among_others(
        "parts",
        {
            "part-mag_T1w.nii.gz": (TAKEN, ""),
            "part-phase_T1w.nii.gz": (LEFT_OUT, "part-phase; only magnitude images are used"),
            "part-real_T1w.nii.gz": (LEFT_OUT, "part-real; only magnitude images are used"),
            "part-imag_T1w.nii.gz": (LEFT_OUT, "part-imag; only magnitude images are used"),
            "part-mag_T2w.nii.gz": (TAKEN, ""),
            "part-phase_T2w.nii.gz": (LEFT_OUT, "part-phase; only magnitude images are used"),
        },
    ),
    among_others(
        "phaseonly",
        {
            "part-phase_T1w.nii.gz": (LEFT_OUT, "part-phase; only"),
            "": (
                REFUSED,
                "sub-phaseonly: no usable T1w, T2w or FLAIR image; left out: sub-phaseonly_part-phase_T1w",
            ),
        },
    ),
    among_others(
        "chunks",
        {
            "chunk-1_T1w.nii.gz": (LEFT_OUT, "chunk-; a part of a scan"),
            "chunk-2_T1w.nii.gz": (LEFT_OUT, "chunk-; a part of a scan"),
            "": (
                REFUSED,
                "sub-chunks: no usable T1w, T2w or FLAIR image; left out: sub-chunks_chunk-1_T1w.nii.gz",
            ),
        },
    ),
    among_others("chunkandwhole", {"chunk-1_T1w.nii.gz": (LEFT_OUT, "chunk-"), "T1w.nii.gz": (TAKEN, "")}),
    among_others(
        "mptworage",
        {
            "UNIT1.nii.gz": (TAKEN, ""),
            "inv-1_MP2RAGE.nii.gz": (LEFT_OUT, "one inversion of MP2RAGE; its UNIT1 image is used"),
            "inv-2_part-mag_MP2RAGE.nii.gz": (LEFT_OUT, "one inversion of MP2RAGE"),
            "inv-2_part-phase_MP2RAGE.nii.gz": (LEFT_OUT, "one inversion of MP2RAGE"),
            "inv-1_T1w.nii.gz": (LEFT_OUT, "inv-; one inversion of a sequence"),
        },
    ),
    among_others(
        "uniformandplain",
        {"UNIT1.nii.gz": (TAKEN, ""), "T1w.nii.gz": (TAKEN, ""), "rec-denoised_UNIT1.nii.gz": (TAKEN, "")},
    ),
    among_others(
        "twice",
        {"T1w.nii": (REFUSED, "same BIDS entities as sub-twice_T1w.nii.gz; keep one"), T1W: (REFUSED, "")},
    ),
    among_others(
        "thrice",
        {
            "T1w.nii": (
                REFUSED,
                "same BIDS entities as sub-thrice_T1w.nii.gz, sub-thrice_foo-1_T1w.nii.gz; keep",
            ),
            T1W: (REFUSED, ""),
            "foo-1_T1w.nii.gz": (REFUSED, ""),
        },
    ),
    among_others(
        "oddrun",
        {
            "run-x_T1w.nii.gz": (REFUSED, "same BIDS entities as sub-oddrun_run-y"),
            "run-y_T1w.nii.gz": (REFUSED, ""),
        },
    ),
    among_others("onerun", {"run-x_T1w.nii.gz": (TAKEN, "")}),
    among_others("described", {"desc-defaced_T1w.nii.gz": (TAKEN, "")}),
    among_others(
        "misspelt",
        {
            "t1w.nii.gz": (LEFT_OUT, "suffix t1w, which BIDS spells T1w"),
            "T2W.nii.gz": (LEFT_OUT, "suffix T2W, which BIDS spells T2w"),
            "": (
                REFUSED,
                "sub-misspelt: no usable T1w, T2w or FLAIR image; left out: sub-misspelt_T2W.nii.gz (suffix",
            ),
        },
    ),
    among_others(
        "stranger",
        {"sub-other_T1w.nii.gz": (REFUSED, "file name does not match its folder")},
    ),
    Row(
        "noprefix",
        {T1W: PACKED},
        {
            T1W: (
                REFUSED,
                "file name does not match its folder sub-noprefix/anat; start the name",
            )
        },
        started="x_",
    ),
    Row("session", {"ses-a_T1w.nii.gz": PACKED}, {"ses-a_T1w.nii.gz": (TAKEN, "")}, folder="ses-a/anat"),
    Row("sessionless", {T1W: PACKED}, {T1W: (TAKEN, "")}, folder="ses-a/anat"),
    Row(
        "wrongsession",
        {"ses-b_T1w.nii.gz": PACKED},
        {
            "ses-b_T1w.nii.gz": (
                REFUSED,
                "file name does not match its folder sub-wrongsession/ses-a",
            )
        },
        folder="ses-a/anat",
    ),
    Row("resource", {T1W: PACKED}, {T1W: (TAKEN, "")}),
    alone("nothing"),
    alone("elsewhere", folder="", **{T1W: PACKED}),
    Row("flaironly", {"FLAIR.nii.gz": PACKED}, {"FLAIR.nii.gz": (TAKEN, "")}),
    alone("t2staronly", **{"T2starw.nii.gz": PACKED}),
    alone("sidecaronly", **{"T1w.json": b"{}"}),
    Row("a+b", {T1W: PACKED}, {T1W: (TAKEN, "")}),
    *[
        Row(
            label,
            {T1W: PACKED},
            {"": (REFUSED, f"{{}}/sub-{label}: BIDS allows letters and digits only in a label")},
        )
        for label in ("müller", "01-02", "a.b", "a b", "a_b", "")
    ],
    Row(
        "brokenanchor",
        {T1W: PACKED[: len(PACKED) // 2], T2W: PACKED},
        {T1W: (REFUSED, "the image data cannot be read"), T2W: (TAKEN, "")},
    ),
    Row(
        "brokensecond",
        {T1W: PACKED, T2W: zipped(nifti(HEAD.astype(np.complex64)))},
        {T1W: (TAKEN, ""), T2W: (REFUSED, "the voxels are complex numbers (complex64)")},
    ),
]

SIDECARS = [
    beside("jsonbroken", b'{"SkullStripped": tr'),
    beside("jsonempty", b""),
    beside("jsonarray", b"[1, 2]"),
    beside("jsonnumber", b"3"),
    beside("jsonlatin", '{"Institution": "Köln"}'.encode("latin-1")),
    beside("jsondeep", b"[" * 200_000),
    beside("jsondangling", link("/nowhere/x.json")),
    beside("jsonfolder", directory),
    beside("jsonbom", b'\xef\xbb\xbf{"SkullStripped": true}'),
    beside("jsonclash", b'{"subject": "other", "suffix": 3, "run": [1], "SkullStripped": "perhaps"}'),
    beside("jsonnan", b'{"EchoTime": NaN, "RepetitionTime": null}'),
]
SIDECAR_MESSAGES = {
    "jsonbroken": "not valid JSON",
    "jsonempty": "not valid JSON",
    "jsonarray": "not a JSON object",
    "jsonnumber": "not a JSON object",
    "jsonlatin": "not valid JSON",
    "jsondeep": "not valid JSON",
    "jsondangling": "the file is a link to content that is not here",
    "jsonfolder": "the file cannot be read (Is a directory)",
}

ROWS = [*FORMATS, *TYPES, *SHAPES, *HEADERS, *VALUES, *NAMES, *SIDECARS]
CASES = [(row, name) for row in ROWS for name in row.expected]


def write_odd_dataset(root: Path) -> Path:
    """Write all rows into one dataset."""
    root.mkdir()
    (root / "dataset_description.json").write_text(json.dumps({"Name": "odd", "BIDSVersion": "1.9.0"}))
    (root / "good.nii.gz").write_bytes(PACKED)
    for row in ROWS:
        (root / f"sub-{row.label}" / row.folder).mkdir(parents=True)
        for name, content in row.files.items():
            path = row.path(root, name)
            if name and callable(content):
                content(path)
            elif name:
                path.write_bytes(content)
    (root / "sub-resource/anat/._sub-resource_T1w.nii.gz").write_bytes(b"\0\5\x16\7resource fork")
    return root


class _WriteInputSpec(BaseInterfaceInputSpec):
    image = File(exists=True, mandatory=True)
    warnings = traits.Dict(mandatory=True)
    target = traits.Str(mandatory=True)


class _WriteOutputSpec(TraitedSpec):
    out_file = File(exists=True)


class Write(SimpleInterface):
    """Stand-in for all that is written about an image: what was read of it."""

    input_spec = _WriteInputSpec
    output_spec = _WriteOutputSpec

    def _run_interface(self, runtime):
        image = nib.load(self.inputs.image)
        data = image.get_fdata()
        centre = tuple(size // 2 for size in data.shape)
        target = Path(self.inputs.target)
        target.parent.mkdir(parents=True, exist_ok=True)
        read = {"value": data[centre], "finite": bool(np.isfinite(data).all()), "shape": data.shape}
        target.write_text(
            json.dumps({**read, "affine": image.affine.tolist(), "warnings": self.inputs.warnings})
        )
        self._results["out_file"] = str(target)
        return runtime


def init_reading_wf(*, name: str, **_: object) -> LiterateWorkflow:
    """Stand-in for preprocessing that does nothing but read the image, as preprocessing does."""
    part = LiterateWorkflow(name=name)
    inputnode = Node(IdentityInterface(fields=list(INPUTS)), name="inputnode")
    outputnode = Node(IdentityInterface(fields=list(OUTPUTS)), name="outputnode")
    conform = Node(Conform(), name="conform")
    part.connect([(inputnode, conform, [("in_file", "in_file")])])
    part.connect([(conform, outputnode, [("out_file", "preproc"), ("warnings", "qc")])])
    return part


def init_recording_wf(task, context, *, name: str) -> LiterateWorkflow:
    """Stand-in for the workflow that writes the derivatives of an image."""
    part = LiterateWorkflow(name=name)
    inputnode = Node(IdentityInterface(fields=[*FROM_PREPROCESSING, "lesion"]), name="inputnode")
    target = context.config.output_dir / task.unit.folder / f"{task.unit.key}_read.json"
    write = Node(Write(target=str(target)), name="write")
    part.connect([(inputnode, write, [("preproc", "image"), ("qc", "warnings")])])
    connect_record(part, task, context, inputnode, [(write, "out_file")])
    return part


@dataclass(frozen=True)
class Finished:
    """What a run over the odd dataset left."""

    raw: Path
    out: Path
    work: Path
    code: int
    messages: str

    def run(self, *extra: str) -> int:
        arguments = [str(self.raw), str(self.out), "participant", "-w", str(self.work), "--device", "cpu"]
        return main([*arguments, "--nprocs", "2", "--models", "none", *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    raw = write_odd_dataset(folder / "raw")
    reference = fake_reference(folder / "reference")
    CHECKSUMS.clear()
    messages = folder / "messages.txt"
    with pytest.MonkeyPatch.context() as patch, messages.open("w") as stream:
        patch.setattr(workflow, "init_preproc_wf", init_reading_wf)
        patch.setattr(workflow, "init_derivatives_wf", init_recording_wf)
        patch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
        patch.setattr(run, "print_summary", lambda *_: None)
        patch.setattr(summary, "image_warnings", lambda *_: [])
        patch.setattr(summary, "write_report", write_page)
        patch.setenv("COLUMNS", "500")
        saved = {number: os.dup(number) for number in (1, 2)}  # workers write there, too
        for number in saved:
            os.dup2(stream.fileno(), number)
        try:
            with os.fdopen(os.dup(2), "w", buffering=1) as errors:
                patch.setattr("sys.stderr", errors)
                code = Finished(raw, folder / "out", folder / "work", -1, "").run()
        finally:
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
    return Finished(raw, folder / "out", folder / "work", code, messages.read_text())


@pytest.fixture(scope="module")
def collection(finished):
    config = RunConfig(finished.raw, finished.out, ("participant",), finished.work)
    return collect(config, check=lambda unit: check_image(unit.path))


def squeezed(text: str) -> str:
    """Take out the white space, which the log adds where it breaks lines."""
    return re.sub(r"\s+", "", text)


def test_number_of_odd_inputs():
    assert len(CASES) >= 120
    assert len({row.label for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("row", "name"), CASES, ids=[f"{row.label}-{name}" for row, name in CASES])
def test_outcome_of_each_odd_input(finished, collection, row, name):
    outcome, message = row.expected[name]
    path = row.path(finished.raw, name)
    problems = [p.message for p in collection.problems if p.subject == row.label]
    used = {unit.path for unit in collection.units}
    if outcome == TAKEN:
        (unit,) = [unit for unit in collection.units if unit.path == path]
        read = json.loads((finished.out / unit.folder / f"{unit.key}_read.json").read_text())
        assert read["finite"]
        assert read["value"] == pytest.approx(row.value, rel=1e-3)
        assert [text[: len(message)] for text in read["warnings"]] == ([message] if message else [])
        assert not any(str(path) in problem for problem in problems)
        return
    assert path not in used
    written = finished.out / f"sub-{row.label}" / row.folder
    assert not list(written.glob(f"{path.name.split('.')[0]}_*")) if name else not written.exists()
    if outcome == LEFT_OUT:
        assert collection.left_out[path].startswith(message)
        assert squeezed(collection.left_out[path]) in squeezed(finished.messages)
    elif name:
        # Of images with the same entities, the message starts with one and names all others.
        own = [problem for problem in problems if path.name in problem]
        assert len(own) == 1
        assert not message or own[0].startswith(f"{path}: {message}"), own[0]
        assert squeezed(own[0]) in squeezed(finished.messages)
        assert "\n" not in own[0]
    else:
        assert [p[: len(message.format(finished.raw))] for p in problems] == [message.format(finished.raw)]
        assert squeezed(problems[0]) in squeezed(finished.messages)


def test_run_reports_every_image_in_one_line_and_returns_1(finished):
    assert finished.code == 1
    assert "Traceback" not in finished.messages
    assert "Error:" not in finished.messages
    for warning in ("RuntimeWarning", "ComplexWarning", "UserWarning"):
        assert warning not in finished.messages


def test_unusable_images_have_no_outputs(finished, collection):
    kept = {unit.key for unit in collection.units}
    written = {path.name.removesuffix("_read.json") for path in finished.out.rglob("*_read.json")}
    assert written == kept
    assert [path for path in finished.out.rglob(".*") if path.name != ".bidsignore"] == []
    assert not list(finished.out.rglob("crash*"))


@pytest.mark.parametrize(("label", "message"), SIDECAR_MESSAGES.items())
def test_unreadable_sidecar_is_reported_and_ignored(finished, label, message):
    path = finished.raw / f"sub-{label}/anat/sub-{label}_T1w.json"
    assert squeezed(f"{path}: {message}") in squeezed(finished.messages)


def test_a_sidecar_with_a_byte_order_mark_is_used(collection):
    units = {unit.subject: unit for unit in collection.units}
    assert units["jsonbom"].skull_stripped is True
    assert units["jsonclash"].skull_stripped is None


def test_outputs_of_mp2rage_images_have_names_of_their_own(collection):
    own = [unit for unit in collection.units if unit.subject == "uniformandplain"]
    assert [unit.key for unit in own] == [
        "sub-uniformandplain_T1w",
        "sub-uniformandplain_rec-UNIT1_T1w",
        "sub-uniformandplain_rec-denoisedUNIT1_T1w",
    ]
    assert {unit.modality for unit in own} == {"T1w"}


def test_run_of_unusable_images_only_returns_no_input(finished, collection, monkeypatch, capfd):
    reference = fake_reference(finished.raw.parent / "reference")
    monkeypatch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
    subjects = {problem.subject for problem in collection.problems}
    subjects -= {unit.subject for unit in collection.units}
    labels = sorted(label for label in subjects if label.isalnum() and label.isascii())[::8]
    assert len(labels) > 5
    assert finished.run("--participant-label", *labels) == 66
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "has no dataset_description.json; is it the root of a BIDS dataset?"),
        ("{}", 0, ""),
        ("{", 2, "dataset_description.json: not valid JSON"),
        ("", 2, "dataset_description.json: not valid JSON"),
        ("[]", 2, "dataset_description.json: not a JSON object"),
        ('{"Name": "Köln"}'.encode("latin-1"), 2, "dataset_description.json: not valid JSON"),
    ],
)
def test_dataset_description(tmp_path, monkeypatch, capfd, content, code, message):
    anat = tmp_path / "raw/sub-01/anat"
    anat.mkdir(parents=True)
    (anat / "sub-01_T1w.nii.gz").write_bytes(PACKED)
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "raw/dataset_description.json").write_bytes(content)
    reference = fake_reference(tmp_path / "reference")
    monkeypatch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
    arguments = [str(tmp_path / "raw"), str(tmp_path / "out"), "participant", "-w", str(tmp_path / "work")]
    assert main([*arguments, "--models", "none", "--device", "cpu", "--dry-run"]) == code
    messages = capfd.readouterr().err
    assert squeezed(message) in squeezed(messages)
    assert "Traceback" not in messages
    assert not (tmp_path / "out").exists()
