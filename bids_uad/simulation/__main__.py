"""Command line: ``python -m bids_uad.simulation OUT --healthy N --lesion N``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bids_uad.errors import UserError
from bids_uad.simulation.anatomy import label_map_paths
from bids_uad.simulation.cohort import Cohort, make_cohort
from bids_uad.simulation.lesions import KINDS


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the generator."""
    parser = argparse.ArgumentParser(
        prog="python -m bids_uad.simulation",
        description="Make a cohort of synthetic skull-stripped brains with known truth.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new dataset")
    parser.add_argument("--healthy", metavar="N", type=int, default=4, help="healthy subjects (default 4)")
    parser.add_argument(
        "--lesion", metavar="N", type=int, default=0, help="subjects with lesions (default 0)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="lesions that take turns (default all)"
    )
    parser.add_argument("--modalities", nargs="+", choices=("T1w", "T2w"), default=["T1w", "T2w"])
    parser.add_argument("--labelmaps", metavar="DIR", type=Path, help="folder of *_dseg.nii.gz label maps")
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="one seed is one dataset (default 0)"
    )
    parser.add_argument(
        "--derivatives", action="store_true", help="write preprocessed images in SRI24 space, not raw scans"
    )
    parser.add_argument("--nprocs", metavar="N", type=int, default=1, help="processes (default 1)")
    return parser


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
    if (
        args.healthy < 0
        or args.lesion < 0
        or args.healthy + args.lesion == 0
        or args.nprocs < 1
        or args.seed < 0
    ):
        parser.error("numbers must not be negative, and there must be at least one subject and one process")
    console = Console(stderr=True)
    try:
        cohort = Cohort(
            out=args.out,
            healthy=args.healthy,
            lesion=args.lesion,
            modalities=tuple(sorted(set(args.modalities))),
            label_maps=tuple(label_map_paths(args.labelmaps)) if args.labelmaps else (),
            seed=args.seed,
            derivatives=args.derivatives,
            kinds=tuple(args.kinds),
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("subjects", total=cohort.healthy + cohort.lesion)
            for name in make_cohort(cohort, args.nprocs):
                progress.update(task, advance=1, description=name)
    except UserError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    console.print(f"{cohort.healthy + cohort.lesion} subjects in {cohort.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
