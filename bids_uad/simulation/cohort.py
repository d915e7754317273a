"""Simulated cohorts, written as a raw BIDS dataset or as preprocessed derivatives in SRI24 space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import bids_uad
from bids_uad.files import write_json, write_text, write_tsv
from bids_uad.images import SCALING, save_image, scale_intensity
from bids_uad.resources import map_in_processes
from bids_uad.simulation.acquisition import simulate_preprocessed_scan
from bids_uad.simulation.native import NativeScan, simulate_native_scan
from bids_uad.simulation.spatial import tensor, to_grid
from bids_uad.simulation.subject import (
    Anatomy,
    Population,
    SubjectInfo,
    draw_subject_info,
    make_anatomy,
    make_signal,
    random_stream,
)
from bids_uad.space import to_image

REFERENCE = "https://www.nitrc.org/projects/sri24/"
BIDS_VERSION = "1.10.0"
DISEASES = {
    None: "none",
    "stroke": "stroke",
    "ms": "multiple sclerosis",
    "wmh": "white matter hyperintensities",
    "tumour": "tumour",
}
TISSUE_NAMES = {
    1: "cerebrospinal fluid",
    2: "cortical grey matter (cerebrum and cerebellum)",
    3: "white matter",
    4: "deep grey matter",
    5: "brainstem",
}


@dataclass(frozen=True)
class SimulatedCohort:
    """Dataset to simulate.

    Attributes
    ----------
    out : pathlib.Path
        Dataset folder.
    population : Population
        Population of the subjects.
    kinds : tuple of (str or None)
        Kind of lesion of each subject; None for a healthy one.
    modalities : tuple of str, default=("T1w", "T2w")
        Contrasts.
    derivatives : bool, default=False
        Whether to write preprocessed SRI24 images instead of raw scans.
    device : str, default="cpu"
        Torch device. Datasets of a CPU and of a GPU differ by rounding.
    """

    out: Path
    population: Population
    kinds: tuple[str | None, ...]
    modalities: tuple[str, ...] = ("T1w", "T2w")
    derivatives: bool = False
    device: str = "cpu"

    @property
    def seed(self) -> int:
        """Seed of the dataset."""
        return self.population.seed

    def name(self, index: int) -> str:
        """Return the BIDS name of a subject, from ``sub-001``."""
        return f"sub-{index + 1:03d}"


def _write_derivatives(cohort: SimulatedCohort, index: int, subject: SubjectInfo, anatomy: Anatomy) -> dict:
    """Write one subject in SRI24 space, and return the drawn parameters of its scans."""
    name = cohort.name(index)
    stem = cohort.out / name / "anat" / f"{name}_space-SRI24"
    drawn = {}
    for modality in cohort.modalities:
        image, settings, drawn[modality] = make_signal(cohort.population, index, subject, anatomy, modality)
        scan = simulate_preprocessed_scan(
            image, settings, anatomy.brain, random_stream(cohort.seed, index, f"{modality}-scan")
        )
        scaled = scale_intensity(scan.cpu().numpy(), anatomy.brain.cpu().numpy())
        target = stem.with_name(f"{stem.name}_desc-preproc_{modality}")
        save_image(to_image(to_grid(tensor(scaled))), target.with_suffix(".nii.gz"))
        write_json(
            target.with_suffix(".json"),
            {"SkullStripped": True, "SpatialReference": REFERENCE, "Scaling": SCALING, **_scanner(subject)},
        )
    truths = {"desc-brain_mask": anatomy.brain, "desc-tissue_dseg": anatomy.tissue_labels()}
    if anatomy.lesion is not None:
        truths["label-lesion_desc-manual_mask"] = anatomy.lesion.fraction > 0.5
    for suffix, truth in truths.items():
        target = stem.with_name(f"{stem.name}_{suffix}")
        save_image(to_image(to_grid(truth, np.uint8), np.uint8), target.with_suffix(".nii.gz"))
        sidecar = {"Description": "Known truth of a synthetic brain", "SpatialReference": REFERENCE}
        if suffix.endswith("_mask"):
            sidecar["Type"] = "Lesion" if "lesion" in suffix else "Brain"
        write_json(target.with_suffix(".json"), sidecar)
    return drawn


def _scanner(subject: SubjectInfo) -> dict:
    """Return the scanner fields of a sidecar."""
    return {
        "Modality": "MR",
        "Manufacturer": subject.scanner.manufacturer,
        "ManufacturersModelName": subject.scanner.name,
        "MagneticFieldStrength": subject.scanner.field_strength,
    }


def _write_raw(cohort: SimulatedCohort, index: int, subject: SubjectInfo, anatomy: Anatomy) -> dict:
    """Write one subject as raw scans on native grids, and return the drawn parameters of its scans."""
    name = cohort.name(index)
    drawn = {}
    for position, modality in enumerate(cohort.modalities):
        image, settings, drawn[modality] = make_signal(cohort.population, index, subject, anatomy, modality)
        scan = simulate_native_scan(
            image,
            settings,
            anatomy,
            random_stream(cohort.seed, index, "pose"),
            random_stream(cohort.seed, index, f"{modality}-scan"),
            truth=position == 0,
        )
        drawn[modality] |= scan.drawn
        target = cohort.out / name / "anat" / f"{name}_{modality}"
        save_image(scan.image, target.with_suffix(".nii.gz"))
        sidecar = _scanner(subject) | {"SkullStripped": True, "SliceThickness": max(settings.thickness, 1.0)}
        write_json(target.with_suffix(".json"), sidecar)
        if position == 0:
            _write_truth(cohort, name, modality, scan)
    return drawn


def _write_truth(cohort: SimulatedCohort, name: str, modality: str, scan: NativeScan) -> None:
    """Write tissue labels and lesion mask of a raw scan, on its grid, as derivatives."""
    source = f"bids:raw:{name}/anat/{name}_{modality}.nii.gz"
    common = {"Sources": [source], "SpatialReference": source}
    truths = [("tissue", "desc-tissue_dseg", scan.tissue, {"Description": "Known truth: largest tissue"})]
    if scan.lesion is not None:
        fields = {"Type": "Lesion", "Description": "Known truth: voxels that are more than half lesion"}
        truths.append(("lesions", "label-lesion_mask", scan.lesion, fields))
    for part, suffix, image, fields in truths:
        target = cohort.out / "derivatives" / part / name / "anat" / f"{name}_space-{modality}_{suffix}"
        save_image(image, target.with_suffix(".nii.gz"))
        write_json(target.with_suffix(".json"), common | fields)


def make_subject(cohort: SimulatedCohort, index: int) -> dict:
    """Simulate and write one subject.

    Parameters
    ----------
    cohort : SimulatedCohort
        Dataset.
    index : int
        Index of the subject.

    Returns
    -------
    dict
        Row of participants.tsv.
    """
    # More threads would change the order of sums and the rounding; subjects run in parallel instead.
    torch.set_num_threads(1)
    kind = cohort.kinds[index]
    with torch.no_grad(), torch.device(cohort.device):
        subject = draw_subject_info(cohort.population, index)
        anatomy = make_anatomy(cohort.population, index, subject, kind)
        writer = _write_derivatives if cohort.derivatives else _write_raw
        scans = writer(cohort, index, subject, anatomy)
    name = cohort.name(index)
    record = {
        "seed": cohort.seed,
        "index": index,
        "scanner": asdict(subject.scanner),
        **anatomy.drawn,
        **scans,
    }
    folder = cohort.out / "derivatives" / "simulation" if not cohort.derivatives else cohort.out
    write_json(folder / name / "anat" / f"{name}_desc-simulation_parameters.json", record)
    return {
        "participant_id": name,
        "age": subject.age,
        "sex": subject.sex,
        "group": "control" if kind is None else "patient",
        "pathology": DISEASES[kind],
        "scanner": subject.scanner.name,
        "anatomy": anatomy.source.name,
    }


def _describe(cohort: SimulatedCohort) -> None:
    """Write the files of the dataset that are not files of a subject."""
    generated = [{"Name": "bids_uad.simulation", "Version": bids_uad.__version__}]
    common = {"BIDSVersion": BIDS_VERSION, "License": "CC0-1.0", "Authors": ["The bids_uad developers"]}
    description = common | {"Name": f"Synthetic brains, seed {cohort.seed}", "GeneratedBy": generated}
    description["DatasetType"] = "derivative" if cohort.derivatives else "raw"
    write_json(cohort.out / "dataset_description.json", description)
    write_text(cohort.out / "README", README)
    ignored = "*_parameters.json\n"
    write_text(cohort.out / ".bidsignore", ignored)
    labelled = cohort.out if cohort.derivatives else cohort.out / "derivatives" / "tissue"
    table = pd.DataFrame({"index": list(TISSUE_NAMES), "name": list(TISSUE_NAMES.values())})
    write_tsv(labelled / "desc-tissue_dseg.tsv", table)
    if not cohort.derivatives:
        parts = {"lesions": "Lesion masks", "tissue": "Tissue labels", "simulation": "Drawn parameters"}
        for part, title in parts.items():
            content = common | {"Name": title, "DatasetType": "derivative", "GeneratedBy": generated}
            content["DatasetLinks"] = {"raw": "../.."}
            write_json(cohort.out / "derivatives" / part / "dataset_description.json", content)
        write_text(cohort.out / "derivatives" / "simulation" / ".bidsignore", ignored)
    write_json(
        cohort.out / "participants.json",
        {
            "age": {"Description": "Age that shaped the anatomy", "Units": "year"},
            "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
            "group": {"Description": "Group", "Levels": {"control": "no lesion", "patient": "with lesion"}},
            "pathology": {"Description": "Kind of lesion"},
            "scanner": {"Description": "Synthetic scanner"},
            "anatomy": {"Description": "Source of the tissue maps"},
        },
    )


def make_cohort(cohort: SimulatedCohort, nprocs: int = 1) -> Iterator[str]:
    """Simulate and write a whole dataset, subject by subject.

    Parameters
    ----------
    cohort : SimulatedCohort
        Dataset.
    nprocs : int, default=1
        Number of processes; the files do not depend on it.

    Yields
    ------
    str
        Name of each subject after it is written.
    """
    _describe(cohort)
    rows = []
    indices = range(len(cohort.kinds))
    for row in map_in_processes(partial(make_subject, cohort), indices, workers=nprocs):
        rows.append(row)
        yield row["participant_id"]
    write_tsv(cohort.out / "participants.tsv", pd.DataFrame(rows))


README = f"""Synthetic skull-stripped brains
===============================

Made by bids_uad.simulation: no person was scanned. Anatomy comes from the ICBM152 2009a template
(Fonov et al. 2011) and, where the `anatomy` column of participants.tsv states it, from FreeSurfer-type
label maps. Shape, age, scanner, contrast, noise and lesions were drawn at random; the drawn values are
kept in the *_parameters.json files.

Lesion masks mark voxels that are more than half lesion. Tissue labels (`desc-tissue_dseg`, where present):
0 background, {", ".join(f"{index} {name}" for index, name in TISSUE_NAMES.items())}.
They ignore lesions.
"""
