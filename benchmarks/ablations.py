"""Ablations of the default detector: what its inputs, lesions and losses contribute.

``python -m benchmarks.ablations VALIDATION TRAIN [TRAIN ...] --modality T2w`` trains variants of the preset
`default` for the same number of steps, from the same initial weights and on the same scans, and applies them
to every third slice of the validation scans. It writes ``benchmarks/results/ablations-<modality>.tsv``: mean
average precision over lesion scans, share of healthy brains above the threshold of largest mean Dice, and
the differences to the reference with 95 % bootstrap intervals over participants. Variants that were trained
before are not trained again.

``python -m benchmarks.ablations VALIDATION --trained BUNDLE [OTHER ...]`` applies trained models instead: the
first one with and without coordinates and tissue priors, which its training leaves out at random, and the
others. It writes ``benchmarks/results/trained-<modality>.tsv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from benchmarks.heads import SizeHeads, TissueHead
from benchmarks.scan import read
from benchmarks.simulated import markdown
from bids_uad import space
from bids_uad.config import MODALITIES
from bids_uad.dataset.sri24_scans import PreprocessedScan, find_preprocessed
from bids_uad.engine.bundle import CORRECTED, load_bundle, load_detector
from bids_uad.engine.execution import Execution, in_precision
from bids_uad.engine.inference import covering_fields
from bids_uad.evaluation.bootstrap import bootstrap_interval
from bids_uad.evaluation.metrics import counts_above, dice_curve
from bids_uad.files import write_tsv
from bids_uad.methods.pls.detector import PLS, PLSHyper
from bids_uad.methods.pls.painting import HealthyConfig
from bids_uad.methods.registry import cpu_precision
from bids_uad.networks.counter_rng import SliceGenerator
from bids_uad.simulation.shapes import component_shapes
from bids_uad.training.backbone import initialise_backbone
from bids_uad.training.cohort import healthy_cohort
from bids_uad.training.loop import TrainingData, TrainingSettings, start_fabric, train_detector
from bids_uad.training.store import SliceStore, TrainingScan

RESULTS = Path(__file__).parent / "results"
SLICE_STEP = 3
"""Every third slice of a validation scan is scored."""
N_BINS = 1000
HEADS: dict[str, type[PLS]] = {"heads by lesion size": SizeHeads, "with tissue head": TissueHead}
"""Variants with other outputs than the reference."""
Scorer = Callable[[PLS, PreprocessedScan], tuple[np.ndarray, np.ndarray]]


def variants(reference: PLSHyper) -> dict[str, PLSHyper]:
    """Return the hyper-parameters of all variants by name, the reference first."""
    painting = reference.painting

    def lesions(**changes: float) -> PLSHyper:
        return replace(reference, painting=replace(painting, lesion=replace(painting.lesion, **changes)))

    unvaried = HealthyConfig(**dict.fromkeys(HealthyConfig.__dataclass_fields__, 0.0) | {"max_erosion": 0})
    return {
        "reference": reference,
        "single slice": replace(reference, neighbours=0),
        "no coordinates and priors": replace(reference, place=False),
        "no isointense masses": lesions(mass_prob=0.0),
        "no shapes of real lesions": lesions(real_shape_prob=0.0),
        "oedema in grey and white matter": lesions(along_white_prob=0.0),
        "healthy scans not varied": replace(reference, painting=replace(painting, healthy=unvaried)),
        "small lesions weighted as others": replace(
            reference, painting=replace(painting, small_lesion_weight=1.0)
        ),
        "with Tversky loss": replace(reference, tversky_weight=0.5),
    }


def training_store(args: argparse.Namespace) -> SliceStore:
    """Return the scans of the datasets on the command line as a store of slices.

    Parameters
    ----------
    args : argparse.Namespace
        Command line; `train`, `modality` and `work_dir` are used.

    Returns
    -------
    SliceStore
        Training scans.
    """
    scans = [scan for folder in args.train for scan in healthy_cohort(folder, args.modality).scans]
    training = [TrainingScan(scan.image, scan.brain, scan.tissue, scan.subject) for scan in scans]
    return SliceStore.open_or_build(training, args.work_dir, CORRECTED)


def train_variant(
    create: Callable[[], PLS], store: SliceStore, folder: Path, args: argparse.Namespace
) -> PLS:
    """Train a variant, or load the weights of an earlier run.

    Parameters
    ----------
    create : callable
        Returns an untrained detector.
    store : SliceStore
        Training scans.
    folder : pathlib.Path
        Folder of the checkpoint.
    args : argparse.Namespace
        Command line.

    Returns
    -------
    PLS
        Trained detector.
    """
    torch.manual_seed(args.seed)
    detector = create()
    initialise_backbone(detector, args.modality, args.start)
    if args.lesion_masks:
        detector.shapes = component_shapes(args.lesion_masks)
    folder.mkdir(parents=True, exist_ok=True)
    settings = TrainingSettings(args.seed, args.steps, precision=cpu_precision(PLS.name))
    fabric = start_fabric(torch.device("cpu"), 1, 1)
    train_detector(detector, TrainingData.all_of(store), settings, folder, fabric=fabric)
    return detector


def validation_slices(scan: PreprocessedScan) -> tuple[Tensor, Tensor, Tensor]:
    """Read a scan as slices.

    Parameters
    ----------
    scan : PreprocessedScan
        Scan.

    Returns
    -------
    slices : Tensor of float32, shape (155, 224, 224)
        Intensities in [0, 1].
    brain, lesion : Tensor of bool, shape (155, 224, 224)
        Masks; without a lesion mask, there is no lesion.
    """
    volume, brain = CORRECTED.prepare(read(scan.image), read(scan.brain) > 0)
    truth = np.zeros(brain.shape, dtype=bool) if scan.lesion is None else read(scan.lesion) > 0
    slices, inside, lesion = (
        torch.from_numpy(np.ascontiguousarray(space.to_slices(part))) for part in (volume, brain, truth)
    )
    return slices, inside, lesion


@torch.inference_mode()
def score_slices(
    detector: PLS, scan: PreprocessedScan, *, place: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Score every third slice of a scan.

    Parameters
    ----------
    detector : PLS
        Detector.
    scan : PreprocessedScan
        Scan.
    place : bool, default=True
        Whether coordinates and tissue priors are given; otherwise they are 0, as in a part of the training.

    Returns
    -------
    scores : numpy.ndarray of float32, shape (N,)
        Scores of the brain voxels.
    lesion : numpy.ndarray of bool, shape (N,)
        Whether they are lesion.
    """
    # Scores are not smoothed across slices, so that both a slice and its mirror image are processed.
    detector.hyper = replace(detector.hyper, slice_smoothing=0.0)
    slices, inside, lesion = validation_slices(scan)
    field, *_ = covering_fields(inside, detector.field_of_view)
    numbers = [number for number in range(0, len(slices), SLICE_STEP) if inside[number].any()]
    scores, labels = [], []
    for start in range(0, len(numbers), 8):
        now = numbers[start : start + 8]
        inputs = detector.inputs(slices, now, field.rows, field.columns)
        count = detector.hyper.intensity_channels
        inputs[:, count:] *= place
        mask = field.cut(inside)[now, None]
        found = detector.score(inputs, mask, SliceGenerator.of_slices("", 0, now, inputs.device))
        scores.append(found[mask])
        labels.append(field.cut(lesion)[now, None][mask])
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()


def evaluate(detector: PLS, scans: list[PreprocessedScan], *, scorer: Scorer = score_slices) -> pd.DataFrame:
    """Evaluate a detector.

    Parameters
    ----------
    detector : PLS
        Detector.
    scans : list of PreprocessedScan
        Validation scans; those without a lesion mask are healthy.
    scorer : callable, default=score_slices
        Returns scores and lesion mask of a scan, as :func:`score_slices`.

    Returns
    -------
    pandas.DataFrame
        Row of each scan: `participant_id`, average precision `ap` (lesion scans), share `marked` above the
        threshold of largest mean Dice (healthy scans).
    """
    rows, histograms = [], []
    with in_precision(detector, cpu_precision(PLS.name)):
        for scan in scans:
            scores, lesion = scorer(detector, scan)
            bins = np.minimum((scores * N_BINS).astype(int), N_BINS - 1)
            counts = [np.bincount(bins[part], minlength=N_BINS) for part in (~lesion, lesion)]
            histograms.append(counts)
            ap = average_precision_score(lesion, scores) if lesion.any() else np.nan
            rows.append({"participant_id": scan.subject, "ap": ap})
    table = pd.DataFrame(rows)
    sick = table["ap"].notna()
    curves = [dice_curve(*counts) for counts, has_lesion in zip(histograms, sick, strict=True) if has_lesion]
    best = int(np.mean(curves, 0).argmax())
    marked = [counts_above(healthy)[best] / max(1, healthy.sum()) for healthy, _ in histograms]
    table["marked"] = np.where(sick, np.nan, marked)
    return table


def summarise(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, float | str]]:
    """Yield the row of each variant, with differences to the first one."""
    reference = next(iter(tables.values()))
    for name, table in tables.items():
        row: dict[str, float | str] = {"variant": name, "lesion scans": int(table["ap"].notna().sum())}
        for column in ("ap", "marked"):
            difference = table[column] - reference[column]
            low, high = bootstrap_interval(difference, table["participant_id"], seed=0)
            row |= {column: table[column].mean(), f"{column} difference": difference.mean()}
            row |= {f"{column} low": low, f"{column} high": high}
        yield row


def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate all variants, or compare trained models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("validation", type=Path, help="preprocessed healthy and lesion scans")
    parser.add_argument("train", nargs="*", type=Path, help="datasets of preprocessed healthy scans")
    parser.add_argument(
        "--trained", nargs="+", type=Path, metavar="BUNDLE", help="evaluate these models instead"
    )
    parser.add_argument("--modality", choices=MODALITIES, default="T2w", help="contrast (default T2w)")
    parser.add_argument("--preset", choices=tuple(PLS.presets), default="default", help="reference")
    parser.add_argument("--start", type=Path, help="bundle with the initial weights (default: random)")
    parser.add_argument("--lesion-masks", type=Path, help="as of `bids_uad train`")
    parser.add_argument("--steps", type=int, default=400, help="steps of each variant (default 400)")
    parser.add_argument("--learning-rate", type=float, help="initial one (default: of the preset)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and painted scans (default 0)")
    parser.add_argument("--variants", nargs="+", help="names (default: all)")
    parser.add_argument("--work-dir", type=Path, default=Path("work"), help="checkpoints (default ./work)")
    parser.add_argument("--output", type=Path, help="table (default: benchmarks/results)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if bool(args.train) == bool(args.trained):
        parser.error("either TRAIN or --trained is required")
    validation = find_preprocessed(args.validation, args.modality)
    tables: dict[str, pd.DataFrame] = {}

    def write(name: str) -> None:
        table = pd.DataFrame(summarise(tables)).round(4)
        write_tsv(args.output or RESULTS / f"{name}-{args.modality}.tsv", table)
        print(markdown(table), flush=True)

    if args.trained:
        for path in args.trained:
            detector = Execution().prepare(load_detector(load_bundle(path)))
            tables[str(path)] = evaluate(detector, validation)
            if path == args.trained[0]:
                tables[f"{path}, no coordinates and priors"] = evaluate(
                    detector, validation, scorer=partial(score_slices, place=False)
                )
        write("trained")
        return
    store = training_store(args)
    reference = PLS.presets[args.preset]
    if args.learning_rate:
        reference = replace(reference, learning_rate=args.learning_rate)
    detectors: dict[str, Callable[[], PLS]] = {
        name: partial(PLS, hyper) for name, hyper in variants(reference).items()
    }
    detectors |= {name: partial(kind, reference) for name, kind in HEADS.items()}
    for name, create in detectors.items():
        if args.variants and name not in args.variants:
            continue
        label = f"{args.modality}-{args.preset}-{args.steps}-{args.seed}-{name.replace(' ', '-')}"
        detector = Execution().prepare(train_variant(create, store, args.work_dir / label, args))
        tables[name] = evaluate(detector, validation)
        write("ablations")


if __name__ == "__main__":
    main()
