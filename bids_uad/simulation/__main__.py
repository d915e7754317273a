"""Command line: ``bids_uad simulate OUT --healthy 200 --stroke 50``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bids_uad.engine.execution import resolve_device
from bids_uad.errors import UserError
from bids_uad.simulation.anatomy import BUILT_IN, label_map_paths
from bids_uad.simulation.cohort import Cohort, make_cohort
from bids_uad.simulation.pathology import KINDS
from bids_uad.simulation.shapes import lesion_shapes
from bids_uad.simulation.subject import Population

TITLES = {
    "stroke": "chronic stroke",
    "ms": "multiple sclerosis plaques",
    "wmh": "white matter hyperintensities of small vessel disease",
    "tumour": "tumour with oedema and mass effect",
}


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the generator."""
    parser = argparse.ArgumentParser(
        prog="bids_uad simulate",
        description="Make a cohort of synthetic skull-stripped brains with known truth.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new dataset")
    subjects = parser.add_argument_group("subjects (none of a sort unless asked for)")
    subjects.add_argument("--healthy", metavar="N", type=_count, default=0)
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
    anatomy.add_argument("--modalities", nargs="+", choices=("T1w", "T2w"), default=["T1w", "T2w"])
    anatomy.add_argument("--scanners", metavar="N", type=_positive, default=5, help="how many (default 5)")
    anatomy.add_argument(
        "--contrast",
        choices=("realistic", "random"),
        default="realistic",
        help="of tissues; random ones are those of no scanner on earth (domain randomisation)",
    )
    lesions = parser.add_argument_group("lesions")
    lesions.add_argument(
        "--lesion-masks",
        metavar="DIR",
        type=Path,
        help="real shapes: masks in MNI space and a lesions.tsv with columns file and pathology "
        "(default: shapes are drawn)",
    )
    lesions.add_argument(
        "--lesion-volume", metavar=("MIN", "MAX"), nargs=2, type=float, help="mL (default: as they come)"
    )
    lesions.add_argument(
        "--lesion-contrast", metavar="C", type=_share, default=1.0, help="1 as in life (default), 0 invisible"
    )
    parser.add_argument(
        "--seed", metavar="S", type=_count, default=0, help="one seed is one dataset (default 0)"
    )
    parser.add_argument(
        "--derivatives", action="store_true", help="write preprocessed images in SRI24 space, not raw scans"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--nprocs", metavar="N", type=_positive, default=1, help="processes (default 1)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number between 0 and 1")
    return value


def cohort_of(args: argparse.Namespace) -> Cohort:
    """Cohort that the arguments ask for.

    Raises
    ------
    UserError
        If label maps or lesion masks cannot be found, or there is no such device.
    """
    kinds = [None] * args.healthy + [kind for kind in KINDS for _ in range(getattr(args, kind))]
    world = Population(
        seed=args.seed,
        sources=tuple(label_map_paths(args.labelmaps)),
        scanners=args.scanners,
        randomised=args.contrast == "random",
        shapes=lesion_shapes(args.lesion_masks) if args.lesion_masks else {},
        lesion_volume=tuple(args.lesion_volume) if args.lesion_volume else None,
        lesion_contrast=args.lesion_contrast,
    )
    modalities = tuple(sorted(set(args.modalities)))
    device = str(resolve_device(args.device))
    return Cohort(args.out, world, tuple(kinds), modalities, args.derivatives, device)


def main(argv: list[str] | None = None) -> int:
    """Run the generator.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0 on success, 2 if the user has to put something right.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.healthy + sum(getattr(args, kind) for kind in KINDS) == 0:
        parser.error("no subjects; ask for some, for instance --healthy 4")
    if args.lesion_volume and not 0 < args.lesion_volume[0] <= args.lesion_volume[1]:
        parser.error("--lesion-volume takes two numbers above 0, the smaller one first")
    console = Console(stderr=True, markup=False)
    try:
        cohort = cohort_of(args)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("subjects", total=len(cohort.kinds))
            for name in make_cohort(cohort, args.nprocs):
                progress.update(task, advance=1, description=name)
    except UserError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    console.print(f"{len(cohort.kinds)} subjects in {cohort.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
