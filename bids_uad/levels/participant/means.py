"""What all parts of a run's workflow share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bids_uad.config import RunConfig
from bids_uad.preprocessing.extraction import Extraction
from bids_uad.preprocessing.reference import Reference

MAX_DETECTION_THREADS = 4


@dataclass(frozen=True)
class Means:
    """Options, reference image, brain extraction and device of a run.

    Parameters
    ----------
    config : RunConfig
    reference : Reference
    extraction : Extraction
    device : str
        Resolved: `cpu`, `cuda` or `cuda:N`.
    precision : str
        Resolved: `fp32` or `bf16`.
    """

    config: RunConfig
    reference: Reference
    extraction: Extraction
    device: str
    precision: str = "fp32"

    @property
    def detection_threads(self) -> int:
        """CPU threads of a detector; the command line alone decides, so that a rerun gives the same map."""
        if self.device != "cpu":
            return 1
        return max(self.config.omp_nthreads, min(self.config.nprocs, MAX_DETECTION_THREADS))


def crash_dir(config: RunConfig, subject: str) -> Path:
    """Say where a participant's crash files go."""
    return config.output_dir / f"sub-{subject}" / "log" / config.run_id
