"""One synthetic person: anatomy, age, lesion and the noise-free signal of each scan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from bids_uad.simulation import (
    ageing,
    contrast,
    deformation,
)
from bids_uad.simulation import (
    pathology as lesions,
)
from bids_uad.simulation.acquisition import (
    Protocol,
    Scanner,
    brain_mask,
    draw_scan_settings,
    draw_scanner,
)
from bids_uad.simulation.anatomy import (
    BUILT_IN,
    CLASSES,
    Source,
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
TISSUE_LABELS = tuple(sorted(set(TISSUES.values())))
STREAMS = (
    "person",
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
)


def random_stream(seed: int, index: int, purpose: str) -> np.random.Generator:
    """Random numbers of one purpose for one subject.

    Purposes do not share a stream, so giving a subject a lesion changes nothing else about it.
    """
    return np.random.default_rng([seed, index, STREAMS.index(purpose)])


@dataclass(frozen=True)
class SubjectInfo:
    """Who a subject is.

    Attributes
    ----------
    age : float
        Years.
    sex : {"F", "M"}
    scanner : Scanner
    source : str
        `BUILT_IN` or the path of a label map.
    """

    age: float
    sex: str
    scanner: Scanner
    source: str


@dataclass
class Anatomy:
    """The truth about one subject, on the box.

    Attributes
    ----------
    fractions : torch.Tensor, shape (len(CLASSES), X, Y, Z)
    detail : torch.Tensor or None
    change : torch.Tensor, shape (X, Y, Z)
        Age-related white matter change.
    brain : torch.Tensor of bool, shape (X, Y, Z)
    lesion : lesions.Lesion or None
    source : Source
    drawn : dict
        Parameters for the record.
    """

    fractions: torch.Tensor
    detail: torch.Tensor | None
    change: torch.Tensor
    brain: torch.Tensor
    lesion: lesions.Lesion | None
    source: Source
    drawn: dict = field(default_factory=dict)

    def tissue_labels(self) -> torch.Tensor:
        """Largest tissue per voxel as in `TISSUES`, 0 outside the brain; uint8, shape (X, Y, Z)."""
        shares = [
            sum(self.fractions[i] for i, name in enumerate(CLASSES) if TISSUES[name] == tissue)
            for tissue in TISSUE_LABELS
        ]
        largest = shares[0] + (1 - self.fractions.sum(0)).clamp_min(0)
        labels = torch.ones(largest.shape, dtype=torch.uint8)
        for tissue, share in enumerate(shares[1:], start=2):
            labels[share > largest] = tissue
            largest = torch.maximum(largest, share)
        return labels * self.brain


@dataclass(frozen=True)
class Population:
    """What the subjects of a cohort are drawn from.

    Parameters
    ----------
    seed : int
    sources : tuple of str
        `BUILT_IN` and paths of label maps.
    scanners : int
        How many there are; each subject was in one of them.
    randomised : bool
        Contrasts of no scanner on earth instead of realistic ones.
    shapes : dict
        Masks of real lesions by kind; kinds without any are drawn.
    lesion_volume : tuple of float, optional
        Least and largest, mL.
    lesion_contrast : float
        See `lesions.Lesion`.
    """

    seed: int
    sources: tuple[str, ...] = (BUILT_IN,)
    scanners: int = 5
    randomised: bool = False
    shapes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lesion_volume: tuple[float, float] | None = None
    lesion_contrast: float = 1.0

    def lesion_target(self, index: int, kind: str, points: torch.Tensor) -> lesions.LesionTarget:
        """What the lesion of a subject should be like."""
        rng = random_stream(self.seed, index, "lesion-shape")
        paths = self.shapes.get(kind)
        shape = real_shape(str(rng.choice(paths)), points, rng) if paths else None
        return lesions.LesionTarget(shape, self.volume(index), self.lesion_contrast)

    def volume(self, index: int) -> float | None:
        """Volume that a subject's lesion should have, mL; small and large ones by order of magnitude."""
        if self.lesion_volume is None:
            return None
        rng = random_stream(self.seed, index, "lesion-volume")
        return float(np.exp(rng.uniform(*np.log(self.lesion_volume))))


def draw_subject_info(world: Population, index: int) -> SubjectInfo:
    """Draw age, sex, scanner and source of anatomy.

    Parameters
    ----------
    world : Population
    index : int

    Returns
    -------
    SubjectInfo
    """
    rng = random_stream(world.seed, index, "person")
    age = float(np.round(rng.uniform(20.0, 85.0), 1))
    sex = str(rng.choice(["F", "M"]))
    number = int(rng.integers(world.scanners))
    scanner = draw_scanner(number, world.randomised, random_stream(world.seed, number, "scanner"))
    return SubjectInfo(age, sex, scanner, world.sources[int(rng.integers(len(world.sources)))])


def make_anatomy(world: Population, index: int, person: SubjectInfo, kind: str | None) -> Anatomy:
    """Make the tissue maps, the brain mask and the lesion of a subject.

    Parameters
    ----------
    world : Population
    index : int
    person : SubjectInfo
    kind : str or None
        One of `lesions.KINDS`, or None for a healthy subject.

    Returns
    -------
    Anatomy
    """
    seed = world.seed
    source = template_source() if person.source == BUILT_IN else label_map_source(person.source)
    rng = random_stream(seed, index, "shape")
    size = np.exp(rng.normal(0.0, 0.02) + rng.normal(0.0, 0.012, 3)) * (1.015 if person.sex == "M" else 0.985)
    # Two label maps in one family of heads would look alike without a mirror image now and then.
    mirror = np.diag([-1.0 if rng.uniform() < 0.5 else 1.0, 1.0, 1.0])
    angles = tensor(np.deg2rad(rng.normal(0.0, 1.2, 3))).float()
    turn = mirror @ rotation(angles).double().cpu().numpy()
    amplitude = float(rng.uniform(1.5, 3.0))
    displacement = deformation.individual(rng, amplitude)

    age_rng = random_stream(seed, index, "age")
    growth = ageing.ventricle_growth(age_rng, person.age, ageing.apparent_age(source.fractions))
    plain = deformation.source_points(displacement[:, ::2, ::2, ::2] * 0, size, turn, step=2)
    ventricle = sample(source.fractions[ageing.VENTRICLE][None], source.affine, plain)[0]
    displacement = displacement + deformation.expansion(ventricle, growth)
    site = None
    if kind == "tumour":
        lesion_rng = random_stream(seed, index, "lesion")
        site = lesions.draw_tumour_site(lesion_rng, world.volume(index))
        displacement = displacement + deformation.push(*site, float(lesion_rng.uniform(1.0, 5.0)))
    displacement = deformation.remove_folds(displacement)
    points = deformation.source_points(displacement, size, turn)

    inside = nonzero_points(source.fractions.sum(0), source.affine, points)
    fractions = sample_inside(source.fractions, source.affine, points, inside)
    detail = None
    if source.detail is not None:
        detail = sample_inside(source.detail[None], source.affine, points, inside)[0]
    fractions, sulci = ageing.widen_sulci(fractions, age_rng, person.age)
    change, white_change = ageing.white_matter_change(fractions, age_rng, person.age)
    brain, rim = brain_mask(fractions, random_stream(seed, index, "mask"))
    lesion = None
    if kind is not None:
        target = world.lesion_target(index, kind, points)
        lesion = lesions.make_lesion(
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
    return Anatomy(fractions, detail, change, brain, lesion, source, drawn)


def make_signal(
    world: Population, index: int, person: SubjectInfo, anatomy: Anatomy, modality: str
) -> tuple[torch.Tensor, Protocol, dict]:
    """Noise-free signal of one scan, and the settings to acquire it with.

    Parameters
    ----------
    world : Population
    index : int
    person : SubjectInfo
    anatomy : Anatomy
    modality : {"T1w", "T2w"}

    Returns
    -------
    image : torch.Tensor, shape (X, Y, Z)
    protocol : Protocol
    drawn : dict
        Class means and protocol, for the record.
    """
    rng = random_stream(world.seed, index, modality)
    protocol = draw_scan_settings(person.scanner, modality, rng)
    means = contrast.vary(person.scanner.means[modality], rng)
    image = contrast.signal(modality, anatomy.fractions, means, anatomy.detail, anatomy.change, rng)
    if anatomy.lesion is not None:
        painter = random_stream(world.seed, index, f"{modality}-lesion")
        image = lesions.paint(modality, image, anatomy.lesion, means, painter)
    return image, protocol, {"means": means, "protocol": asdict(protocol)}
