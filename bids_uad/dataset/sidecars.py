"""The JSON that stands beside every output: what it is, of what it was made, and how."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bids_uad import __version__
from bids_uad.dataset.naming import ImageUnit
from bids_uad.space import NAME

SPATIAL_REFERENCE = "bids::tpl-SRI24/anat/tpl-SRI24_desc-brain_T1w.nii.gz"
ANOMALY_MAP = "Anomaly score of every brain voxel, unbounded, 0 outside the brain; not a probability"
DEVIATION_MAP = (
    "Deviation of the anomaly score of every brain voxel from what a normative reference of healthy controls "
    "predicts for the brain volume, NormativeAge and NormativeSex at this position, in standard deviations; "
    "0 where the score is lower, and outside the brain"
)
PROBSEG_FORMULA = "score / (score + Threshold)"
NOT_CLINICAL = "Research software, not for clinical use."

# `index` and `name` are BIDS's own columns of such a table and must not be described again.
COMPONENT_COLUMNS: dict[str, dict[str, Any]] = {
    "volume_mm3": {"Description": "Volume", "Units": "mm^3"},
    "peak_score": {"Description": "Highest anomaly score in the component"},
    "mean_score": {"Description": "Mean anomaly score of the component"},
    "centroid_x": {"Description": "Centre of mass, left to right, SRI24 space", "Units": "mm"},
    "centroid_y": {"Description": "Centre of mass, posterior to anterior, SRI24 space", "Units": "mm"},
    "centroid_z": {"Description": "Centre of mass, inferior to superior, SRI24 space", "Units": "mm"},
}

HISTOGRAM_COLUMNS: dict[str, dict[str, Any]] = {
    "score_lower": {"Description": "Lower edge of the bin, not included (in the first bin it is)"},
    "score_upper": {"Description": "Upper edge of the bin, included; inf for the last"},
    "n_nonlesion": {"Description": "Brain voxels in the bin outside the lesion mask (all, without a mask)"},
    "n_lesion": {"Description": "Brain voxels in the bin inside the lesion mask; n/a without a mask"},
}

LESION_COLUMNS: dict[str, dict[str, Any]] = {
    "lesion": {"Description": "Number of the lesion, largest first; the same for all detectors"},
    "volume_mm3": {"Description": "Volume inside the brain mask, SRI24 space", "Units": "mm^3"},
    "found_share": {"Description": "Share of its voxels above the fixed threshold"},
    "detected": {"Description": "1 if any of its voxels is above the threshold, else 0"},
    "contrast": {
        "Description": "Mean intensity of the preprocessed image in the lesion minus that of the brain "
        "around it (up to 6 mm away, more than 2 mm from any lesion), divided by the standard deviation "
        "there; n/a where there are fewer than 20 such voxels"
    },
    "centroid_x": {"Description": "Centre of mass, left to right, SRI24 space", "Units": "mm"},
    "centroid_y": {"Description": "Centre of mass, posterior to anterior, SRI24 space", "Units": "mm"},
    "centroid_z": {"Description": "Centre of mass, inferior to superior, SRI24 space", "Units": "mm"},
}

SCANNER_SEEN_LEVELS = {
    "seen": "A scanner of that name in a dataset of that name is among those it has learnt from",
    "name seen elsewhere": "A scanner of that name is, in a dataset of another name",
    "unseen": "None of that name is",
}
METRICS_COLUMNS: dict[str, dict[str, Any]] = {
    "source_image": {"Description": "Raw image, as BIDS URI"},
    "modality": {"Description": "Suffix of the raw image"},
    "detector": {"Description": "Detector"},
    "preset": {"Description": "Hyper-parameter preset of the detector"},
    "model_sha256": {"Description": "SHA-256 of the model bundle"},
    "app_version": {"Description": "Version of bids_uad"},
    "seen_in_training": {
        "Description": "Cohorts of the model that the subject was in, with 'and' between them: training, "
        "validation, normative reference; or no"
    },
    "scanner_seen": {
        "Description": "Whether the model has learnt from the subject's scanner (column scanner of "
        "participants.tsv); n/a where the scanner, or those of the training, are not known",
        "Levels": SCANNER_SEEN_LEVELS,
    },
    "threshold": {"Description": "Score above which a voxel is called anomalous"},
    "threshold_name": {"Description": "How the threshold was fixed on validation data"},
    "brain_volume_mm3": {"Description": "Volume of the brain mask in SRI24 space", "Units": "mm^3"},
    "anomaly_volume_mm3": {"Description": "Volume above the threshold", "Units": "mm^3"},
    "lesion_volume_mm3": {"Description": "Volume of the lesion mask inside the brain", "Units": "mm^3"},
    "n_components": {"Description": "26-connected components of the anomaly mask"},
    "min_lesion_volume_mm3": {
        "Description": "Least volume of lesions that are counted, and of components that are called false "
        "(--min-lesion-volume)",
        "Units": "mm^3",
    },
    "n_counted_components": {"Description": "Components of at least that volume"},
    "n_lesions": {
        "Description": "26-connected components of the lesion mask inside the brain, of at least that volume"
    },
    "n_lesions_detected": {"Description": "Those of them that share a voxel with the anomaly mask"},
    "n_false_components": {
        "Description": "Components of the anomaly mask, of at least that volume, that share no voxel with "
        "any lesion; one that touches smaller lesions alone counts neither as a hit nor as false"
    },
}


_AS_MRIQC = "as in MRIQC, tissues by intensity"
QUALITY_COLUMNS: dict[str, dict[str, Any]] = {
    "source_image": {"Description": "Raw image, as BIDS URI"},
    "modality": {"Description": "Suffix of the raw image"},
    "exclude": {
        "Description": "Whether the group level leaves the image out; may be changed by hand",
        "Levels": {"yes": "Something failed, or looks as if it had", "no": "Nothing did"},
    },
    "exclude_reasons": {"Description": "Why, in words"},
    "depends_on": {
        "Description": "Other images of the participant whose brain mask or registration it rests on: "
        "the T1w image that it was registered to, and the image on whose grid the lesion mask lies"
    },
    "exclude_dependents": {
        "Description": "Whether an excluded image takes the images that depend on it (depends_on) out of the "
        "group level, too; of no effect while exclude is no; may be changed by hand",
        "Levels": {
            "yes": "Its brain mask or registration failed",
            "no": "A reason to exclude it, such as noise, would concern this image alone",
        },
    },
    "snr_csf": {"Description": f"Signal-to-noise ratio of cerebrospinal fluid, {_AS_MRIQC}"},
    "snr_gm": {"Description": f"Signal-to-noise ratio of grey matter, {_AS_MRIQC}"},
    "snr_wm": {"Description": f"Signal-to-noise ratio of white matter, {_AS_MRIQC}"},
    "snr_total": {"Description": "Mean of the three"},
    "cnr": {
        "Description": f"Contrast-to-noise ratio of white and grey matter, {_AS_MRIQC}; the noise of the air "
        "counts as 0 in skull-stripped images"
    },
    "cjv": {"Description": f"Coefficient of joint variation of white and grey matter, {_AS_MRIQC}"},
    "efc": {"Description": "Entropy focus criterion, as in MRIQC; lower in skull-stripped images"},
    "wm2max": {"Description": "Median of white matter / 99.95th percentile of the image, as in MRIQC"},
    "icvs_csf": {"Description": "Share of cerebrospinal fluid in the brain mask"},
    "icvs_gm": {"Description": "Share of grey matter"},
    "icvs_wm": {"Description": "Share of white matter"},
    "brain_volume_mm3": {"Description": "Volume of the brain mask in SRI24 space", "Units": "mm^3"},
    "native_brain_volume_mm3": {"Description": "Volume of the brain mask in native space", "Units": "mm^3"},
    "kept_share": {"Description": "Share of the brain mask that lies on the grid and in the field of view"},
    "outside_fov_fraction": {
        "Description": "Fraction of the reference brain that lies outside the field of view of the image"
    },
    "mask_overlap": {"Description": "Dice of the brain mask with that of the reference image"},
    "similarity": {
        "Description": "Normalised mutual information with the image it was registered to: 0 none, 1 full"
    },
    "mirrored_similarity": {
        "Description": "The same with the mirror image: higher if left and right are swapped; n/a where the "
        "reference is symmetric"
    },
    "local_correlation": {
        "Description": "Median, over cubes of 12 mm in the brain, of the correlation with the image it was "
        "registered to; negative where the contrasts are opposite"
    },
    "rotation_degrees": {"Description": "Angle between the scan and the atlas", "Units": "degree"},
    "restarted": {"Description": "Whether the registration had to start again from rotated positions"},
    "skull_stripped": {"Description": "Whether the image came skull-stripped"},
    "brain_mask_origin": {
        "Description": "Where the brain mask comes from",
        "Levels": {
            "given": "Another pipeline",
            "background": "Background of the skull-stripped image",
            "extracted": "Brain extraction",
            "anchor": "The T1w image that the image was registered to",
        },
    },
}


def bids_uri(dataset: str, path: Path) -> str:
    """Write the BIDS URI of a file.

    Parameters
    ----------
    dataset : str
        Its name in `DatasetLinks`; empty for the dataset that the URI is in.
    path : pathlib.Path
        Relative to the dataset. Characters that a URI does not hold, such as spaces, are percent-encoded;
        `+`, which labels may hold, is not.

    Returns
    -------
    str
    """
    return f"bids:{dataset}:{quote(path.as_posix(), safe='/+')}"


def raw_uri(unit: ImageUnit, bids_dir: Path) -> str:
    """Give the BIDS URI of a raw image."""
    return bids_uri("raw", unit.path.relative_to(bids_dir))


def own_uri(path: Path) -> str:
    """Give the BIDS URI of one of our own outputs (path relative to the derivative dataset)."""
    return bids_uri("", path)


def preprocessing_sidecars(
    unit: ImageUnit, bids_dir: Path, reference: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Describe what preprocessing writes for an image.

    Parameters
    ----------
    unit : ImageUnit
    bids_dir : pathlib.Path
    reference : dict
        Metadata of the reference image.

    Returns
    -------
    dict of str to dict
        Metadata by output field. Transforms have none: they are no BIDS yet.
    """
    sources = [raw_uri(unit, bids_dir)]
    root, name = unit.external.root, unit.external.dataset
    sources += [bids_uri(name, path.relative_to(root)) for path in unit.external.files]
    if unit.anchor is not None:
        sources.append(raw_uri(unit.anchor, bids_dir))
    in_space = {"SpatialReference": SPATIAL_REFERENCE, "ReferenceImage": reference, "Sources": sources}
    corrected = (
        "as corrected by another pipeline" if unit.external.image is not None else "bias-corrected (N4)"
    )
    return {
        "preproc": {
            "Description": f"Brain of the {unit.modality} image in {NAME} space, {corrected}, divided by the "
            "99.5th percentile inside the brain mask, so that values may exceed 1; 0 outside",
            "SkullStripped": True,
            **in_space,
        },
        "brain_mask": {
            "Description": f"Brain mask of the {unit.modality} image in {NAME} space",
            "Type": "Brain",
            **in_space,
        },
        "native_mask": {
            "Description": f"Brain mask of the {unit.modality} image on its own grid",
            "Type": "Brain",
            "SpatialReference": "orig",
            "Sources": sources,
        },
    }


def quality_sidecar(preproc: Path, brain_mask: Path) -> dict[str, Any]:
    """Describe the table of an image's quality; the paths are relative to the dataset."""
    return {
        "Description": "Quality of an image and of its preprocessing",
        **QUALITY_COLUMNS,
        "Sources": [own_uri(preproc), own_uri(brain_mask)],
        "SpatialReference": SPATIAL_REFERENCE,
        "SoftwareVersion": __version__,
    }


def lesion_uri(mask: Path, lesions_dir: Path) -> str:
    """Give the BIDS URI of a lesion mask."""
    return bids_uri("lesions", mask.relative_to(lesions_dir))


def lesion_sidecar(mask_uri: str, own: dict[str, Any]) -> dict[str, Any]:
    """Describe the ground truth in SRI24 space.

    Parameters
    ----------
    mask_uri : str
        BIDS URI of the mask as it was given.
    own : dict
        Sidecar of that mask. Whether it was drawn by hand (`Manual`) is repeated if it says so.

    Returns
    -------
    dict
    """
    said = {"Manual": own["Manual"]} if isinstance(own.get("Manual"), bool) else {}
    return {
        "Description": f"Lesion mask given by the user, brought to {NAME} space",
        "Type": "Lesion",
        **said,
        "SpatialReference": SPATIAL_REFERENCE,
        "Sources": [mask_uri],
    }


def detection_sidecars(
    files: dict[str, Path],
    inputs: dict[str, Path],
    model: dict[str, Any],
    run: dict[str, Any],
    parcellations: Iterable[str] = (),
    *,
    min_lesion_volume: float,
) -> dict[str, dict[str, Any]]:
    """Describe what one detector writes for an image.

    Parameters
    ----------
    files : dict of str to pathlib.Path
        Outputs by kind, relative to the dataset (`naming.detection_outputs`).
    inputs : dict of str to pathlib.Path
        `preproc`, `brain_mask` and `raw` (a BIDS URI) and, with ground truth, `lesion`.
    model : dict
        Keys to repeat in every sidecar: `Model`, `ModelSHA256`, `Threshold` and so on.
    run : dict
        Keys to repeat in every sidecar: `Device`, `RandomSeed` and so on.
    parcellations : iterable of str
        Those that the table of components has a column for.
    min_lesion_volume : float
        Least volume of a lesion that is counted, in mm3.

    Returns
    -------
    dict of str to dict
        Metadata by kind, for every kind in `files`. `dseg` and `components` share one file.
    """
    common = {**model, **run, "SoftwareVersion": __version__, "Note": NOT_CLINICAL}
    in_space = {"SpatialReference": SPATIAL_REFERENCE}
    scored = {"Sources": [own_uri(inputs["preproc"]), own_uri(inputs["brain_mask"])], **in_space, **common}
    derived = {"Sources": [own_uri(files["anomalymap"])], **in_space, **common}
    counted = [own_uri(files["anomalymap"]), own_uri(inputs["brain_mask"])]
    counted += [own_uri(inputs["lesion"])] if "lesion" in inputs else []
    counting = {"MinLesionVolume": min_lesion_volume, **common}
    components = {
        "Description": "26-connected components of the anomaly mask, largest first",
        **COMPONENT_COLUMNS,
        **{
            name.lower(): {"Description": f"Region of {name} that holds most of the component; n/a in none"}
            for name in parcellations
        },
        **derived,
    }
    lesions = {
        "lesions": {
            "Description": "26-connected lesions of the lesion mask inside the brain, of any size, and what "
            "the detector found of each; those smaller than MinLesionVolume (mm3) are not counted elsewhere",
            **LESION_COLUMNS,
            **in_space,
            "Sources": [own_uri(inputs["preproc"]), *counted],
            **counting,
        }
    }
    return {
        **(lesions if "lesions" in files else {}),
        "anomalymap": {
            "Description": DEVIATION_MAP if "Deviation" in model else ANOMALY_MAP,
            **scored,
        },
        "probseg": {
            "Description": "Anomaly score squashed to [0, 1) so that 0.5 is the threshold; "
            "not a calibrated probability",
            "Formula": PROBSEG_FORMULA,
            **derived,
        },
        "mask": {
            "Description": "Voxels whose anomaly score is above the threshold",
            "Type": "Lesion",
            **derived,
        },
        "dseg": components,
        "components": components,
        "native_mask": {
            "Description": "Anomaly mask on the grid of the raw image",
            "Type": "Lesion",
            "Sources": [own_uri(files["mask"]), str(inputs["raw"])],
            "SpatialReference": "orig",
            **common,
        },
        "histogram": {
            "Description": "Counts of brain voxels by anomaly score",
            **HISTOGRAM_COLUMNS,
            **in_space,
            "Sources": counted,
            **common,
        },
        "metrics": {
            "Description": "What the detector found in one image, in numbers",
            **METRICS_COLUMNS,
            **in_space,
            "Sources": counted,
            **counting,
        },
    }
