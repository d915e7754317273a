"""Map of the false positives of the packaged models on real scans, a figure for the card of a model.

``python -m benchmarks.false_positives OUT`` reads the masks that ``benchmarks.real`` wrote to OUT, and draws
the number of participants with a false positive at each voxel over the SRI24 template. Participants of the
training data are not in OUT; patients without a lesion mask are left out. No scan is shown.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from nilearn.plotting import plot_stat_map
from scipy.ndimage import gaussian_filter1d

from benchmarks.scan import read
from bids_uad.config import MODALITIES
from bids_uad.dataset.naming import detector_desc
from bids_uad.dataset.participants import Participants, read_participants
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed, sibling_output
from bids_uad.engine.bundle import Bundle, resolve_bundles
from bids_uad.files import atomic_path
from bids_uad.preprocessing.reference import resolve_reference
from bids_uad.space import AFFINE, SHAPE

PICTURE = "false_positives.png"
N_SLICES = 7
SLICE_GAP = 10
"""Minimum distance of two slices of the figure in mm."""


@dataclass
class Marked:
    """Number of participants with a false positive at each voxel.

    Parameters
    ----------
    counts : numpy.ndarray of int, shape SHAPE
        Number of participants, by voxel.
    healthy, patients : int, default=0
        Numbers of healthy controls and patients that were counted.
    """

    counts: np.ndarray
    healthy: int = 0
    patients: int = 0


def count_marked(scans: list[PreprocessedScan], bundle: Bundle, people: Participants) -> Marked:
    """Count the participants with a false positive at each voxel."""
    marked = Marked(np.zeros(SHAPE, dtype=int))
    desc = detector_desc(bundle.modality, bundle.scored_as)
    for scan in scans:
        healthy = people.person(scan.subject, scan.session).healthy
        path = sibling_output(scan.image, f"label-anomaly_desc-{desc}_mask.nii.gz")
        if not path.is_file() or not (healthy or scan.lesion):
            continue
        lesion = read(scan.lesion) > 0 if scan.lesion else False
        marked.counts += (read(path) > 0) & np.logical_not(lesion)
        marked.healthy += int(healthy)
        marked.patients += int(not healthy)
    return marked


def slices_to_show(counts: np.ndarray) -> list[float]:
    """Choose the axial slices with most false positives, at least `SLICE_GAP` apart.

    Returns
    -------
    list of float
        World coordinates in mm, ascending.
    """
    sums = gaussian_filter1d(counts.sum((0, 1)).astype(float), 1.5)
    chosen: list[int] = []
    for z in np.argsort(-sums, kind="stable"):
        if len(chosen) < N_SLICES and all(abs(z - other) >= SLICE_GAP for other in chosen):
            chosen.append(int(z))
    return [float(nib.affines.apply_affine(AFFINE, (0, 0, z))[2]) for z in sorted(chosen)]


def draw(marked: Marked, template: Path, title: str, path: Path) -> None:
    """Draw the counts over the template."""
    display = plot_stat_map(
        nib.Nifti1Image(marked.counts.astype(np.float32), AFFINE),
        bg_img=str(template),
        display_mode="z",
        cut_coords=slices_to_show(marked.counts),
        threshold=0.5,
        vmin=0,
        vmax=max(2, int(marked.counts.max())),
        cmap="autumn",
        cbar_tick_format="%.0f",
        title=title,
        black_bg=True,
        resampling_interpolation="nearest",
    )
    with atomic_path(path) as temporary:
        display.savefig(temporary, dpi=90)
    display.close()


def main() -> None:
    """Draw a figure for every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=["pls"], help="as of bids_uad (default: pls)")
    parser.add_argument("--atlas-dir", type=Path, help="folder with tpl-SRI24")
    args = parser.parse_args()
    people = read_participants(args.out)
    with TemporaryDirectory() as cache:
        reference = resolve_reference(args.atlas_dir, cache)
        for bundle in resolve_bundles(args.models, MODALITIES, (), skip_missing=True):
            marked = count_marked(find_preprocessed(args.out, bundle.modality), bundle, people)
            title = f"false positives of {marked.healthy} healthy participants and {marked.patients} patients"
            template = reference.t2w if bundle.modality == "T2w" and reference.t2w else reference.t1w
            draw(marked, template, title, bundle.folder / PICTURE)
            print(f"{bundle.name}: {title} -> {bundle.folder / PICTURE}")


if __name__ == "__main__":
    main()
