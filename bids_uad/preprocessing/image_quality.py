"""Image quality metrics of one scan, named and defined as in MRIQC.

Esteban et al. 2017, doi:10.1371/journal.pone.0184661. Two things differ, because no tissue segmentation is at
hand and many scans come skull-stripped: tissues are the classes of a Gaussian mixture of the intensities in
the brain, and without air around the head its noise counts as 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import median_abs_deviation
from sklearn.mixture import GaussianMixture

TISSUES = {"T1w": ("csf", "gm", "wm"), "T2w": ("wm", "gm", "csf")}
"""From dark to bright."""
FITTED_VOXELS = 50_000
FEWEST_VOXELS = 10
"""Of a tissue; with fewer there is none to speak of."""


@dataclass(frozen=True)
class Intensities:
    """What the metrics are computed from.

    Attributes
    ----------
    csf, gm, wm : numpy.ndarray, one-dimensional
        Intensities of the voxels that are most likely cerebrospinal fluid, grey and white matter.
    shares : dict
        Share of each tissue in the brain.
    """

    csf: np.ndarray
    gm: np.ndarray
    wm: np.ndarray
    shares: dict[str, float]


def tissue_intensities(values: np.ndarray, modality: str, seed: int = 0) -> Intensities:
    """Tell three tissues apart by intensity.

    Parameters
    ----------
    values : numpy.ndarray, one-dimensional
        Bias-corrected intensities in the brain.
    modality : {"T1w", "T2w"}
        Says which tissue is dark and which is bright.
    seed : int
        Of the voxels that the mixture is fitted to.

    Returns
    -------
    Intensities
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(values, [1, 99])
    kept = values[(values >= low) & (values <= high)]
    rng = np.random.default_rng(seed)
    fitted = rng.choice(kept, min(len(kept), FITTED_VOXELS), replace=False)[:, None]
    start = np.percentile(fitted, [10, 50, 85])[:, None]
    mixture = GaussianMixture(3, means_init=start, random_state=seed, max_iter=200).fit(fitted)
    order = np.argsort(mixture.means_[:, 0])
    posterior = mixture.predict_proba(kept[:, None])[:, order]
    names = TISSUES[modality]
    likeliest = posterior.argmax(axis=1)
    tissues = {name: kept[likeliest == k] for k, name in enumerate(names)}
    shares = {name: float(posterior[:, k].mean()) for k, name in enumerate(names)}
    return Intensities(**tissues, shares=shares)


def snr(tissue: np.ndarray) -> float:
    """Signal-to-noise ratio within a tissue: median over standard deviation."""
    return float(np.median(tissue) / np.std(tissue, ddof=1))


def cnr(wm: np.ndarray, gm: np.ndarray, air_std: float) -> float:
    """Contrast-to-noise ratio (Magnotta and Friedman 2006).

    Difference of the medians of white and grey matter over the noise of both and of the air.
    """
    noise = np.sqrt(air_std**2 + np.var(wm) + np.var(gm))
    return float(abs(np.median(wm) - np.median(gm)) / noise)


def cjv(wm: np.ndarray, gm: np.ndarray) -> float:
    """Coefficient of joint variation (Ganzetti et al. 2016): spread of both tissues over their contrast.

    Medians, and median absolute deviations scaled to standard deviations; higher is worse.
    """
    spread = median_abs_deviation(wm, scale="normal") + median_abs_deviation(gm, scale="normal")
    return float(spread / abs(np.median(wm) - np.median(gm)))


def efc(image: np.ndarray) -> float:
    """Entropy focus criterion (Atkinson et al. 1997), relative to that of a uniform image.

    Shannon entropy of the voxels' shares in the energy of the image: 1 if all are alike, 0 if one voxel has
    it all. Ghosts and blur from motion raise it.
    """
    values = np.abs(np.asarray(image, dtype=np.float64)).ravel()
    share = values / np.sqrt(np.sum(values**2))
    share = share[share > 0]
    largest = np.sqrt(values.size) * np.log(np.sqrt(values.size))
    return float(-(share * np.log(share)).sum() / largest)


def wm2max(wm: np.ndarray, image: np.ndarray) -> float:
    """Median of white matter over the 99.95th percentile of the image."""
    return float(np.median(wm) / np.percentile(image, 99.95))


def measure_image(image: np.ndarray, mask: np.ndarray, air: np.ndarray, modality: str) -> dict[str, float]:
    """Compute all metrics of a scan.

    Parameters
    ----------
    image : numpy.ndarray, three-dimensional
        Bias-corrected, whole head or brain.
    mask, air : numpy.ndarray of bool
        Brain, and the air around the head; the latter is empty in skull-stripped scans.
    modality : {"T1w", "T2w"}

    Returns
    -------
    dict
        ``snr_csf``, ``snr_gm``, ``snr_wm``, ``snr_total`` (their mean), ``cnr``, ``cjv``, ``efc``,
        ``wm2max``, ``icvs_csf``, ``icvs_gm`` and ``icvs_wm``; ``efc`` alone if no three tissues can be told
        apart. A ratio is left out where its denominator is 0.
    """
    tissues = tissue_intensities(image[mask], modality)
    if min(len(tissues.csf), len(tissues.gm), len(tissues.wm)) < FEWEST_VOXELS:
        return {"efc": efc(image)}
    ratios = {f"snr_{name}": snr(getattr(tissues, name)) for name in TISSUES["T1w"]}
    measured = {
        **ratios,
        "snr_total": float(np.mean(list(ratios.values()))),
        "cnr": cnr(tissues.wm, tissues.gm, float(np.std(image[air])) if air.any() else 0.0),
        "cjv": cjv(tissues.wm, tissues.gm),
        "efc": efc(image),
        "wm2max": wm2max(tissues.wm, image),
        **{f"icvs_{name}": tissues.shares[name] for name in TISSUES["T1w"]},
    }
    return {name: value for name, value in measured.items() if np.isfinite(value)}
