"""Examples in the group report: best, median and worst case of each detector.

The group level reads at most three scans per detector and modality, one at a time, and keeps one slice
of each.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image

from bids_uad.dataset.lesion_masks import written_mask
from bids_uad.dataset.naming import detector_desc, output_of_source
from bids_uad.errors import InputError
from bids_uad.evaluation.subjects import LESION
from bids_uad.files import REMEDY
from bids_uad.methods.registry import detector_name
from bids_uad.reports.charts import (
    INK,
    MUTED,
    PAPER,
    WIDTH,
    Chart,
)
from bids_uad.reports.figures.display import (
    EDGE_LABELS,
    bounding_box,
    load_ras,
    plane,
    plane_label,
    to_grey,
)
from bids_uad.reports.figures.overlay import LESION_COLOUR
from bids_uad.reports.figures.svg import Canvas, contour
from bids_uad.reports.group_text import fixed

FOUND_COLOUR = (255, 149, 0)
FOUND_OPACITY = 150
MARGIN, GAP, BETWEEN = 12, 6, 26
_SHADE = "#2b2f33"
_BOLD = 'font-weight="600"'


@dataclass(frozen=True)
class Case:
    """Scan that is shown as an example.

    Parameters
    ----------
    which : str
        `best`, `median`, `worst`, or `only`.
    scan : dict
        Row of the table of subjects.
    """

    which: str
    scan: dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """Axial slice, cropped to the brain.

    Parameters
    ----------
    grey : numpy.ndarray of uint8, shape (rows, columns)
        Image.
    found, lesion : numpy.ndarray of bool, shape (rows, columns)
        Anomaly mask and lesion mask.
    position : str
        World coordinate, such as ``z = 77``.
    """

    grey: np.ndarray
    found: np.ndarray
    lesion: np.ndarray
    position: str


def choose_cases(scans: pd.DataFrame) -> list[Case]:
    """Choose the best, the median and the worst case by Dice at the fixed threshold.

    Parameters
    ----------
    scans : pandas.DataFrame
        Rows of one detector and modality, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.

    Returns
    -------
    list of Case
        At most three cases, among the scans with a lesion mask that is not empty. Of scans with equal Dice,
        the one with the larger lesion is the worse; of an even number, the lower of the two middle scans is
        the median.
    """
    lesion_scans = scans[(scans["role"] == LESION) & (scans["n_lesion_voxels"] > 0)]
    ordered = lesion_scans.sort_values(
        ["dice", "n_lesion_voxels", "source_image"], ascending=[True, False, True]
    )
    last = len(ordered) - 1
    indices = {"best": last, "median": last // 2, "worst": 0}
    if last < 2:
        indices = {"best": 1, "worst": 0} if last == 1 else {"only": 0} if last == 0 else {}
    return [Case(which, ordered.iloc[index].to_dict()) for which, index in indices.items()]


def read_slice(root: Path, scan: dict[str, Any]) -> Slice:
    """Read the axial slice of a scan with the largest lesion area.

    Parameters
    ----------
    root : pathlib.Path
        Root of the derivative dataset.
    scan : dict
        Row of the table of subjects.

    Returns
    -------
    Slice
        Image and masks in this slice.

    Raises
    ------
    InputError
        If an image is missing, unreadable or on another grid.
    """
    source, modality, detector = (scan[key] for key in ("source_image", "modality", "detector"))
    desc = detector_desc(modality, detector)
    preprocessed = root / output_of_source(source, modality, f"desc-preproc_{modality}.nii.gz")
    lesion_path = written_mask(preprocessed)
    if lesion_path is None:
        raise InputError(preprocessed, "its lesion mask is missing", REMEDY)
    lesion = _read(lesion_path, bool)
    index = int(np.argmax(lesion.data.sum(axis=(0, 1))))
    truth, position = plane(lesion.data, "axial", index), plane_label(lesion, "axial", index)
    shape = lesion.data.shape
    shown = {}
    for suffix, kind in ((f"desc-preproc_{modality}", np.float32), (f"label-anomaly_desc-{desc}_mask", bool)):
        path = root / output_of_source(source, modality, f"{suffix}.nii.gz")
        volume = _read(path, kind)
        if volume.data.shape != shape:
            raise InputError(path, f"not on the grid of {lesion_path.name}", REMEDY)
        shown[kind] = plane(volume.data, "axial", index).copy()
    image, found = shown[np.float32], shown[bool]
    rows, columns, _ = bounding_box((image > 0)[:, :, None])
    return Slice(
        to_grey(image[rows, columns], 1.0), found[rows, columns], truth[rows, columns].copy(), position
    )


def _read(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise InputError(path, "is missing", REMEDY)
    try:
        return load_ras(path, kind)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise InputError(path, f"cannot be read ({error})", REMEDY) from error


def example_figures(root: str | Path, subjects: pd.DataFrame) -> tuple[list[Chart], str]:
    """Draw the cases of all detectors, one figure per modality.

    Parameters
    ----------
    root : path-like
        Root of the derivative dataset.
    subjects : pandas.DataFrame
        One row per image and detector, columns of :data:`bids_uad.evaluation.subjects.COLUMNS`.

    Returns
    -------
    figures : list of Chart
        Figures of the modalities with at least one readable example.
    problems : str
        Number of examples that cannot be shown, and the reason of the first; empty if there are none.
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
    return figures, f"{start}. First problem: {first}."


def _try(root: Path, case: Case, problems: list[InputError]) -> Slice | None:
    try:
        return read_slice(root, case.scan)
    except InputError as error:
        problems.append(error)
        return None


def _draw(modality: str, cases: dict[str, list[tuple[Case, Slice | None]]]) -> Chart:
    """Lay out the cases: two detectors per row, three slices each."""
    shown = [part for found in cases.values() for _, part in found if part is not None]
    rows, columns = (max(part.grey.shape[axis] for part in shown) for axis in (0, 1))
    across = min(2, len(cases))
    width = (WIDTH - 2 * MARGIN - (across - 1) * BETWEEN - across * 2 * GAP) / (3 * across)
    scale = width / columns
    height = rows * scale
    step = height + 74
    title = f"Examples of every detector: {modality}"
    canvas = Canvas(WIDTH, step * -(-len(cases) // across) + 26, title, background=PAPER, ink=INK)
    for number, (detector, found) in enumerate(cases.items()):
        left = MARGIN + (number % across) * (3 * width + 2 * GAP + BETWEEN)
        top = (number // across) * step
        canvas.text(left, top + 19, detector_name(detector), 14, attributes=_BOLD)
        for column, (case, part) in enumerate(found):
            x, y = left + column * (width + GAP), top + 28
            canvas.rect(x, y, width, height, "#000" if part else _SHADE)
            if part is None:
                canvas.text(x + width / 2, y + height / 2, "not available", 12, "middle", 'fill="#fff"')
            else:
                _tile(canvas, part, x, y, width, height, scale)
            _caption(canvas, case, part, x + width / 2, y + height)
    _legend(canvas)
    return Chart(
        f"examples_{modality}",
        f"Best, median and worst case: {modality}",
        "By Dice at the fixed threshold, among the scans whose lesion mask is not empty; axial slice with "
        "the largest lesion area. Left in the image is left of the subject. Hover over a slice to hide the "
        "masks.",
        canvas.render(),
    )


def _caption(canvas: Canvas, case: Case, part: Slice | None, x: float, y: float) -> None:
    """Write Dice and participant below a tile, with a link to the report."""
    scan = case.scan
    canvas.text(x, y + 16, f"{case.which}: Dice {fixed(scan['dice'])}", 12.5, "middle", _BOLD)
    texts = [scan[key] for key in ("participant_id", "session_id", "report")]
    *names, report = [text if isinstance(text, str) else "" for text in texts]
    label = " ".join(name for name in names if name) + (f", {part.position}" if part else "")
    if report:
        canvas.raw(f'<a href="{escape(report)}">')
    canvas.text(x, y + 31, label, 11, "middle", f'fill="{MUTED}"')
    if report:
        canvas.raw("</a>")


def _tile(canvas: Canvas, part: Slice, x: float, y: float, width: float, height: float, scale: float) -> None:
    """Draw one slice, centred in its tile."""
    rows, columns = part.grey.shape
    left, top = x + (width - columns * scale) / 2, y + (height - rows * scale) / 2
    canvas.open_group('class="bare"')
    canvas.embed(Image.fromarray(part.grey), left, top, scale, "jpeg")
    canvas.open_group('class="overlay"')
    palette = np.zeros((256, 4), np.uint8)
    palette[1] = (*FOUND_COLOUR, FOUND_OPACITY)
    canvas.indexed(part.found.astype(np.uint8), palette, left, top, scale)
    canvas.lines(contour(part.lesion, 0.5, left, top, scale), LESION_COLOUR, 1.6)
    canvas.close_group()
    canvas.close_group()
    for edge, label in zip((x + 4, x + width - 4), EDGE_LABELS["axial"], strict=True):
        anchor = "start" if edge < x + width / 2 else "end"
        canvas.text(edge, y + 13, label, 10.5, anchor, 'fill="#9aa0a6"')


def _legend(canvas: Canvas) -> None:
    y = canvas.height - 10
    canvas.rect(MARGIN, y - 10, 20, 11, "rgb({} {} {} / 0.75)".format(*FOUND_COLOUR))
    canvas.text(MARGIN + 27, y, "above the fixed threshold", 12.5)
    canvas.lines(f"M{MARGIN + 206} {y - 4}h22", LESION_COLOUR, 2.4)
    canvas.text(MARGIN + 235, y, "outline of the lesion mask", 12.5)
