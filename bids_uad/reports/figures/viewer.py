"""Interactive viewer: a page with three planes of a scan, its anomaly map and mask, and a crosshair."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap
from nilearn.plotting import view_img
from scipy import ndimage

from bids_uad.files import write_text
from bids_uad.reports.figures.display import Volume, bounding_box
from bids_uad.reports.figures.overlay import LESION_COLOUR, THRESHOLD_COLOUR, ColourScale, main_finding

_STYLE = (
    "body{margin:0 auto;max-width:1400px;padding:0 16px;background:#000;color:#e8eaed;"
    "font:15px/1.5 system-ui,sans-serif}h1{font-size:21px;margin:14px 0 4px}p{margin:4px 0}a{color:#8ecdf5}"
    ".clinic{background:#7a1f00;font-weight:600;text-align:center;padding:5px}canvas{cursor:crosshair}"
)


def write_viewer(
    target: Path,
    scan: Volume,
    brain: np.ndarray,
    scores: np.ndarray,
    *,
    title: str,
    threshold: float | None,
    mask: np.ndarray | None = None,
    components: np.ndarray | None = None,
    lesion: np.ndarray | None = None,
    report: str = "",
) -> Path:
    """Write an HTML page that shows an anomaly map on the scan with the viewer of nilearn.

    The page needs no other file and no network. It is the same each time.

    Parameters
    ----------
    target : pathlib.Path
        HTML file to write, about 2 to 4 MB.
    scan : Volume
        Scaled to [0, 1], RAS+, with isotropic voxels.
    brain : numpy.ndarray of bool
        Brain mask, on the grid of `scan` as all following arrays; the page shows its bounding box.
    scores : numpy.ndarray
        Anomaly map, coloured as in the anomaly figure.
    title : str
        Heading of the page.
    threshold : float or None
        Fixed threshold, from which colours are opaque.
    mask : numpy.ndarray of bool, optional
        Anomaly mask; the voxels at its surface are white.
    components : numpy.ndarray of int, optional
        Labels of the components; the crosshair starts at the highest score of the largest.
    lesion : numpy.ndarray of bool, optional
        Ground truth; the voxels at its surface are cyan.
    report : str, default=""
        Relative URL of the participant report; empty for no link.

    Returns
    -------
    pathlib.Path
        Path of the page.
    """
    box = bounding_box(brain)
    shown, heat = scan.crop(box), np.where(brain[box], scores[box], 0).astype(np.float32)
    scale = ColourScale.of(heat[brain[box]], threshold)
    focus = main_finding(heat, None if components is None else components[box])
    overlay = np.where(heat > scale.low, np.minimum(heat, scale.high), 0)
    overlay[(overlay == 0) & (heat > scale.low)] = np.finfo(np.float32).tiny  # 0 is transparent
    # Values beyond the colour scale have colours of their own.
    beyond, words = scale.high - scale.low, ["Colours: anomaly score, transparent if low."]
    if mask is not None:
        overlay[_surface(mask[box])] = scale.high + beyond
        words.append("White: surface of the anomaly mask.")
    if lesion is not None:
        overlay[_surface(lesion[box])] = scale.low - beyond
        words.append("Cyan: surface of the lesion (ground truth).")
    colours = ListedColormap(scale.palette()[1:] / 255).with_extremes(
        under=LESION_COLOUR, over=THRESHOLD_COLOUR
    )
    view = view_img(
        nib.Nifti1Image(overlay, shown.affine),
        bg_img=nib.Nifti1Image(np.clip(shown.data, 0, 1).astype(np.float32), shown.affine),
        cut_coords=nib.affines.apply_affine(shown.affine, focus),
        threshold=0,
        cmap=colours,
        symmetric_cmap=False,
        vmin=scale.low,
        vmax=scale.high,
        black_bg=True,
        dim=0,
        resampling_interpolation="nearest",
    )
    link = f' <a href="{escape(report)}">Report</a>' if report else ""
    heading = (
        '<div class="clinic">Research software. Not for clinical use.</div>'
        f"<h1>{escape(title)}</h1><p>Click or drag in a plane to move the crosshair. {' '.join(words)} "
        f"Coordinates: SRI24, mm; L: left.{link}</p>"
    )
    return write_text(target, _edit(view.html, title, heading))


def _surface(mask: np.ndarray) -> np.ndarray:
    """Return the voxels of a mask with a face on its outside."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)


def _edit(page: str, title: str, heading: str) -> str:
    """Give nilearn's page a title and heading, fixed ids, and no icon from the network."""
    page = re.sub(r'<link rel="icon".*?>', "", page, count=1, flags=re.DOTALL)
    page = re.sub(r"<title>.*?</title>", f"<title>{escape(title)}</title>", page, count=1)
    page = page.replace("</head>", f"<style>{_STYLE}</style></head>", 1)
    page = page.replace("<body>", f"<body>{heading}", 1)
    found = re.search(r"div_viewer-([0-9a-f]{32})", page)
    return page.replace(found[1], "scan") if found else page
