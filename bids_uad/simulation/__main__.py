"""Command line: ``bids_uad simulate OUT --healthy 200 --stroke 50``."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from bids_uad.config import Parser
from bids_uad.engine.execution import resolve_device
from bids_uad.errors import UserError
from bids_uad.progress import track
from bids_uad.simulation.anatomy import BUILT_IN, find_label_maps
from bids_uad.simulation.cohort import SimulatedCohort, make_cohort
from bids_uad.simulation.contrast import CONTRASTS
from bids_uad.simulation.pathology import KINDS
from bids_uad.simulation.shapes import lesion_shapes
from bids_uad.simulation.subject import Population

TITLES = {
    "stroke": "chronic stroke",
    "ms": "multiple sclerosis plaques",
    "wmh": "white matter hyperintensities of small vessel disease",
    "tumour": "tumour with oedema and mass effect",
}


def build_parser() -> Parser:
    """Build the parser of ``bids_uad simulate``."""
    parser = Parser(
        prog="bids_uad simulate",
        description="Simulate a cohort of skull-stripped brains with known lesion masks and tissue labels.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new dataset")
    subjects = parser.add_argument_group("subjects (default: 0 of each kind)")
    subjects.add_argument("--healthy", metavar="N", type=_count, default=0, help="healthy subjects")
    for kind, title in TITLES.items():
        subjects.add_argument(f"--{kind}", metavar="N", type=_count, default=0, help=title)
    anatomy = parser.add_argument_group("anatomy and scanners")
    anatomy.add_argument(
        "--labelmaps",
        metavar="PATH",
        nargs="+",
        default=[BUILT_IN],
        help="label maps, folders of *_dseg.nii.gz (with a dseg.tsv unless the labels are FreeSurfer's), or "
        f"{BUILT_IN} (default: {BUILT_IN}, the built-in template)",
    )
    anatomy.add_argument(
        "--modalities", nargs="+", choices=CONTRASTS, default=["T1w", "T2w"], help="default T1w T2w"
    )
    anatomy.add_argument(
        "--scanners", metavar="N", type=_positive, default=5, help="number of scanners (default 5)"
    )
    anatomy.add_argument(
        "--contrast",
        choices=("realistic", "random"),
        default="realistic",
        help="tissue contrasts; random for domain randomisation (default realistic)",
    )
    anatomy.add_argument(
        "--random-contrast",
        metavar="F",
        type=_fraction,
        default=0.0,
        help="fraction of subjects with random tissue contrasts of their own, 0 to 1 (default 0)",
    )
    anatomy.add_argument(
        "--normal-variants",
        action="store_true",
        help="ages up to 90, normal findings (perivascular spaces, iron, choroid plexus, vessels, dura, "
        "caps, foci) and mild artefacts of the scan",
    )
    lesions = parser.add_argument_group("lesions")
    lesions.add_argument(
        "--lesion-masks",
        metavar="DIR",
        type=Path,
        help="shapes of real lesions: masks in MNI space and a lesions.tsv with columns file and pathology "
        "(default: random shapes)",
    )
    lesions.add_argument(
        "--lesion-volume",
        metavar=("MIN", "MAX"),
        nargs=2,
        type=float,
        help="range of volumes, mL (default: not scaled)",
    )
    lesions.add_argument(
        "--lesion-contrast",
        metavar="C",
        type=_fraction,
        default=1.0,
        help="1 for realistic (default) to 0 for invisible",
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=_count,
        default=0,
        help="random seed, which determines the dataset (default 0)",
    )
    parser.add_argument(
        "--derivatives",
        action="store_true",
        help="write preprocessed images in SRI24 space instead of raw scans",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--nprocs", metavar="N", type=_positive, default=1, help="processes (default 1)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0. Got '{text}' instead.")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number. Got '{text}' instead.")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1. Got '{text}' instead.")
    return value


def build_cohort(args: argparse.Namespace) -> SimulatedCohort:
    """Build the cohort from the arguments.

    Raises
    ------
    UserError
        If label maps or lesion masks are missing, or the device does not exist.
    """
    kinds = [None] * args.healthy + [kind for kind in KINDS for _ in range(getattr(args, kind))]
    population = Population(
        seed=args.seed,
        sources=tuple(find_label_maps(args.labelmaps)),
        scanners=args.scanners,
        randomised=args.contrast == "random",
        random_contrast=args.random_contrast,
        normal_variants=args.normal_variants,
        shapes=lesion_shapes(args.lesion_masks) if args.lesion_masks else {},
        lesion_volume=tuple(args.lesion_volume) if args.lesion_volume else None,
        lesion_contrast=args.lesion_contrast,
    )
    modalities = tuple(modality for modality in CONTRASTS if modality in args.modalities)
    device = str(resolve_device(args.device))
    return SimulatedCohort(args.out, population, tuple(kinds), modalities, args.derivatives, device)


def main(argv: list[str] | None = None) -> int:
    """Run ``bids_uad simulate``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit code: 0 on success, else that of the error.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.healthy + sum(getattr(args, kind) for kind in KINDS) == 0:
        parser.error("no subjects; set at least one number, for example --healthy 4")
    if args.lesion_volume and not 0 < args.lesion_volume[0] <= args.lesion_volume[1]:
        parser.error("--lesion-volume must be two positive numbers, the smaller one first")
    console = Console(stderr=True, markup=False)
    try:
        cohort = build_cohort(args)
        write = partial(console.print, highlight=False, soft_wrap=True)
        for _ in track(make_cohort(cohort, args.nprocs), len(cohort.kinds), "Simulated subjects", write):
            pass
    except UserError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return error.exit_code
    console.print(f"{len(cohort.kinds)} subjects in {cohort.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
