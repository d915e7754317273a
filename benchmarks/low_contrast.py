"""Validation scans of which every second one has less contrast between tissues.

``python -m benchmarks.low_contrast VALIDATION OUT`` copies preprocessed T1w scans with their masks. The
contrast of every second participant is reduced by a random factor, as in the training of PLS, since grey and
white matter differ by 7 to 13 % in many clinical spin-echo scans, and by 30 % in the simulated gradient-echo
scans. The packaged T1w model was calibrated on such a copy of 80 simulated scans.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from benchmarks.scan import read
from bids_uad.dataset.sri24_scans import find_preprocessed
from bids_uad.files import write_json, write_tsv
from bids_uad.networks.synthetic_anomalies import MIN_CONTRAST, reduce_contrast

RENUMBERED = 500
"""Added to the label of a participant whose contrast is reduced."""


def copy_with_less_contrast(source: Path, target: Path, seed: int = 0) -> pd.DataFrame:
    """Copy T1w scans, and reduce the contrast of every second participant.

    Parameters
    ----------
    source : pathlib.Path
        Derivative dataset with preprocessed T1w scans and numbered participants.
    target : pathlib.Path
        New dataset.
    seed : int, default=0
        Seed of the factors, which are uniform from `MIN_CONTRAST` to 1.

    Returns
    -------
    pandas.DataFrame
        Copied ``participants.tsv`` with the column ``contrast_factor``.

    Raises
    ------
    FileExistsError
        If the target exists.
    """
    rng = np.random.default_rng(seed)
    table = pd.read_csv(source / "participants.tsv", sep="\t", keep_default_na=False)
    scans = {scan.subject: scan for scan in find_preprocessed(source, "T1w")}
    target.mkdir(parents=True)
    labels, factors = [], []
    for row, label in enumerate(table["participant_id"]):
        is_reduced = row % 2 == 1
        factor = float(rng.uniform(MIN_CONTRAST, 1)) if is_reduced else 1.0
        copy = f"sub-{int(label.removeprefix('sub-')) + RENUMBERED}" if is_reduced else label
        folder = target / copy / "anat"
        folder.mkdir(parents=True)
        for file in sorted((source / label / "anat").iterdir()):
            shutil.copy(file, folder / file.name.replace(label, copy))
        if is_reduced:
            scan = scans[label]
            image = torch.from_numpy(read(scan.image))
            brain = torch.from_numpy(read(scan.brain) > 0)
            reduced = reduce_contrast(image[None], brain[None], torch.full((1, 1, 1, 1), factor))[0] * brain
            saved = nib.Nifti1Image(reduced.numpy(), nib.load(scan.image).affine)
            saved.to_filename(folder / scan.image.name.replace(label, copy))
        labels.append(copy)
        factors.append(factor)
    table = table.assign(participant_id=labels, contrast_factor=factors)
    write_tsv(target / "participants.tsv", table)
    description = json.loads((source / "dataset_description.json").read_text())
    name = f"{description.get('Name', source.name)}, contrast of every second scan reduced"
    write_json(target / "dataset_description.json", description | {"Name": name})
    return table


def main(arguments: list[str] | None = None) -> None:
    """Copy a dataset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("validation", type=Path, help="derivative dataset with preprocessed T1w scans")
    parser.add_argument("output", type=Path, help="new dataset")
    args = parser.parse_args(arguments)
    copy_with_less_contrast(args.validation, args.output)


if __name__ == "__main__":
    main()
