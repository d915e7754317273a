"""Numbers as the group report and the terminal write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bids_uad.evaluation.bootstrap import MIN_SUBJECTS


def number(value: float, digits: int = 3) -> str:
    """Write a number with `digits` significant digits, without a trailing point or zeros."""
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
    """Write `value * scale` with fixed decimals; a dash when it is not defined."""
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value * scale:.{digits}f}"


def interval(row: Mapping[str, Any], name: str, scale: float = 1, digits: int = 3) -> str:
    """Write the interval columns `<name>_ci_low/high` of a row; empty when not defined."""
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    if math.isnan(low):
        return ""
    return f"[{fixed(low, scale, digits)}, {fixed(high, scale, digits)}]"


def no_interval(row: Mapping[str, Any], column: str, name: str) -> str:
    """Write why a number of a row has no interval; empty when it has one, or is not defined itself."""
    if math.isnan(row[column]) or not math.isnan(row[f"{name}_ci_low"]):
        return ""
    n = row.get("n_participants", MIN_SUBJECTS)
    return f"no interval (n = {n})" if n < MIN_SUBJECTS else "no interval"


def with_interval(row: Mapping[str, Any], column: str, name: str, scale: float = 1, digits: int = 3) -> str:
    """Write a number of a row followed by its interval."""
    return f"{fixed(row[column], scale, digits)} {interval(row, name, scale, digits)}".strip()


DETECTOR_NAMES = {
    "ddpmpp": "DDPM++",
    "andi": "ANDi",
    "itermask": "IterMask",
    "disyre": "Disyre",
    "riad": "RIAD",
    "uniad": "UniAD",
    "rd": "RD",
    "patchcore": "PatchCore",
    "fae": "FAE",
    "intensity": "Intensity",
    "fpi": "FPI",
}
"""The detectors as their papers write them, in the order of the palette."""


def detector_name(detector: str) -> str:
    """Return the name of a detector as its paper writes it, with `(Z)` where its scores are deviations.

    Parameters
    ----------
    detector : str
        As in tables (`disyre+normative`) or, in lower case, in file names (`disyrenormative`).
    """
    plain = detector.removesuffix("normative").rstrip("+")
    name = DETECTOR_NAMES.get(plain, plain.capitalize())
    return name if plain == detector else f"{name} (Z)"
