"""Fill caches of the process that workers are forked from, so that each run finds them full."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bids_uad.dataset.inputs import open_layout
from bids_uad.space import lesion_classes
from tests.dataset.skeleton import write_dataset

lesion_classes(np.zeros((1, 3), dtype=int), np.zeros(1, dtype=int))
with TemporaryDirectory() as folder:
    write_dataset(Path(folder) / "raw", {"sub-01/anat/sub-01_T1w.nii.gz": None})
    open_layout(Path(folder) / "raw", ["01"]).get(suffix="T1w")
