"""The study of arXiv 2512.01534 on a simulated cohort, claim by claim.

``python -m benchmarks.paper score OUT --labelmaps PATH ...`` simulates the participants one after the other,
scores their scans with all models and keeps the score tables in OUT. Scans are deleted, and what is there is
not made again. ``python -m benchmarks.paper evaluate OUT`` writes the tables of ``benchmarks/results/paper``,
and ``python -m benchmarks.paper page`` draws the figures and writes ``docs/benchmark.md`` from them.

``--variants DIR`` also scores the models in ``DIR/scaling/PERCENT`` (trained on a part of the scans) and
``DIR/ablation/NAME`` (Disyre with other synthetic anomalies), whose bundles are named as the packaged ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import track

from benchmarks.paper_claims import PATHOLOGIES, Load, read_study, write_results
from benchmarks.paper_page import write_page
from benchmarks.scan import read
from benchmarks.simulated import tables_of, write_tables
from bids_uad.calibration.normative import NormativeReference
from bids_uad.dataset.participants import Participants, read_participants
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import (
    NORMATIVE,
    NORMATIVE_FILE,
    Bundle,
    load_bundle,
    load_detector,
    resolve_bundles,
)
from bids_uad.engine.inference import anomaly_map
from bids_uad.files import read_row, write_json, write_text, write_tsv
from bids_uad.levels.participant.leakage import scanner_seen
from bids_uad.methods.base import Detector
from bids_uad.resources import worker_pool
from bids_uad.simulation.anatomy import BUILT_IN, find_label_maps
from bids_uad.simulation.cohort import SimulatedCohort, make_subject
from bids_uad.simulation.subject import Population, draw_subject_info, random_stream

SEEN_SEED, SEEN_SCANNERS = 1, 7
"""Seed of the training cohort of the packaged models, and number of its scanners, of which they saw six."""
UNSEEN_SEED, UNSEEN_SCANNERS = 2512, 5
PARTICIPANTS = 315
PATTERN = (
    *("healthy", "glioma", "chronic stroke", "healthy", "multiple sclerosis"),
    *("acute stroke", "healthy", "white matter hyperintensities", "glioma", "healthy"),
    *("acute stroke", "chronic stroke", "healthy", "multiple sclerosis", "white matter hyperintensities"),
)
"""Groups of consecutive participants. Those of a pathology alternate between the seeds."""
FIRST_INDEX, INDEX_STEP = 1000, 16
"""Index of the first participant, beyond those of training cohorts, and distance to the next."""
OLD = 0.35
"""Age of a simulated stroke, from 0 to 1, above which it has a cavity."""


@dataclass(frozen=True)
class StudyPopulation(Population):
    """Population whose lesions have the volumes of a published cohort.

    Parameters
    ----------
    load : Load, default=None
        Distribution of the lesion volume; None for healthy participants.
    """

    load: Load | None = None

    def volume(self, index: int) -> float | None:
        """Draw the lesion volume (mL) of a participant."""
        if self.load is None:
            return None
        return self.load.draw(random_stream(self.seed, index, "lesion-volume"))


@dataclass(frozen=True)
class Participant:
    """Participant of the study.

    Parameters
    ----------
    seed : int
        Seed of the simulation, which determines the scanners.
    index : int
        Index of the simulated subject.
    group : str
        ``healthy`` or a key of `PATHOLOGIES`.
    """

    seed: int
    index: int
    group: str

    @property
    def name(self) -> str:
        """BIDS name."""
        return f"sub-{self.index + 1:03d}"

    def population(self, labelmaps: Sequence[str]) -> StudyPopulation:
        """Return the population that the participant is drawn from."""
        return StudyPopulation(
            self.seed,
            tuple(labelmaps),
            SEEN_SCANNERS if self.seed == SEEN_SEED else UNSEEN_SCANNERS,
            normal_variants=True,
            load=PATHOLOGIES[self.group].load if self.group in PATHOLOGIES else None,
        )


def plan(number: int = PARTICIPANTS) -> list[Participant]:
    """List the participants, such that any first part has all groups and both kinds of scanners.

    Parameters
    ----------
    number : int, default=315
        Number of participants.

    Returns
    -------
    list of Participant
        Participants in the order of simulation.
    """
    people = []
    for position, group in enumerate(islice(cycle(PATTERN), number)):
        seed = (SEEN_SEED, UNSEEN_SEED)[position % 2]
        index = FIRST_INDEX + INDEX_STEP * position
        if group.endswith("stroke"):
            index = next(each for each in range(index, index + INDEX_STEP) if _stroke(seed, each) == group)
        people.append(Participant(seed, index, group))
    return people


def _stroke(seed: int, index: int) -> str:
    """Return whether the simulator draws an acute or a chronic stroke: its first draw of a lesion."""
    old = random_stream(seed, index, "lesion").uniform(0.0, 1.0) > OLD
    return "chronic stroke" if old else "acute stroke"


def participants_table(people: Sequence[Participant], labelmaps: Sequence[str]) -> pd.DataFrame:
    """Tabulate age, sex, group and scanner of the participants, without simulating them.

    Parameters
    ----------
    people : sequence of Participant
        Participants.
    labelmaps : sequence of str
        Sources of anatomy.

    Returns
    -------
    pandas.DataFrame
        Contents of participants.tsv.
    """
    rows = []
    for person in people:
        subject = draw_subject_info(person.population(labelmaps), person.index)
        scanner = subject.scanner
        healthy = person.group == "healthy"
        rows.append(
            {
                "participant_id": person.name,
                "age": subject.age,
                "sex": subject.sex,
                "group": "control" if healthy else "patient",
                "pathology": "none" if healthy else person.group,
                "scanner": f"seed{person.seed}-{scanner.name}",
                "manufacturer": scanner.manufacturer,
                "field_strength": f"{scanner.field_strength:g} T",
                "noise": scanner.noise,
                "anatomy": Path(subject.source).name.split("_dseg")[0],
            }
        )
    return pd.DataFrame(rows)


def model_sets(args: argparse.Namespace) -> dict[str, list[Bundle]]:
    """Load the descriptions of all models: the packaged ones, and variants by ``scaling/3`` and the like.

    Parameters
    ----------
    args : argparse.Namespace
        Command line with `models`, `modalities` and `variants`.

    Returns
    -------
    dict of str to list of Bundle
        Models by the folder of their score tables.
    """
    sets = {"tables": resolve_bundles(args.models, args.modalities)}
    if args.variants:
        for folder in sorted(
            path for kind in ("scaling", "ablation") for path in args.variants.glob(f"{kind}/*")
        ):
            bundles = [str(path.parent) for path in sorted(folder.glob("*/bundle.json"))]
            found = [resolve_bundles([path], args.modalities, skip_missing=True) for path in bundles]
            sets[f"variants/{folder.parent.name}/{folder.name}"] = [each for own in found for each in own]
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


def _expected(person: Participant, modality: str) -> PreprocessedScan:
    """Return the scan of a participant by its name, before it is simulated."""
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
    with_lesion = person.group != "healthy"
    missing = []
    for folder, bundles in sets.items():
        for bundle in bundles:
            scan = _expected(person, bundle.modality)
            kinds = [bundle, *_deviating(bundle)]
            if not all(is_scored(scan, each, out / folder, with_lesion=with_lesion) for each in kinds):
                missing.append((folder, bundle))
    return missing


def _deviating(bundle: Bundle) -> list[Bundle]:
    """Return the model with normative deviations, if it has a reference."""
    return [bundle.with_deviation(NORMATIVE)] if NORMATIVE in (bundle.calibration or {}) else []


@cache
def _detector(folder: Path) -> Detector:
    """Load the network of a bundle once per process."""
    return load_detector(load_bundle(folder))


@cache
def _reference(folder: Path) -> NormativeReference:
    """Load the normative reference of a bundle once per process."""
    return NormativeReference.read(folder / NORMATIVE_FILE, load_bundle(folder).normative["reference"])


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
    kind = PATHOLOGIES[person.group].kind if person.group in PATHOLOGIES else None
    facts = people.person(person.name)
    with tempfile.TemporaryDirectory(dir=out, prefix="scans-") as folder:
        cohort = SimulatedCohort(
            Path(folder), person.population(labelmaps), (*[None] * person.index, kind), modalities, True
        )
        make_subject(cohort, person.index)
        parameters = Path(folder, person.name, "anat", f"{person.name}_desc-simulation_parameters.json")
        # Before the tables, with which the participant counts as done.
        write_text(out / "drawn" / f"{person.name}.json", parameters.read_text())
        scans = {modality: find_preprocessed(Path(folder), modality)[0] for modality in modalities}
        for tables, bundle in missing:
            scan = scans[bundle.modality]
            brain = read(scan.brain) > 0
            name = facts.scanner.split("-")[-1]
            seen = scanner_seen(bundle, name, f"Synthetic brains, seed {person.seed}")
            scores = anomaly_map(
                _detector(bundle.folder), read(scan.image), brain, key=scan.key, protocol=bundle.protocol
            )
            (out / tables / person.name / "anat").mkdir(parents=True, exist_ok=True)
            for deviating in _deviating(bundle):
                z = _reference(bundle.folder).deviations(scores, brain, **facts.covariates)
                write_tables(scan, deviating, z, brain, [], seen, out / tables)
            write_tables(scan, bundle, scores, brain, [], seen, out / tables)
    return person.name


def score(args: argparse.Namespace) -> None:
    """Simulate and score all participants whose tables are missing.

    Parameters
    ----------
    args : argparse.Namespace
        Command line.
    """
    deadline = np.inf if args.minutes is None else time.time() + 60 * args.minutes
    labelmaps = find_label_maps(args.labelmaps)
    people = plan(args.participants)
    args.out.mkdir(parents=True, exist_ok=True)
    write_tsv(args.out / "participants.tsv", participants_table(people, labelmaps))
    table = read_participants(args.out)
    sets = model_sets(args)
    write_json(args.out / "study.json", _facts(people, labelmaps, sets["tables"]))
    jobs = (
        (person, missing, labelmaps, table.only([person.name]), args.out)
        for person in people
        if (missing := missing_models(person, sets, args.out))
    )
    if args.nprocs == 1:
        for job in track(list(jobs), description="participants"):
            _before(deadline, *job)
        return
    with worker_pool(args.nprocs, "spawn") as pool:
        futures = [pool.submit(_before, deadline, *job) for job in jobs]
        for future in track(futures, description="participants"):
            future.result()


def _before(deadline: float, *job: Any) -> None:
    """Score a participant, unless it is too late."""
    if time.time() < deadline:
        score_participant(*job)


def _facts(people: Sequence[Participant], labelmaps: Sequence[str], bundles: Sequence[Bundle]) -> dict:
    """Return what the page says about the cohort and the models."""
    anatomies = {Path(path).name.split("_dseg")[0] for path in labelmaps}
    return {
        "planned": len(people),
        "label_maps": sorted(anatomies),
        "trained_on_them": sorted(
            bundle.name for bundle in bundles if anatomies & set(bundle.info["training"].get("anatomies", []))
        ),
        "models": {bundle.name: bundle.sha256[:12] for bundle in bundles},
    }


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of the study."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.split("\n\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    scoring = stages.add_parser("score", help="simulate and score what is missing")
    scoring.add_argument("out", type=Path)
    scoring.add_argument("--labelmaps", nargs="+", default=[BUILT_IN], help="as of bids_uad simulate")
    scoring.add_argument(
        "--participants", type=int, default=PARTICIPANTS, help="number (default %(default)s)"
    )
    scoring.add_argument("--modalities", nargs="+", choices=("T1w", "T2w"), default=["T1w", "T2w"])
    scoring.add_argument(
        "--models", nargs="+", default=["all"], help="as of bids_uad (default: all packaged)"
    )
    scoring.add_argument("--variants", type=Path, metavar="DIR", help="models with other training data")
    scoring.add_argument("--minutes", type=float, help="start no further participant after this time")
    scoring.add_argument("--nprocs", type=int, default=1, help="processes (default 1)")
    evaluation = stages.add_parser("evaluate", help="compute the tables of all claims")
    evaluation.add_argument("out", type=Path)
    evaluation.add_argument(
        "--real", nargs=2, type=Path, metavar=("DATA", "REAL"), help="arguments of benchmarks.real"
    )
    stages.add_parser("page", help="draw the figures and write docs/benchmark.md")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage of the study."""
    args = build_parser().parse_args(argv)
    if args.stage == "score":
        score(args)
    elif args.stage == "evaluate":
        write_results(read_study(args.out, args.real))
    else:
        write_page()


if __name__ == "__main__":
    main()
