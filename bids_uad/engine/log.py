"""The course of a training as a table that any program reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from bids_uad.atomic import atomic_path

COLUMNS = ["stage_number", "stage", "step", "loss", "held_out_loss"]


class TrainingLog:
    """A CSV file with a row for each step.

    Parameters
    ----------
    path : pathlib.Path
    keep : tuple of int
        Stage and step up to which rows of an earlier run hold; later ones will be made again.
    """

    def __init__(self, path: Path, keep: tuple[int, int]) -> None:
        self.path = path
        self.rows: list[tuple] = []
        if path.is_file() and keep != (0, 0):
            earlier = pd.read_csv(path)
            number, step = earlier["stage_number"], earlier["step"]
            held = earlier[(number < keep[0]) | ((number == keep[0]) & (step <= keep[1]))]
            self.rows = list(held[COLUMNS].itertuples(index=False, name=None))

    def add(self, number: int, stage: str, step: int, loss: float, held_out: float | None) -> None:
        """Remember a step."""
        self.rows.append((number, stage, step, loss, np.nan if held_out is None else held_out))

    def table(self) -> pd.DataFrame:
        """All steps so far."""
        return pd.DataFrame(self.rows, columns=COLUMNS)

    def flush(self) -> None:
        """Write the file."""
        with atomic_path(self.path) as temporary:
            self.table().to_csv(temporary, index=False)
