"""Formatting of numbers and detector names, and the benchmark table of the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from bids_uad.evaluation.benchmark import ALL
from bids_uad.evaluation.bootstrap import MIN_SUBJECTS
from bids_uad.methods.registry import detector_name


def number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, without trailing zeros."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def fixed(value: float, scale: float = 1, digits: int = 3) -> str:
    """Format `value * scale` with `digits` decimals; return a dash for a missing value."""
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value * scale:.{digits}f}"


def interval(row: Mapping[str, Any], name: str, scale: float = 1, digits: int = 3) -> str:
    """Format the interval in columns `<name>_ci_low` and `<name>_ci_high`; empty if missing."""
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    if math.isnan(low):
        return ""
    return f"[{fixed(low, scale, digits)}, {fixed(high, scale, digits)}]"


def no_interval(row: Mapping[str, Any], column: str, name: str) -> str:
    """Return a note for values without an interval; empty if there is one or the value is missing."""
    if math.isnan(row[column]) or not math.isnan(row[f"{name}_ci_low"]):
        return ""
    n = row.get("n_participants", MIN_SUBJECTS)
    return f"no interval (n = {n})" if n < MIN_SUBJECTS else "no interval"


def with_interval(row: Mapping[str, Any], column: str, name: str, scale: float = 1, digits: int = 3) -> str:
    """Format a value of a row followed by its interval."""
    return f"{fixed(row[column], scale, digits)} {interval(row, name, scale, digits)}".strip()


def benchmark_table(benchmark: pd.DataFrame) -> Table:
    """Lay out the benchmark over all cohorts for a terminal of 80 columns.

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
        "best: at the best threshold for this test set, an upper bound. Not for clinical use.",
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
    """Format a value with its interval on the next line."""
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    text = fixed(row[column], scale, 3 if scale == 1 else 2)
    if math.isnan(low):
        return text if math.isnan(row[column]) else f"{text}\nno interval"
    return f"{text}\n{fixed(low, scale, 2)} to {fixed(high, scale, 2)}"
