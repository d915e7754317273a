"""The benchmark as a table in the terminal."""

from __future__ import annotations

import math

import pandas as pd
from rich import box
from rich.table import Table

from bids_uad.evaluation.benchmark import ALL
from bids_uad.reports.group_text import detector_name, fixed


def benchmark_table(benchmark: pd.DataFrame) -> Table:
    """Lay out the benchmark for a terminal of 80 columns; pathologies are left to the report.

    Parameters
    ----------
    benchmark : pandas.DataFrame
        Columns of `bids_uad.evaluation.benchmark.COLUMNS`.

    Returns
    -------
    rich.table.Table
        One row per detector and modality.
    """
    table = Table(
        title="Benchmark at fixed thresholds",
        caption="Means with 95 % intervals over participants (five or more); scans: lesion/healthy.\n"
        "best: best threshold for this very test set, an upper bound. Not for clinical use.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Detector", no_wrap=True)
    table.add_column("", no_wrap=True)
    headings = ("Scans", "Dice", "best", "AUPRC", "FPR healthy %", "Lesions found")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in benchmark[benchmark["cohort"] == ALL].to_dict(orient="records"):
        table.add_row(
            detector_name(row["detector"]),
            row["modality"],
            f"{row['n_lesion_scans']}/{row['n_healthy_scans']}",
            _cell(row, "dice_mean", "dice"),
            fixed(row["dice_optimal"]),
            _cell(row, "auprc_mean", "auprc"),
            _cell(row, "fpr_healthy_mean", "fpr_healthy_mean", 100),
            _cell(row, "lesion_sensitivity", "lesion_sensitivity"),
        )
    return table


def _cell(row: dict, column: str, name: str, scale: float = 1) -> str:
    """Write a number, and below it its interval."""
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    text = fixed(row[column], scale, 3 if scale == 1 else 2)
    if math.isnan(low):
        return text if math.isnan(row[column]) else f"{text}\nno interval"
    return f"{text}\n{fixed(low, scale, 2)} to {fixed(high, scale, 2)}"
