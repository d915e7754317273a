"""Accuracy of preprocessing, and run time of its nodes, on real scans with reference masks and transforms.

``python -m benchmarks.preprocessing DATA`` needs ``DATA/brains``, a BIDS dataset with derivatives (brain
masks of whole heads, lesion masks, one subject in SRI24 space from another pipeline), and ``DATA/tpl-SRI24``.
The results contain no image data.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bids_uad.files import write_json
from bids_uad.preprocessing.brain_extraction.masks import (
    extract_brain,
    mask_from_background,
    packaged_weights,
    resolve_extraction,
)
from bids_uad.preprocessing.brain_extraction.network import load_network, predict_brain_mask
from bids_uad.preprocessing.check import is_skull_stripped, read_volume
from bids_uad.preprocessing.intensity_correction import correct_bias
from bids_uad.preprocessing.reference import Reference, resolve_reference
from bids_uad.preprocessing.registration import (
    Volume,
    dice,
    register_rigid,
    register_to_anchor,
    register_to_reference,
)
from bids_uad.preprocessing.resampling import resample, rotation_about, translation
from bids_uad.preprocessing.workflow import init_preproc_wf

RESULTS = Path(__file__).parent / "results"
MOVED = 10
ANGLES, SHIFT, NOISE = (15.0, -15.0, 15.0), (20.0, -20.0, 20.0), 0.05


@dataclass(frozen=True)
class Head:
    """Scan with its reference masks.

    Attributes
    ----------
    name, modality : str
        Name and contrast.
    image : pathlib.Path
        Whole-head scan.
    brain, lesion : pathlib.Path or None
        Brain mask and lesion mask on its grid.
    """

    name: str
    modality: str
    image: Path
    brain: Path | None
    lesion: Path | None


def heads(brains: Path) -> Iterator[Head]:
    """List the whole-head scans with a brain mask or a lesion mask on their grid."""
    for image in sorted(brains.glob("sub-*/**/anat/sub-*_T[12]w.nii.gz")):
        prefix, modality = image.name.removesuffix(".nii.gz").rsplit("_", 1)
        if "_ce-" in image.name or is_skull_stripped(*read_volume(image)):
            continue
        folder = image.parent.relative_to(brains)
        brain = (
            brains / "derivatives/brainmasks" / folder / f"{prefix}_space-{modality}_desc-brain_mask.nii.gz"
        )
        own = [f"{prefix}_space-{modality}_label-lesion_mask.nii.gz", f"{prefix}_label-lesion_mask.nii.gz"]
        lesions = [brains / "derivatives/lesions" / folder / name for name in own]
        found = [path if path.is_file() else None for path in (brain, *lesions)]
        if any(found):
            yield Head(prefix, modality, image, found[0], found[1] or found[2])


def stripped(brains: Path) -> list[Path]:
    """List skull-stripped T1w scans of healthy participants."""
    names = [
        *sorted(brains.glob("sub-oasis*/anat/*_T1w.nii.gz")),
        *sorted(brains.glob("sub-dep*/anat/*_T1w.nii.gz")),
    ]
    return names[:: max(1, len(names) // MOVED)][:MOVED]


def volume(image: Path, mask: Path | None = None) -> Volume:
    """Read a scan and optionally its mask."""
    data, affine = read_volume(image)
    return Volume(data, affine, None if mask is None else read_volume(mask)[0] > 0.5)


def target(reference: Reference, modality: str) -> Volume:
    """Read the reference image of a contrast."""
    t2w = modality == "T2w" and reference.t2w is not None
    return volume(reference.t2w if t2w else reference.t1w, reference.brain_mask)


def brain_of(scan: Volume, mask: np.ndarray) -> Volume:
    """Correct the bias field of a scan and mask its brain, as the workflow does."""
    corrected = correct_bias(scan.data, scan.affine, mask)
    return Volume(np.where(mask, corrected, 0.0), scan.affine, mask)


def brain_mask(head: Volume, template: Volume, scratch: Path) -> np.ndarray:
    """Extract the brain of a whole head, as the workflow does."""
    network_mask = predict_brain_mask(head.data, head.affine, load_network(packaged_weights()))
    return extract_brain(head, template, scratch, network_mask)[0]


def displacement(one: np.ndarray, other: np.ndarray, brain: Volume) -> float:
    """Compute the mean distance (mm) between the voxels of a brain under two transforms."""
    voxels = np.argwhere(brain.mask)[::97]
    points = brain.affine @ np.vstack([voxels.T, np.ones(len(voxels))])
    return float(np.linalg.norm(((one - other) @ points)[:3], axis=0).mean())


def brain_masks(brains: Path, reference: Reference, scratch: Path) -> list[dict[str, Any]]:
    """Extract the brain of each head; report Dice with its mask, and lesion voxels outside the mask."""
    rows = []
    for head in heads(brains):
        scan = volume(head.image)
        found = brain_mask(scan, target(reference, head.modality), scratch)
        row: dict[str, Any] = {"scan": head.name, "modality": head.modality}
        if head.brain is not None:
            truth = read_volume(head.brain)[0] > 0.5
            row |= {"dice": round(dice(found, truth), 4), "volume_ratio": round(found.sum() / truth.sum(), 3)}
        if head.lesion is not None:
            lesion = read_volume(head.lesion)[0] > 0.5
            row |= {"lesion_voxels": int(lesion.sum()), "lost": int((lesion & ~found).sum())}
        rows.append(row)
    return rows


def another_pipeline(brains: Path, reference: Reference, scratch: Path) -> list[dict[str, Any]]:
    """Compare the transform to SRI24 with that of an independent pipeline."""
    rows = []
    anchor = to_anchor = None
    for modality in ("T1w", "T2w"):
        (result,) = brains.glob(f"derivatives/sri24ref/sub-*/anat/*_desc-preproc_{modality}.nii.gz")
        subject = result.name.split("_")[0]
        head = volume(brains / subject / "anat" / f"{subject}_{modality}.nii.gz")
        other = volume(result)
        other = Volume(other.data, other.affine, mask_from_background(other.data))
        if anchor is None:
            mask = brain_mask(head, target(reference, "T1w"), scratch)
            anchor = brain_of(head, mask)
            to_anchor = ours = register_to_reference(target(reference, "T1w"), anchor)[0]
            brain = anchor
        else:
            pull, _ = register_to_anchor(anchor, head)
            ours = pull @ to_anchor
            brain = head
        # Rigid registration of the preprocessed to the raw scan gives the other pipeline's transform.
        theirs = register_rigid(other.coarse(), brain.coarse(), ours, scratch)
        error = displacement(ours, theirs, other)
        rows.append({"scan": subject, "modality": modality, "mean_displacement_mm": round(error, 3)})
    return rows


def known_moves(
    brains: Path, reference: Reference, stand_in: Reference, scratch: Path
) -> list[dict[str, Any]]:
    """Register scans that were moved by a known rigid transform; compare the two reference images."""
    rows = []
    for path in stripped(brains):
        scan = volume(path)
        brain = brain_of(scan, mask_from_background(scan.data))
        fixed = target(reference, "T1w")
        plain = register_to_reference(fixed, brain)[0]
        other = register_to_reference(target(stand_in, "T1w"), brain)[0]
        move = translation(np.array(SHIFT)) @ rotation_about(brain.centre(), ANGLES)
        # The field of view is moved as well, so that it contains the whole brain.
        shape, affine = scan.data.shape, np.linalg.inv(move) @ scan.affine
        turned = rotation_about(brain.centre(), (4.0, 3.0, -5.0)) @ affine
        noise = np.random.default_rng(0).normal(0.0, NOISE * np.percentile(scan.data, 99), shape)
        moved = resample(scan.data, scan.affine, shape, turned, move) + noise
        mask = resample(brain.mask, brain.affine, shape, turned, move) > 0.5
        found = register_to_reference(fixed, brain_of(Volume(moved, turned), mask))[0]
        rows.append(
            {
                "scan": path.name.split("_")[0],
                "moved_mm": round(displacement(found, np.linalg.inv(move) @ plain, fixed), 3),
                "stand_in_mm": round(displacement(other, plain, fixed), 3),
            }
        )
    return rows


def node_times(t1w: Path, t2w: Path, reference: Reference, scratch: Path) -> dict[str, float]:
    """Run the workflows of a T1w and a T2w scan, and return the seconds of each node."""
    seconds = {}
    inputs: dict[str, str] = {}
    for modality, path in (("T1w", t1w), ("T2w", t2w)):
        workflow = init_preproc_wf(
            name=f"{modality}_wf",
            modality=modality,
            is_anchor=modality == "T1w",
            skull_stripped=None,
            omp_nthreads=1,
            reference=reference,
            extraction=resolve_extraction("combined", None),
        )
        workflow.base_dir = str(scratch)
        for field, value in {**inputs, "in_file": str(path)}.items():
            setattr(workflow.inputs.inputnode, field, value)
        nodes = {node.name: node.result for node in workflow.run().nodes()}
        seconds |= {f"{modality} {name}": round(result.runtime.duration, 1) for name, result in nodes.items()}
        if modality == "T1w":
            inputs = {
                "anchor_file": nodes["correct_bias"].outputs.out_brain,
                "anchor_mask": nodes["brain_mask"].outputs.out_mask,
                "anchor_xfm": nodes["register"].outputs.to_sri24,
            }
    return {name: value for name, value in seconds.items() if value >= 0.1}


def main() -> None:
    """Run the benchmark, print tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with brains and tpl-SRI24")
    data = parser.parse_args().data
    logging.getLogger("nipype.workflow").setLevel(logging.WARNING)
    brains, console = data / "brains", Console()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stand_in, atlas = resolve_reference(None, scratch), resolve_reference(data, scratch)
        subjects = {
            "skull-stripped": "sub-umclcs07/anat/sub-umclcs07",
            "whole head": "sub-umcllg01/ses-1/anat/sub-umcllg01_ses-1",
        }
        results = {
            "brain_masks": brain_masks(brains, stand_in, scratch),
            "another_pipeline": another_pipeline(brains, atlas, scratch),
            "known_moves": known_moves(brains, atlas, stand_in, scratch),
            "seconds": {
                kind: node_times(
                    brains / f"{start}_T1w.nii.gz", brains / f"{start}_T2w.nii.gz", stand_in, scratch / kind
                )
                for kind, start in subjects.items()
            },
        }
    for name in ("brain_masks", "another_pipeline", "known_moves"):
        table = Table(
            *dict.fromkeys(key for row in results[name] for key in row), title=name.replace("_", " ")
        )
        for row in results[name]:
            table.add_row(*(str(row.get(column.header, "-")) for column in table.columns))
        console.print(table)
    for kind, nodes in results["seconds"].items():
        total = sum(nodes.values())
        console.print(
            f"{kind}: {total:.0f} s, " + ", ".join(f"{name} {value}" for name, value in nodes.items())
        )
    write_json(RESULTS / "preprocessing.json", results)


if __name__ == "__main__":
    main()
