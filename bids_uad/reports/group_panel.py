"""The best, the median and the worst case of each detector, as pictures.

These are the only volumes that the group level reads: at most three scans for each detector and modality, one
at a time, of which one slice is kept.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image

from bids_uad.dataset.lesions import written_mask
from bids_uad.dataset.published import detector_desc, published
from bids_uad.errors import InputError
from bids_uad.evaluation.subjects import LESION
from bids_uad.evaluation.tables import REMEDY
from bids_uad.reports.figures.display import EDGE_LABELS, bounding_box, load_ras, plane, plane_label, to_grey
from bids_uad.reports.figures.overlay import LESION_COLOUR
from bids_uad.reports.figures.svg import contour
from bids_uad.reports.group_figures import WIDTH, Figure
from bids_uad.reports.group_svg import MUTED, Svg
from bids_uad.reports.group_text import detector_name, fixed

FOUND_COLOUR = (255, 149, 0)
FOUND_OPACITY = 150
QUALITY = 80
MARGIN, GAP, BETWEEN = 12, 6, 26
_SHADE = "#2b2f33"


@dataclass(frozen=True)
class Case:
    """One scan that stands for others.

    Parameters
    ----------
    which : str
        `best`, `median`, `worst`, or `only`.
    scan : dict
        Its row of the table of subjects.
    """

    which: str
    scan: dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """An axial slice, cut to the brain.

    Parameters
    ----------
    grey : numpy.ndarray of uint8, shape (rows, columns)
    found, lesion : numpy.ndarray of bool, same shape
        Above the threshold, and the truth.
    place : str
        Where it was cut, such as ``z = 77``.
    """

    grey: np.ndarray
    found: np.ndarray
    lesion: np.ndarray
    place: str


def choose_cases(scans: pd.DataFrame) -> list[Case]:
    """Choose the best, the median and the worst case by Dice at the fixed threshold.

    Parameters
    ----------
    scans : pandas.DataFrame
        Rows of one detector and modality, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.

    Returns
    -------
    list of Case
        Of scans whose lesion mask is not empty; fewer with fewer than three. Of equal ones the larger lesion
        counts as the worse. Of an even number the lower of the two in the middle is the median.
    """
    judged = scans[(scans["role"] == LESION) & (scans["n_lesion_voxels"] > 0)]
    ordered = judged.sort_values(["dice", "n_lesion_voxels", "source_image"], ascending=[True, False, True])
    last = len(ordered) - 1
    places = {"best": last, "median": last // 2, "worst": 0}
    if last < 2:
        places = {"best": 1, "worst": 0} if last == 1 else {"only": 0} if last == 0 else {}
    return [Case(which, ordered.iloc[place].to_dict()) for which, place in places.items()]


def read_slice(root: Path, scan: dict[str, Any]) -> Slice:
    """Read the axial slice of a scan that holds most of the lesion.

    Parameters
    ----------
    root : pathlib.Path
        Derivatives.
    scan : dict
        A row of the table of subjects.

    Returns
    -------
    Slice

    Raises
    ------
    InputError
        If an image is missing, damaged or on another grid.
    """
    source, modality, detector = (scan[key] for key in ("source_image", "modality", "detector"))
    desc = detector_desc(modality, detector)
    preprocessed = root / published(source, modality, f"desc-preproc_{modality}.nii.gz")
    lesion_path = written_mask(preprocessed)
    if lesion_path is None:
        raise InputError(preprocessed, "its lesion mask is missing", REMEDY)
    lesion = _read(lesion_path, bool)
    index = int(np.argmax(lesion.data.sum(axis=(0, 1))))
    truth, where = plane(lesion.data, "axial", index), plane_label(lesion, "axial", index)
    shape = lesion.data.shape
    shown = {}
    for rest, kind in ((f"desc-preproc_{modality}", np.float32), (f"label-anomaly_desc-{desc}_mask", bool)):
        path = root / published(source, modality, f"{rest}.nii.gz")
        volume = _read(path, kind)
        if volume.data.shape != shape:
            raise InputError(path, f"not on the grid of {lesion_path.name}", REMEDY)
        shown[kind] = plane(volume.data, "axial", index).copy()
    image, found = shown[np.float32], shown[bool]
    rows, columns, _ = bounding_box((image > 0)[:, :, None])
    return Slice(to_grey(image[rows, columns], 1.0), found[rows, columns], truth[rows, columns].copy(), where)


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise InputError(path, "is missing", REMEDY)
    try:
        return load_ras(path, kind)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise InputError(path, f"cannot be read ({error})", REMEDY) from error


def example_figures(root: str | Path, subjects: pd.DataFrame) -> tuple[list[Figure], str]:
    """Draw the cases of every detector, one figure for each modality.

    Parameters
    ----------
    root : path-like
        Derivatives.
    subjects : pandas.DataFrame
        One row per image and detector.

    Returns
    -------
    figures : list of Figure
        None of a modality of which no image is there.
    absent : str
        What could not be shown, in words; empty if all is there.
    """
    root = Path(root)
    figures, problems, total = [], [], 0
    for modality, scans in subjects.groupby("modality", sort=True):
        cases = {
            detector: [(case, _try(root, case, problems)) for case in choose_cases(rows)]
            for detector, rows in scans.groupby("detector", sort=True)
        }
        cases = {detector: found for detector, found in cases.items() if found}
        total += sum(map(len, cases.values()))
        if any(shown is not None for found in cases.values() for _, shown in found):
            figures.append(_draw(modality, cases))
    if not problems:
        return figures, ""
    first = str(problems[0]).replace(f"{root}/", "")
    start = f"{len(problems)} of {total} examples cannot be shown" if figures else "No example can be shown"
    return figures, f"{start}. The first: {first}."


def _try(root: Path, case: Case, problems: list[InputError]) -> Slice | None:
    try:
        return read_slice(root, case.scan)
    except InputError as error:
        problems.append(error)
        return None


def _draw(modality: str, cases: dict[str, list[tuple[Case, Slice | None]]]) -> Figure:
    """Lay out the cases: two detectors in a row, three slices each."""
    shown = [part for found in cases.values() for _, part in found if part is not None]
    rows, columns = (max(part.grey.shape[axis] for part in shown) for axis in (0, 1))
    across = min(2, len(cases))
    width = (WIDTH - 2 * MARGIN - (across - 1) * BETWEEN - across * 2 * GAP) / (3 * across)
    scale = width / columns
    height = rows * scale
    step = height + 74
    svg = Svg(WIDTH, step * -(-len(cases) // across) + 26, f"Examples of every detector: {modality}")
    for number, (detector, found) in enumerate(cases.items()):
        left = MARGIN + (number % across) * (3 * width + 2 * GAP + BETWEEN)
        top = (number // across) * step
        svg.text(left, top + 19, detector_name(detector), size=14, weight=600)
        for place, (case, part) in enumerate(found):
            x, y = left + place * (width + GAP), top + 28
            svg.rect(x, y, width, height, "#000000" if part else _SHADE)
            if part is None:
                svg.text(x + width / 2, y + height / 2, "not on disk", colour="#ffffff", anchor="middle")
            else:
                _tile(svg, part, x, y, width, height, scale)
            _caption(svg, case, part, x + width / 2, y + height)
    _legend(svg)
    return Figure(
        f"examples_{modality}",
        f"Best, median and worst case: {modality}",
        "By Dice at the fixed threshold, of the scans with a lesion in their mask; the axial slice that "
        "holds most of the lesion. The subject's left is on the left. Point at a slice to see it bare.",
        svg.render(),
    )


def _caption(svg: Svg, case: Case, part: Slice | None, x: float, y: float) -> None:
    """Write under a tile whose case it is, with a link to the report."""
    scan = case.scan
    words = f"{case.which}: Dice {fixed(scan['dice'])}"
    svg.text(x, y + 16, words, size=12.5, anchor="middle", weight=600)
    who = [scan[key] for key in ("participant_id", "session_id", "report")]
    *names, report = [text if isinstance(text, str) else "" for text in who]
    where = " ".join(name for name in names if name) + (f", {part.place}" if part else "")
    svg.text(x, y + 31, where, size=11, colour=MUTED, anchor="middle", href=report)


def _tile(svg: Svg, part: Slice, x: float, y: float, width: float, height: float, scale: float) -> None:
    """Draw one slice in the middle of its tile."""
    rows, columns = part.grey.shape
    left, top = x + (width - columns * scale) / 2, y + (height - rows * scale) / 2
    box = (left, top, columns * scale, rows * scale)
    svg.open('g class="bare"')
    svg.image(*box, _encoded(Image.fromarray(part.grey), "JPEG", quality=QUALITY), "jpeg")
    svg.open('g class="overlay"')
    svg.image(*box, _encoded(_coloured(part.found), "PNG", optimize=True), "png")
    svg.outline(contour(part.lesion, 0.5, left, top, scale), LESION_COLOUR, 1.6)
    svg.close("g")
    svg.close("g")
    for edge, label in zip((x + 4, x + width - 4), EDGE_LABELS["axial"], strict=True):
        anchor = "start" if edge < x + width / 2 else "end"
        svg.text(edge, y + 13, label, size=10.5, colour="#9aa0a6", anchor=anchor)


def _coloured(found: np.ndarray) -> Image.Image:
    """Make a picture of a mask that is transparent outside it."""
    picture = Image.fromarray(found.astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, *FOUND_COLOUR])
    picture.info["transparency"] = bytes([0, FOUND_OPACITY])
    return picture


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **picture.info, **options)
    return buffer.getvalue()


def _legend(svg: Svg) -> None:
    y = svg.height - 10
    svg.rect(MARGIN, y - 10, 20, 11, "#{:02x}{:02x}{:02x}".format(*FOUND_COLOUR), 0.75, 2)
    svg.text(MARGIN + 27, y, "above the fixed threshold", size=12.5)
    svg.line(MARGIN + 206, y - 4, MARGIN + 228, y - 4, "#10a89c", 2.4)
    svg.text(MARGIN + 235, y, "outline of the true lesion", size=12.5)
