"""bids_uad: unsupervised anomaly detection in brain MRI, as a BIDS App.

Research software, not for clinical use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bids_uad.levels.scans import detect

__version__ = "0.1.0"
__all__ = ["__version__", "detect"]


def __getattr__(name: str) -> Any:
    """Import :func:`~bids_uad.levels.scans.detect` when it is first used."""
    if name == "detect":
        return import_module(".levels.scans", __name__).detect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
