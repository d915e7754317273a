"""Whether the images of one participant agree about what is left and what is right."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from bids_uad.preprocessing.coregistration import mirror_ratio
from bids_uad.preprocessing.quality import SURELY_MIRRORED
from bids_uad.preprocessing.registration import Volume
from bids_uad.reports.derivatives import Image, find_images, read_sidecar


def find_swapped(output_dir: Path, subject: str) -> dict[tuple[str, str], str]:
    """Compare the images of a participant that were registered to the atlas, of all runs and sessions.

    Each is compared with the first (of those that passed quality control, if any did). An image that was
    registered to another of its session is compared with it during registration.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivative dataset.
    subject : str
        Label without ``sub-``.

    Returns
    -------
    dict of (str, str) to str
        A sentence for each image that disagrees with the first, by its prefix and modality.
    """
    images = [image for image in find_images(output_dir, subject) if _is_anchor(image)]
    if len(images) < 2:
        return {}
    images.sort(key=_failed)  # which keeps the order otherwise
    first, *others = images
    reference = _read(first)
    swapped = {}
    for image in others:
        ratio = mirror_ratio(reference, _read(image))
        if ratio > SURELY_MIRRORED:
            one, other = (f"{each.prefix}_{each.modality}" for each in (first, image))
            swapped[image.prefix, image.modality] = (
                f"Left and right are swapped between {one} and {other}: the images agree {ratio:.1f} times "
                "as well if one of them is mirrored. Check the orientation of both."
            )
    return swapped


def _is_anchor(image: Image) -> bool:
    """Say whether an image was registered to the atlas itself, and all that is needed of it is there."""
    return image.preproc is not None and image.brain is not None and "_desc-brain_" in image.brain.name


def _failed(image: Image) -> bool:
    return bool(read_sidecar(image.preproc).get("PreprocessingQuality", {}).get("failures"))


def _read(image: Image) -> Volume:
    scan = nib.load(image.preproc)
    brain = np.asarray(nib.load(image.brain).dataobj) > 0
    return Volume(np.asarray(scan.dataobj, dtype=np.float32), scan.affine, brain)
