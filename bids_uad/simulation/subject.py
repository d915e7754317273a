"""One simulated subject: anatomy, age, lesion and the noise-free signal of each scan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from bids_uad.simulation import ageing, contrast, deformation, pathology, variants
from bids_uad.simulation.acquisition import (
    Scanner,
    ScanSettings,
    draw_brain_mask,
    draw_scan_settings,
    draw_scanner,
)
from bids_uad.simulation.anatomy import (
    BUILT_IN,
    CLASSES,
    TissueMaps,
    label_map_source,
    rotation,
    template_source,
)
from bids_uad.simulation.shapes import real_shape
from bids_uad.simulation.spatial import (
    nonzero_points,
    sample,
    sample_inside,
    tensor,
)

TISSUES = {
    "csf": 1,
    "ventricle": 1,
    "choroid": 1,
    "cortex": 2,
    "cerebellar_cortex": 2,
    "white": 3,
    "cerebellar_white": 3,
    "thalamus": 4,
    "striatum": 4,
    "pallidum": 4,
    "hippocampus": 4,
    "brainstem": 5,
}
"""Label of the tissue segmentation by class."""
TISSUE_LABELS = tuple(sorted(set(TISSUES.values())))
STREAMS = (
    "subject",
    "shape",
    "mask",
    "age",
    "lesion",
    "pose",
    "T1w",
    "T1w-scan",
    "T1w-lesion",
    "T2w",
    "T2w-scan",
    "T2w-lesion",
    "scanner",
    "lesion-volume",
    "lesion-shape",
    "random-contrast",
    "FLAIR",
    "FLAIR-scan",
    "FLAIR-lesion",
    "variants",
    "T1w-variants",
    "T2w-variants",
    "FLAIR-variants",
)
"""Purposes of random numbers. The position of a purpose is part of its seed, so new ones are appended."""


def random_stream(seed: int, index: int, purpose: str) -> np.random.Generator:
    """Return the random numbers of one purpose for one subject.

    Purposes do not share random numbers, so that a subject with a lesion is otherwise equal to the same
    subject without.

    Parameters
    ----------
    seed : int
        Seed of the dataset.
    index : int
        Index of the subject (of the scanner for "scanner").
    purpose : str
        One of `STREAMS`.

    Returns
    -------
    numpy.random.Generator
        New generator, with the same random numbers for every call.
    """
    return np.random.default_rng([seed, index, STREAMS.index(purpose)])


@dataclass(frozen=True)
class SubjectInfo:
    """Demographics, scanner and anatomy source of a subject.

    Attributes
    ----------
    age : float
        Age, years.
    sex : {"F", "M"}
        Sex.
    scanner : Scanner
        Scanner of all scans.
    source : str
        `BUILT_IN` or the path of a label map.
    """

    age: float
    sex: str
    scanner: Scanner
    source: str


@dataclass
class Anatomy:
    """Anatomy of one subject, on the box.

    Attributes
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
        Tissue maps.
    detail : torch.Tensor or None, shape (X, Y, Z)
        Residual T1w intensity, see `anatomy.TissueMaps`.
    change : torch.Tensor, shape (X, Y, Z)
        Age-related white matter change, 0 to 1.
    brain : torch.Tensor of bool, shape (X, Y, Z)
        Brain mask.
    lesion : pathology.Lesion or None
        Lesion; None for a healthy subject.
    source : TissueMaps
        Tissue maps before the deformation.
    drawn : dict, default={}
        Drawn parameters.
    findings : list of variants.Finding, default=[]
        Normal findings.
    """

    fractions: torch.Tensor
    detail: torch.Tensor | None
    change: torch.Tensor
    brain: torch.Tensor
    lesion: pathology.Lesion | None
    source: TissueMaps
    drawn: dict = field(default_factory=dict)
    findings: list[variants.Finding] = field(default_factory=list)

    def tissue_labels(self) -> torch.Tensor:
        """Return the label of the largest tissue per voxel (see `TISSUES`); 0 outside the brain."""
        fractions = [
            sum(self.fractions[i] for i, name in enumerate(CLASSES) if TISSUES[name] == tissue)
            for tissue in TISSUE_LABELS
        ]
        largest = fractions[0] + (1 - self.fractions.sum(0)).clamp_min(0)
        labels = torch.ones(largest.shape, dtype=torch.uint8)
        for tissue, fraction in enumerate(fractions[1:], start=2):
            labels[fraction > largest] = tissue
            largest = torch.maximum(largest, fraction)
        return labels * self.brain


@dataclass(frozen=True)
class Population:
    """Population from which the subjects of a cohort are drawn.

    Parameters
    ----------
    seed : int
        Seed of all random numbers.
    sources : tuple of str, default=(BUILT_IN,)
        Sources of anatomy: `BUILT_IN` and paths of label maps.
    scanners : int, default=5
        Number of scanners; each subject is scanned in one of them.
    randomised : bool, default=False
        Whether contrasts are random instead of realistic.
    random_contrast : float, default=0.0
        Fraction of subjects (0 to 1) whose contrasts are random and their own, whatever their scanner.
    normal_variants : bool, default=False
        Whether ages reach 90 instead of 85 years, subjects have normal findings and scans mild artefacts,
        see `variants`.
    shapes : dict, default={}
        Paths of real lesion masks by kind; lesions of other kinds are drawn.
    lesion_volume : tuple of float, default=None
        Smallest and largest volume, mL; if None, volumes are not scaled.
    lesion_contrast : float, default=1.0
        See `pathology.Lesion`.
    """

    seed: int
    sources: tuple[str, ...] = (BUILT_IN,)
    scanners: int = 5
    randomised: bool = False
    random_contrast: float = 0.0
    normal_variants: bool = False
    shapes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lesion_volume: tuple[float, float] | None = None
    lesion_contrast: float = 1.0

    def lesion_target(self, index: int, kind: str, points: torch.Tensor) -> pathology.LesionTarget:
        """Return the requested shape, volume and contrast of the lesion of a subject."""
        rng = random_stream(self.seed, index, "lesion-shape")
        paths = self.shapes.get(kind)
        shape = real_shape(str(rng.choice(paths)), points, rng) if paths else None
        return pathology.LesionTarget(shape, self.volume(index), self.lesion_contrast)

    def volume(self, index: int) -> float | None:
        """Draw the requested volume (mL) of a subject's lesion, uniformly on a logarithmic scale."""
        if self.lesion_volume is None:
            return None
        rng = random_stream(self.seed, index, "lesion-volume")
        return float(np.exp(rng.uniform(*np.log(self.lesion_volume))))


def draw_subject_info(population: Population, index: int) -> SubjectInfo:
    """Draw age, sex, scanner and source of anatomy.

    Parameters
    ----------
    population : Population
        Population.
    index : int
        Index of the subject.

    Returns
    -------
    SubjectInfo
        Drawn values.
    """
    rng = random_stream(population.seed, index, "subject")
    oldest = variants.OLDEST if population.normal_variants else 85.0
    age = float(np.round(rng.uniform(20.0, oldest), 1))
    sex = str(rng.choice(["F", "M"]))
    number = int(rng.integers(population.scanners))
    scanner = draw_scanner(number, population.randomised, random_stream(population.seed, number, "scanner"))
    contrast_rng = random_stream(population.seed, index, "random-contrast")
    if contrast_rng.uniform() < population.random_contrast:
        means = {
            modality: contrast.class_means(modality, "random", contrast_rng) for modality in scanner.means
        }
        scanner = replace(scanner, name=f"{scanner.name}-random", style="random", means=means)
    return SubjectInfo(age, sex, scanner, population.sources[int(rng.integers(len(population.sources)))])


def make_anatomy(population: Population, index: int, subject: SubjectInfo, kind: str | None) -> Anatomy:
    """Simulate the tissue maps, the brain mask and the lesion of a subject.

    Parameters
    ----------
    population : Population
        Population.
    index : int
        Index of the subject.
    subject : SubjectInfo
        Age, sex and source of anatomy.
    kind : str or None
        One of `pathology.KINDS`, or None for a healthy subject.

    Returns
    -------
    Anatomy
        Anatomy on the box.
    """
    seed = population.seed
    source = template_source() if subject.source == BUILT_IN else label_map_source(subject.source)
    rng = random_stream(seed, index, "shape")
    size = np.exp(rng.normal(0.0, 0.02) + rng.normal(0.0, 0.012, 3)) * (
        1.015 if subject.sex == "M" else 0.985
    )
    # Mirror images increase the variety of anatomies.
    mirror = np.diag([-1.0 if rng.uniform() < 0.5 else 1.0, 1.0, 1.0])
    angles = tensor(np.deg2rad(rng.normal(0.0, 1.2, 3))).float()
    turn = mirror @ rotation(angles).double().cpu().numpy()
    amplitude = float(rng.uniform(1.5, 3.0))
    displacement = deformation.random_deformation(rng, amplitude)

    age_rng = random_stream(seed, index, "age")
    growth = ageing.ventricle_growth(age_rng, subject.age, ageing.apparent_age(source.fractions))
    undeformed = deformation.source_points(displacement[:, ::2, ::2, ::2] * 0, size, turn, step=2)
    ventricle = sample(source.fractions[ageing.VENTRICLE][None], source.affine, undeformed)[0]
    displacement = displacement + deformation.expand_region(ventricle, growth)
    variants_rng, asymmetry = random_stream(seed, index, "variants"), None
    if population.normal_variants:
        side = undeformed[..., 0] - deformation.MIDLINE
        asymmetry = variants.asymmetric_ventricles(ventricle, side, variants_rng, subject.age)
        if asymmetry is not None:
            displacement = displacement + deformation.expand_region(*asymmetry)
    site = None
    if kind == "tumour":
        lesion_rng = random_stream(seed, index, "lesion")
        site = pathology.draw_tumour_site(lesion_rng, population.volume(index))
        displacement = displacement + deformation.mass_effect(*site, float(lesion_rng.uniform(1.0, 5.0)))
    displacement = deformation.remove_folds(displacement)
    points = deformation.source_points(displacement, size, turn)

    inside = nonzero_points(source.fractions.sum(0), source.affine, points)
    fractions = sample_inside(source.fractions, source.affine, points, inside)
    detail = None
    if source.detail is not None:
        detail = sample_inside(source.detail[None], source.affine, points, inside)[0]
    fractions, sulci = ageing.widen_sulci(fractions, age_rng, subject.age)
    change, white_change = ageing.white_matter_change(fractions, age_rng, subject.age)
    brain, rim = draw_brain_mask(fractions, random_stream(seed, index, "mask"))
    findings: list[variants.Finding] = []
    if population.normal_variants:
        side = points[..., 0] - deformation.MIDLINE
        found = variants.draw_findings(fractions, change, brain, side, subject.age, variants_rng)
        fractions, change, brain, findings = found.fractions, found.change, found.brain, found.findings
        rim |= {"variants": found.drawn | {"asymmetry_mm": asymmetry[1] if asymmetry else 0.0}}
    lesion = None
    if kind is not None:
        target = population.lesion_target(index, kind, points)
        lesion = pathology.make_lesion(
            kind, fractions, brain, lambda: random_stream(seed, index, "lesion"), site, target
        )
    drawn = {
        "source": source.name,
        "size": size.tolist(),
        "mirrored": bool(mirror[0, 0] < 0),
        "rotation_deg": np.rad2deg(angles.cpu().numpy()).tolist(),
        "deformation_mm": amplitude,
        "ventricle_growth_mm": growth,
        "sulcal_strength": sulci,
        "white_matter_change": white_change,
        **rim,
        "lesion": None if lesion is None else {"kind": kind, **lesion.drawn},
    }
    return Anatomy(fractions, detail, change, brain, lesion, source, drawn, findings)


def make_signal(
    population: Population, index: int, subject: SubjectInfo, anatomy: Anatomy, modality: str
) -> tuple[torch.Tensor, ScanSettings, dict]:
    """Simulate the noise-free signal of one scan, and draw its acquisition settings.

    Parameters
    ----------
    population : Population
        Population.
    index : int
        Index of the subject.
    subject : SubjectInfo
        Subject with its scanner.
    anatomy : Anatomy
        Anatomy of the subject.
    modality : {"T1w", "T2w", "FLAIR"}
        Contrast.

    Returns
    -------
    image : torch.Tensor, shape (X, Y, Z)
        Signal.
    settings : ScanSettings
        Acquisition settings.
    drawn : dict
        Class means and settings.
    """
    rng = random_stream(population.seed, index, modality)
    settings = draw_scan_settings(subject.scanner, modality, rng)
    means = contrast.jitter_means(subject.scanner.means[modality], rng)
    image = contrast.simulate_signal(modality, anatomy.fractions, means, anatomy.detail, anatomy.change, rng)
    extra, artefacts = {}, None
    if population.normal_variants:
        rng = random_stream(population.seed, index, f"{modality}-variants")
        image, signals = variants.add_findings(modality, image, anatomy.findings, means, rng)
        artefacts = variants.draw_artefacts(rng)
        extra = {"findings": signals, "artefacts": artefacts}
        settings = replace(settings, thickness=artefacts["thickness"] or settings.thickness)
    if anatomy.lesion is not None:
        rng = random_stream(population.seed, index, f"{modality}-lesion")
        image = pathology.add_lesion_signal(modality, image, anatomy.lesion, means, rng)
    if artefacts is not None:
        image = variants.add_artefacts(image, anatomy.fractions, anatomy.brain, artefacts)
    return image, settings, {"means": means, "protocol": asdict(settings), **extra}
