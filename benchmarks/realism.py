"""Comparison of synthetic with real brains: slices side by side, statistics of intensity and gradient.

``python -m benchmarks.realism REAL SYNTHETIC OUT --modality T1w`` compares two folders of preprocessed scans.
REAL is the output of ``bids_uad DATA REAL participant --models none``. The slices are drawn to OUT,
the statistics to ``benchmarks/results/realism-T1w.json``, with a figure of the histograms.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import ndimage
from scipy.spatial.distance import jensenshannon

from benchmarks.scan import read
from bids_uad.config import MODALITIES
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed

RESULTS = Path(__file__).parent / "results"
INTENSITY = np.linspace(0, 1.2, 61)
GRADIENT = np.linspace(0, 0.4, 61)  # per mm
SLICES = (50, 75, 100)
SHOWN = 5
MARGIN = 3  # mm of brain edge excluded from the gradients, since the mask has a step there


@dataclass(frozen=True)
class Statistics:
    """Histograms of scans, one row each, as fractions.

    Attributes
    ----------
    intensity, gradient : numpy.ndarray, shape (scans, bins)
    """

    intensity: np.ndarray
    gradient: np.ndarray


def shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return a histogram that sums to 1; values beyond the edges are in the outermost bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts / counts.sum()


def statistics(scans: list[PreprocessedScan]) -> Statistics:
    """Histograms of intensity and of gradient magnitude inside the brain."""
    intensity, gradient = [], []
    for scan in scans:
        volume, brain = read(scan.image), read(scan.brain) > 0
        intensity.append(shares(volume[brain], INTENSITY))
        inner = ndimage.binary_erosion(brain, iterations=MARGIN)
        slope = np.sqrt(sum(part**2 for part in np.gradient(volume)))
        gradient.append(shares(slope[inner], GRADIENT))
    return Statistics(np.array(intensity), np.array(gradient))


def distances(real: np.ndarray, synthetic: np.ndarray) -> dict[str, float]:
    """Jensen-Shannon distances (base 2, 0 to 1).

    Returns
    -------
    dict
        ``mean_to_mean``: between the mean histograms. ``nearest``: mean over synthetic scans of that to the
        nearest real one. ``real_nearest``: the same among real scans, which is as near as one can ask for.
    """
    between = [min(jensenshannon(one, other, 2) for other in real) for one in synthetic]
    among = [
        min(jensenshannon(one, other, 2) for k, other in enumerate(real) if k != own)
        for own, one in enumerate(real)
    ]
    return {
        "mean_to_mean": float(jensenshannon(real.mean(0), synthetic.mean(0), 2)),
        "nearest": float(np.mean(between)),
        "real_nearest": float(np.mean(among)) if len(real) > 1 else float("nan"),
    }


def draw_slices(real: list[PreprocessedScan], synthetic: list[PreprocessedScan], path: Path) -> None:
    """Put slices of real scans (left) beside those of synthetic ones (right)."""
    columns = [*real[:SHOWN], *synthetic[:SHOWN]]
    figure, axes = plt.subplots(
        len(SLICES), len(columns), figsize=(1.8 * len(columns), 6.6), facecolor="black", squeeze=False
    )
    for scan, column in zip(columns, axes.T, strict=True):
        volume = read(scan.image)
        for level, axis in zip(SLICES, column, strict=True):
            axis.imshow(volume[::-1, :, level].T[20:225, 35:205], cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
        column[0].set_title(
            f"{'real' if scan in real else 'synthetic'}\n{scan.subject}", color="w", fontsize=8
        )
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_histograms(real: Statistics, synthetic: Statistics, path: Path) -> None:
    """Mean histograms with the range between the 10th and the 90th percentile of the scans."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    panels = ((INTENSITY, "intensity", "intensity"), (GRADIENT, "gradient", "gradient magnitude, 1/mm"))
    for axis, (edges, name, label) in zip(axes, panels, strict=True):
        centres = (edges[1:] + edges[:-1]) / 2
        for cohort, title, colour in ((real, "real", "#1b6ca8"), (synthetic, "synthetic", "#d1495b")):
            rows = getattr(cohort, name)
            axis.plot(centres, rows.mean(0), color=colour, label=f"{title}, {len(rows)} scans")
            axis.fill_between(centres, *np.quantile(rows, (0.1, 0.9), axis=0), color=colour, alpha=0.2, lw=0)
        axis.set_xlabel(label)
        axis.set_ylabel("share of brain voxels")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Compare two folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("real", type=Path)
    parser.add_argument("synthetic", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--modality", choices=MODALITIES, default="T1w")
    args = parser.parse_args()
    real, synthetic = (find_preprocessed(folder, args.modality) for folder in (args.real, args.synthetic))
    args.out.mkdir(parents=True, exist_ok=True)
    draw_slices(real, synthetic, args.out / f"slices-{args.modality}.png")
    of_real, of_synthetic = statistics(real), statistics(synthetic)
    draw_histograms(of_real, of_synthetic, RESULTS / f"realism-{args.modality}.png")
    results = {
        "real": [scan.subject for scan in real],
        "n_synthetic": len(synthetic),
        "intensity": distances(of_real.intensity, of_synthetic.intensity),
        "gradient": distances(of_real.gradient, of_synthetic.gradient),
        "median_gradient": {
            name: float(np.mean(GRADIENT[np.argmax(cohort.gradient.cumsum(1) >= 0.5, axis=1)]))
            for name, cohort in (("real", of_real), ("synthetic", of_synthetic))
        },
    }
    (RESULTS / f"realism-{args.modality}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
