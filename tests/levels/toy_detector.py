"""The detector `toy`, and the detection process with it: `python -m tests.levels.toy_detector`.

It imports little, since each test starts the process several times.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from bids_uad.engine.inference import Scorer
from bids_uad.methods.intensity import Intensity
from bids_uad.methods.registry import DETECTORS, Entry
from bids_uad.resources import serve_requests

TOY = Entry("tests.levels.toy_detector", "Toy", "Toy", "#000000")


class Toy(Intensity):
    """Intensities as scores. It is killed or fails as `TOY/orders` says, and writes to `TOY/log`."""

    name = citation = "toy"

    def __init__(self, hyper):
        super().__init__(hyper)
        self._note("load")

    def score(self, slices, brain, generator):
        self._note("score")
        orders = Path(os.environ["TOY"], "orders")
        act, *rest = orders.read_text().split() if orders.is_file() else [""]
        orders.write_text(" ".join(rest) or "work")
        if act == "fail":
            raise ZeroDivisionError("nothing to divide by")
        if act.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[act])
        return slices * torch.nan if act == "nan" else slices

    @staticmethod
    def _note(what):
        with Path(os.environ["TOY"], "log").open("a") as log:
            log.write(f"{what} {os.getpid()}\n")


if __name__ == "__main__":
    DETECTORS["toy"] = TOY
    serve_requests(Scorer(), int(sys.argv[1]), idle_seconds=60, memory_growth=1e12)
