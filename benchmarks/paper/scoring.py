"""Simulation of the participants, and the score tables of their scans."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.paper.cohort import Participant, anatomy_name, participants_table
from benchmarks.scan import read, score_volume
from benchmarks.simulated import tables_of, write_tables
from bids_uad.calibration.normative import NormativeReference
from bids_uad.dataset.participants import Participants, read_participants
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import (
    NORMATIVE,
    NORMATIVE_FILE,
    Bundle,
    load_bundle,
    resolve_bundles,
)
from bids_uad.files import read_json, read_row, write_json, write_tsv
from bids_uad.levels.participant.leakage import scanner_seen
from bids_uad.resources import map_in_processes
from bids_uad.simulation.cohort import SimulatedCohort, make_subject


def model_sets(
    models: Sequence[str], modalities: Sequence[str], variants: Path | None = None
) -> dict[str, list[Bundle]]:
    """Load the descriptions of all models: the packaged ones, and variants by ``scaling/3`` and the like.

    Parameters
    ----------
    models : sequence of str
        Models as in the option ``--models`` of ``bids_uad``.
    modalities : sequence of str
        Contrasts.
    variants : pathlib.Path, optional
        Folder of models with other training data.

    Returns
    -------
    dict of str to list of Bundle
        Models by the folder of their score tables.
    """
    sets = {"tables": resolve_bundles(models, modalities)}
    kinds = ("scaling", "ablation") if variants else ()
    for folder in sorted(path for kind in kinds for path in variants.glob(f"{kind}/*")):
        sets[f"variants/{folder.parent.name}/{folder.name}"] = [
            bundle
            for path in sorted(folder.glob("*/bundle.json"))
            for bundle in resolve_bundles([str(path.parent)], modalities, skip_missing=True)
        ]
    return sets


def is_scored(scan: PreprocessedScan, bundle: Bundle, out: Path, *, with_lesion: bool) -> bool:
    """Return whether the tables of a scan are there, complete and of this model and threshold.

    Parameters
    ----------
    scan : PreprocessedScan
        Scan; its files need not exist.
    bundle : Bundle
        Model.
    out : pathlib.Path
        Folder of the tables.
    with_lesion : bool
        Whether the participant has a lesion, and therefore a table of lesions.

    Returns
    -------
    bool
        False if the scan must be scored.
    """
    metrics, histogram = tables_of(scan, bundle, out)
    lesions = metrics.with_name(metrics.name.replace("_metrics.", "_lesions."))
    needed = [metrics, histogram, *([lesions] if with_lesion else [])]
    if not all(path.is_file() for path in needed):
        return False
    row = read_row(metrics, ("model_sha256", "threshold"))
    return row["model_sha256"] == bundle.sha256 and float(row["threshold"]) == bundle.default_threshold[1]


def expected_scan(person: Participant, modality: str) -> PreprocessedScan:
    """Name the scan of a participant before it is simulated.

    Parameters
    ----------
    person : Participant
        Participant.
    modality : str
        Contrast.

    Returns
    -------
    PreprocessedScan
        Scan with paths relative to the dataset.
    """
    path = Path(person.name, "anat", f"{person.name}_space-SRI24_desc-preproc_{modality}.nii.gz")
    return PreprocessedScan(person.name, path, path, None, None)


def missing_models(person: Participant, sets: dict[str, list[Bundle]], out: Path) -> list[tuple[str, Bundle]]:
    """List the models that have not scored a participant.

    Parameters
    ----------
    person : Participant
        Participant.
    sets : dict of str to list of Bundle
        Models, see :func:`model_sets`.
    out : pathlib.Path
        Output folder.

    Returns
    -------
    list of (str, Bundle)
        Folder of the tables, and model.
    """

    def is_complete(folder: str, bundle: Bundle) -> bool:
        scan = expected_scan(person, bundle.modality)
        return all(
            is_scored(scan, each, out / folder, with_lesion=person.pathology is not None)
            for each in (bundle, *_deviating(bundle))
        )

    return [
        (folder, bundle)
        for folder, bundles in sets.items()
        for bundle in bundles
        if not is_complete(folder, bundle)
    ]


def _deviating(bundle: Bundle) -> list[Bundle]:
    """Return the model with normative deviations, if it has a reference."""
    return [bundle.with_deviation(NORMATIVE)] if NORMATIVE in (bundle.calibration or {}) else []


@cache
def _reference(folder: Path) -> NormativeReference:
    """Load the normative reference of a bundle once per process."""
    return NormativeReference.read(folder / NORMATIVE_FILE, load_bundle(folder).normative["reference"])


def keep_parameters(parameters: Path, kept: Path) -> None:
    """Copy the drawn parameters of a simulation, and keep those of contrasts that were simulated before."""
    earlier = read_json(kept) if kept.is_file() else {}
    write_json(kept, earlier | read_json(parameters))


def score_participant(
    person: Participant,
    missing: Sequence[tuple[str, Bundle]],
    labelmaps: Sequence[str],
    people: Participants,
    out: Path,
) -> str:
    """Simulate a participant, score the scans with the given models, and delete the scans.

    Parameters
    ----------
    person : Participant
        Participant.
    missing : sequence of (str, Bundle)
        Folder of the tables, and model, see :func:`missing_models`.
    labelmaps : sequence of str
        Sources of anatomy.
    people : Participants
        Contents of participants.tsv.
    out : pathlib.Path
        Output folder.

    Returns
    -------
    str
        Name of the participant.
    """
    torch.set_num_threads(1)
    modalities = tuple(sorted({bundle.modality for _, bundle in missing}))
    kind = person.pathology.kind if person.pathology else None
    facts = people.person(person.name)
    with tempfile.TemporaryDirectory(dir=out, prefix="scans-") as folder:
        cohort = SimulatedCohort(
            Path(folder), person.population(labelmaps), (*[None] * person.index, kind), modalities, True
        )
        make_subject(cohort, person.index)
        parameters = Path(folder, person.name, "anat", f"{person.name}_desc-simulation_parameters.json")
        # Before the tables, with which the participant counts as done.
        keep_parameters(parameters, out / "drawn" / f"{person.name}.json")
        scans = {modality: find_preprocessed(Path(folder), modality)[0] for modality in modalities}
        for tables, bundle in missing:
            scan = scans[bundle.modality]
            brain = read(scan.brain) > 0
            name = facts.scanner.split("-")[-1]
            seen = scanner_seen(bundle, name, f"Synthetic brains, seed {person.seed}")
            scores = score_volume(bundle, read(scan.image), brain, scan.key)
            (out / tables / person.name / "anat").mkdir(parents=True, exist_ok=True)
            for deviating in _deviating(bundle):
                z = _reference(bundle.folder).deviations(scores, brain, **facts.covariates)
                write_tables(scan, deviating, z, brain, [], seen, out / tables)
            write_tables(scan, bundle, scores, brain, [], seen, out / tables)
    return person.name


def score(
    out: Path,
    people: Sequence[Participant],
    labelmaps: Sequence[str],
    sets: dict[str, list[Bundle]],
    *,
    minutes: float | None = None,
    nprocs: int = 1,
) -> None:
    """Simulate and score all participants whose tables are missing.

    Parameters
    ----------
    out : pathlib.Path
        Output folder.
    people : sequence of Participant
        Participants, in the order in which they are scored.
    labelmaps : sequence of str
        Sources of anatomy.
    sets : dict of str to list of Bundle
        Models, see :func:`model_sets`.
    minutes : float, optional
        Time after which no further participant is started.
    nprocs : int, default=1
        Number of processes.
    """
    deadline = np.inf if minutes is None else time.time() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    write_tsv(out / "participants.tsv", participants_table(people, labelmaps))
    write_json(out / "study.json", _facts(people, labelmaps, sets["tables"]))
    table = read_participants(out)
    jobs = [
        (person, missing, labelmaps, table.only([person.name]), out)
        for person in people
        if (missing := missing_models(person, sets, out))
    ]
    scored = map_in_processes(partial(_score_before, deadline), jobs, workers=nprocs)
    for _ in track(scored, description="participants", total=len(jobs)):
        pass


def _score_before(deadline: float, job: tuple[Any, ...]) -> None:
    """Score a participant if it is started before the deadline."""
    if time.time() < deadline:
        score_participant(*job)


def _facts(people: Sequence[Participant], labelmaps: Sequence[str], bundles: Sequence[Bundle]) -> dict:
    """Return the description of cohort and models for the page."""
    anatomies = set(map(anatomy_name, labelmaps))
    return {
        "planned": len(people),
        "label_maps": sorted(anatomies),
        "trained_on_them": sorted(
            bundle.name for bundle in bundles if anatomies & set(bundle.info["training"].get("anatomies", []))
        ),
        "models": {bundle.name: bundle.sha256[:12] for bundle in bundles},
    }
