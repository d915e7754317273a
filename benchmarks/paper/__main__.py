"""The study of arXiv 2512.01534 on a simulated cohort, claim by claim.

``python -m benchmarks.paper score OUT --labelmaps PATH ...`` simulates the participants one after the other,
scores their scans with all models and keeps the score tables in OUT. Scans are deleted, and a run continues
an earlier one. ``python -m benchmarks.paper evaluate OUT`` writes the tables of ``benchmarks/results/paper``,
and ``python -m benchmarks.paper page`` draws the figures and writes ``docs/benchmark.md`` from them.
``python -m benchmarks.paper evaluate --real DATA REAL`` writes the table of real scans from the outputs of
``python -m benchmarks.real DATA REAL``.

``--variants DIR`` also scores the models in ``DIR/scaling/PERCENT`` (trained on a part of the scans) and
``DIR/ablation/NAME`` (Disyre with other synthetic anomalies), whose bundles are named as the packaged ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.cohort import PARTICIPANTS, plan
from benchmarks.paper.page import write_page
from benchmarks.paper.scoring import model_sets, score
from benchmarks.paper.study import read_study, read_tables
from benchmarks.paper.tables import write_real, write_results
from bids_uad.simulation.anatomy import BUILT_IN, find_label_maps


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
    evaluation.add_argument("out", type=Path, nargs="?", help="as of score")
    evaluation.add_argument(
        "--real", nargs=2, type=Path, metavar=("DATA", "REAL"), help="arguments of benchmarks.real"
    )
    stages.add_parser("page", help="draw the figures and write docs/benchmark.md")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage of the study.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the command line.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.stage == "score":
        score(
            args.out,
            plan(args.participants),
            find_label_maps(args.labelmaps),
            model_sets(args.models, args.modalities, args.variants),
            minutes=args.minutes,
            nprocs=args.nprocs,
        )
    elif args.stage == "evaluate":
        if args.out is None and args.real is None:
            parser.error("OUT or --real is required")
        if args.out is not None:
            write_results(read_study(args.out))
        if args.real is not None:
            data, out = args.real
            write_real(read_tables(out, data))
    else:
        write_page()


if __name__ == "__main__":
    main()
