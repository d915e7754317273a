"""JSON sidecars of all outputs, and the data dictionaries of the tables of the participant level."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bids_uad import __version__
from bids_uad.dataset.naming import LOOK_UP_TABLES, ImageUnit
from bids_uad.space import CLASS_LIMITS, CORTICAL_CLASS, MNI, NAME, OutputSpace

SPATIAL_REFERENCE = "bids::tpl-SRI24/anat/tpl-SRI24_desc-brain_T1w.nii.gz"
MNI_REFERENCE = f"https://templateflow.s3.amazonaws.com/tpl-{MNI}/tpl-{MNI}_res-01_T1w.nii.gz"
ANOMALY_MAP = "Anomaly score of each brain voxel; unbounded, not a probability; 0 outside the brain"
DEVIATION_MAP = (
    "Deviation of the anomaly score of each brain voxel from the mean that a normative model of healthy "
    "controls predicts at this position for the brain volume, NormativeAge and NormativeSex, in standard "
    "deviations; 0 for negative deviations and outside the brain"
)
MASK_BY_RULE = (
    "Anomaly mask: 26-connected components of the voxels whose score is above LowThreshold that have at "
    "least MinComponentVolume (mm3) and a voxel above Threshold; holes are filled as FilledHoles says (none, "
    "3d, or axial: in each axial slice)"
)
TO_TEMPLATE = (
    f"The affine transform between {NAME} and {MNI}, which does not correct for size and shape of the brain"
)
_RESAMPLED = {
    "anomalymap": f"The anomaly map in {NAME} space, resampled by linear interpolation",
    "mask": f"The anomaly mask in {NAME} space, resampled by nearest-neighbour interpolation",
    "dseg": f"The components in {NAME} space with the labels of their table there, resampled by "
    "nearest-neighbour interpolation",
}
"""Outputs in further spaces."""
PROBSEG_FORMULA = "score / (score + Threshold)"
NOT_CLINICAL = "Research software, not for clinical use."

_CENTROID_COLUMNS: dict[str, dict[str, Any]] = {
    "centroid_x": {"Description": "Centre of mass, left to right, SRI24 space", "Units": "mm"},
    "centroid_y": {"Description": "Centre of mass, posterior to anterior, SRI24 space", "Units": "mm"},
    "centroid_z": {"Description": "Centre of mass, inferior to superior, SRI24 space", "Units": "mm"},
    **{
        f"mni_{axis}": {
            "Description": f"centroid_{axis} in MNI152NLin2009aSym, by the affine transform of the template, "
            "which does not correct for size and shape of the brain: accurate to about 5 mm",
            "Units": "mm",
        }
        for axis in "xyz"
    },
}
# BIDS defines the columns `index` and `name` of this table, so they must not be described again.
COMPONENT_COLUMNS: dict[str, dict[str, Any]] = {
    "volume_mm3": {"Description": "Volume of the component", "Units": "mm^3"},
    "peak_score": {"Description": "Highest anomaly score in the component"},
    "mean_score": {"Description": "Mean anomaly score of the component"},
    **_CENTROID_COLUMNS,
    "region": {
        "Description": "Region of the built-in atlas with the highest mean probability in the component, and "
        "its hemisphere; n/a outside all regions"
    },
    "region_probability": {"Description": "Mean probability of this region in the component"},
    "location_class": {
        "Description": "Class of the component by location in the built-in atlas; n/a outside all regions",
        "Levels": {
            "infratentorial": "Mostly in brain stem, cerebellum or fourth ventricle",
            "deep grey matter": "Mostly in thalamus, basal ganglia, hippocampus, amygdala or ventral "
            "diencephalon",
            "juxtacortical/cortical": "Mostly in the cerebral cortex, or elsewhere, at most "
            f"{CLASS_LIMITS[CORTICAL_CLASS][1]:g} mm from it and not periventricular",
            "periventricular": "Elsewhere, at most "
            f"{CLASS_LIMITS['periventricular'][1]:g} mm from a lateral ventricle",
            "deep white matter": "All others",
        },
    },
}

HISTOGRAM_COLUMNS: dict[str, dict[str, Any]] = {
    "score_lower": {"Description": "Lower edge of the bin; excluded, except in the first bin"},
    "score_upper": {"Description": "Upper edge of the bin, included; inf for the last bin"},
    "n_nonlesion": {
        "Description": "Brain voxels in the bin outside the lesion mask; all of them without a lesion mask"
    },
    "n_lesion": {"Description": "Brain voxels in the bin inside the lesion mask; n/a without a lesion mask"},
}

LESION_COLUMNS: dict[str, dict[str, Any]] = {
    "lesion": {"Description": "Number of the lesion, the largest first; the same for all detectors"},
    "volume_mm3": {
        "Description": "Volume of the lesion inside the brain mask, SRI24 space",
        "Units": "mm^3",
    },
    "detected_fraction": {"Description": "Fraction of the lesion voxels in the anomaly mask"},
    "detected": {"Description": "1 if at least one lesion voxel is in the anomaly mask, else 0"},
    "contrast": {
        "Description": "Mean intensity of the preprocessed image in the lesion minus the mean in the "
        "surrounding brain (up to 6 mm from this lesion, more than 2 mm from any lesion), divided by the "
        "standard deviation there; n/a with fewer than 20 surrounding voxels"
    },
    **_CENTROID_COLUMNS,
}

LONGITUDINAL_COLUMNS: dict[str, dict[str, Any]] = {
    "modality": {"Description": "Modality of the images: T1w, T2w or FLAIR"},
    "detector": {"Description": "Name of the detector"},
    "session_before": {"Description": "Earlier of two consecutive sessions"},
    "session_after": {"Description": "Later of the two sessions"},
    "residual_mm": {
        "Description": "Misalignment of the images of the two sessions in SRI24 space: mean displacement, "
        "over the brain, by the rigid transform that aligns them; n/a if it was not measured",
        "Units": "mm",
    },
    "not_matched": {
        "Description": "Why the sessions are not matched, in words (the row then has no lesion); n/a for "
        "matched sessions"
    },
    "lesion": {
        "Description": "Number of the lesion, the same in all rows of the table; the largest first. Lesions "
        "that merge in one of the sessions have one number"
    },
    "change": {
        "Description": "Change of the lesion from the first session to the second",
        "Levels": {
            "new": "In the second session only",
            "grown": "Larger in the second session",
            "shrunk": "Smaller in the second session",
            "gone": "In the first session only",
            "unchanged": "Volumes differ by at most change_limit_mm3; also a lesion of one session only",
        },
    },
    "volume_before_mm3": {
        "Description": "Volume in the first session; 0 for new lesions",
        "Units": "mm^3",
    },
    "volume_after_mm3": {
        "Description": "Volume in the second session; 0 for lost ones",
        "Units": "mm^3",
    },
    "volume_change_mm3": {"Description": "Second volume minus the first", "Units": "mm^3"},
    "change_limit_mm3": {
        "Description": "Difference in volume up to which the lesion counts as unchanged, since volumes "
        "differ between two scans of an unchanged brain",
        "Units": "mm^3",
    },
    "overlap_mm3": {"Description": "Volume inside the lesion in both sessions", "Units": "mm^3"},
    "components_before": {
        "Description": "Components of the lesion in the first session, by their index in the dseg table, "
        "separated by commas; n/a for none"
    },
    "components_after": {"Description": "Components of the lesion in the second session, likewise"},
    **{
        name: {**column, "Description": f"{column['Description']}: of the second session, else of the first"}
        for name, column in _CENTROID_COLUMNS.items()
        if name.startswith("centroid_")
    },
    "region": {
        "Description": "Region of the largest component in the second session (else in the first), from the "
        "dseg table; n/a if there is none"
    },
}

SCANNER_SEEN_LEVELS = {
    "seen": "The training data include a scanner of this name in a dataset of this name",
    "name seen elsewhere": "The training data include a scanner of this name, but in another dataset",
    "unseen": "The training data include no scanner of this name",
}
"""Values of the column `scanner_seen`."""
METRICS_COLUMNS: dict[str, dict[str, Any]] = {
    "source_image": {"Description": "Raw image, as BIDS URI"},
    "modality": {"Description": "Modality of the raw image: T1w, T2w or FLAIR"},
    "detector": {"Description": "Name of the detector"},
    "preset": {"Description": "Hyperparameter preset of the detector"},
    "model_sha256": {"Description": "SHA-256 of the model bundle"},
    "app_version": {"Description": "Version of bids_uad"},
    "seen_in_training": {
        "Description": "Data of the model that include the participant: training, validation or normative "
        "reference, several joined by 'and'; else no"
    },
    "scanner_seen": {
        "Description": "Whether the training data include the scanner of the participant (column scanner of "
        "participants.tsv); n/a if the scanner or those of the training data are not known",
        "Levels": SCANNER_SEEN_LEVELS,
    },
    "threshold": {
        "Description": "Score above which a voxel is anomalous. With a decision rule (LowThreshold in the "
        "sidecar of the mask): score that a voxel of each component exceeds"
    },
    "threshold_name": {"Description": "Criterion by which the threshold was chosen on validation data"},
    "min_component_volume_mm3": {
        "Description": "Minimum volume of components of the anomaly mask: that of the model, fixed on "
        "validation data, or --min-lesion-size",
        "Units": "mm^3",
    },
    "healthy_mean": {
        "Description": "Mean fraction of the brain in the anomaly mask, healthy validation scans of the "
        "model; n/a if the model bundle does not state it"
    },
    "healthy_p95": {
        "Description": "95th percentile of the fraction of the brain in the anomaly mask, healthy validation "
        "scans of the model; n/a if the model bundle does not state it"
    },
    "brain_volume_mm3": {"Description": "Volume of the brain mask in SRI24 space", "Units": "mm^3"},
    "anomaly_volume_mm3": {"Description": "Volume of the anomaly mask", "Units": "mm^3"},
    "lesion_volume_mm3": {"Description": "Volume of the lesion mask inside the brain", "Units": "mm^3"},
    "detected_volume_mm3": {
        "Description": "Volume of the anomaly mask inside the lesion mask and the brain",
        "Units": "mm^3",
    },
    "n_components": {"Description": "Number of 26-connected components of the anomaly mask"},
    "min_lesion_volume_mm3": {
        "Description": "Minimum volume of counted lesions and of false-positive components "
        "(--min-counted-volume)",
        "Units": "mm^3",
    },
    "n_counted_components": {
        "Description": "Number of components of the anomaly mask of at least min_lesion_volume_mm3"
    },
    "n_lesions": {
        "Description": "Number of lesions: 26-connected components of the lesion mask inside the brain, of "
        "at least min_lesion_volume_mm3"
    },
    "n_lesions_detected": {"Description": "Number of these lesions that overlap with the anomaly mask"},
    "n_false_components": {
        "Description": "Number of false-positive components: components of the anomaly mask of at least "
        "min_lesion_volume_mm3 that overlap with no lesion of any size"
    },
}

_AS_MRIQC = "as in MRIQC, tissues segmented by intensity"
QUALITY_COLUMNS: dict[str, dict[str, Any]] = {
    "source_image": {"Description": "Raw image, as BIDS URI"},
    "modality": {"Description": "Modality of the raw image: T1w, T2w or FLAIR"},
    "exclude": {
        "Description": "Whether the group level excludes the image; may be edited by hand",
        "Levels": {
            "yes": "Preprocessing has failed, or a quality check indicates that it may have",
            "no": "All checks have passed",
        },
    },
    "exclude_reasons": {"Description": "Failed checks, in words"},
    "depends_on": {
        "Description": "Other images of the participant whose brain mask or registration was used for this "
        "image: the T1w image that it was registered to, and the image on whose grid the lesion mask is"
    },
    "exclude_dependents": {
        "Description": "Whether excluding this image also excludes the images that depend on it "
        "(depends_on); no effect if exclude is no; may be edited by hand",
        "Levels": {
            "yes": "Its brain mask or registration failed",
            "no": "The reason, such as noise, concerns this image only",
        },
    },
    "snr_csf": {"Description": f"Signal-to-noise ratio of cerebrospinal fluid, {_AS_MRIQC}"},
    "snr_gm": {"Description": f"Signal-to-noise ratio of grey matter, {_AS_MRIQC}"},
    "snr_wm": {"Description": f"Signal-to-noise ratio of white matter, {_AS_MRIQC}"},
    "snr_total": {"Description": "Mean of snr_csf, snr_gm and snr_wm"},
    "cnr": {
        "Description": f"Contrast-to-noise ratio of white and grey matter, {_AS_MRIQC}; background noise is "
        "taken as 0 in skull-stripped images"
    },
    "cjv": {"Description": f"Coefficient of joint variation of white and grey matter, {_AS_MRIQC}"},
    "efc": {"Description": "Entropy focus criterion, as in MRIQC; lower in skull-stripped images"},
    "wm2max": {"Description": "White-matter median divided by the 99.95th percentile, as in MRIQC"},
    "icvs_csf": {"Description": "Fraction of cerebrospinal fluid in the brain mask"},
    "icvs_gm": {"Description": "Fraction of grey matter in the brain mask"},
    "icvs_wm": {"Description": "Fraction of white matter in the brain mask"},
    "brain_volume_mm3": {"Description": "Volume of the brain mask in SRI24 space", "Units": "mm^3"},
    "native_brain_volume_mm3": {"Description": "Volume of the brain mask in native space", "Units": "mm^3"},
    "kept_fraction": {
        "Description": "Fraction of the brain mask inside the SRI24 grid and the field of view of the image, "
        "with signal"
    },
    "outside_fov_fraction": {
        "Description": "Fraction of the reference brain outside the field of view of the image"
    },
    "unscored_fraction": {
        "Description": "Fraction of the brain mask that is outside the field of view or where the image has "
        "no signal; these voxels are removed from the brain mask in SRI24 space and are not scored"
    },
    "mask_overlap": {"Description": "Dice coefficient of the brain mask with that of the reference image"},
    "similarity": {
        "Description": "Normalised mutual information with the image it was registered to, from 0 (none) to 1"
    },
    "mirrored_similarity": {
        "Description": "Normalised mutual information after mirroring left and right; larger than similarity "
        "if left and right are swapped; n/a for a symmetric reference image"
    },
    "local_correlation": {
        "Description": "Correlation with the image it was registered to, median over 12 mm cubes of the "
        "brain; negative for opposite contrasts"
    },
    "rotation_degrees": {
        "Description": "Rotation angle of the registration to the atlas",
        "Units": "degree",
    },
    "restarted": {"Description": "Whether the registration was repeated from rotated start positions"},
    "skull_stripped": {"Description": "Whether the raw image was skull-stripped"},
    "brain_mask_origin": {
        "Description": "Source of the brain mask",
        "Levels": {
            "given": "Brain mask of another pipeline",
            "background": "Background of the skull-stripped image",
            "extracted": "Brain extraction",
            "anchor": "Brain mask of the T1w image that this image was registered to",
        },
    },
}


def bids_uri(dataset: str, path: Path) -> str:
    """Return the BIDS URI of a file.

    Parameters
    ----------
    dataset : str
        Name of the dataset in `DatasetLinks`; empty for the dataset that contains the URI.
    path : pathlib.Path
        Path relative to the dataset. Characters that are not allowed in a URI, such as spaces, are
        percent-encoded; `+`, which labels may contain, is kept.

    Returns
    -------
    str
        URI such as ``bids:raw:sub-01/anat/sub-01_T1w.nii.gz``.
    """
    return f"bids:{dataset}:{quote(path.as_posix(), safe='/+')}"


def raw_uri(unit: ImageUnit, bids_dir: Path) -> str:
    """Return the BIDS URI of a raw image."""
    return bids_uri("raw", unit.path.relative_to(bids_dir))


def own_uri(path: Path) -> str:
    """Return the BIDS URI of an output of this dataset (path relative to the dataset)."""
    return bids_uri("", path)


def _space_fields(space: OutputSpace) -> dict[str, Any]:
    """Return the fields that describe the space of an output other than SRI24."""
    if not space.is_template:
        return {"SpatialReference": "orig"}
    size = {"Resolution": f"Voxels of {space.resolution} mm"} if space.resolution else {}
    return {"SpatialReference": MNI_REFERENCE, **size}


def preprocessing_sidecars(
    unit: ImageUnit, bids_dir: Path, reference: dict[str, Any], spaces: Iterable[OutputSpace] = ()
) -> dict[str, dict[str, Any]]:
    """Return the sidecars of the preprocessing outputs of an image.

    Parameters
    ----------
    unit : ImageUnit
        The image.
    bids_dir : pathlib.Path
        Root of the raw dataset.
    reference : dict
        Metadata of the reference image.
    spaces : iterable of OutputSpace, default=()
        Further spaces of the outputs.

    Returns
    -------
    dict of str to dict
        Metadata by output field. Transforms have no sidecar, since BIDS does not define them yet.
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

    def preproc(name: str) -> dict[str, Any]:
        return {
            "Description": f"Skull-stripped {unit.modality} image in {name} space, {corrected}, divided by "
            "its 99.5th percentile inside the brain mask (values may exceed 1); 0 outside the brain",
            "SkullStripped": True,
        }

    def brain_mask(name: str) -> dict[str, Any]:
        return {
            "Description": f"Brain mask of the {unit.modality} image in {name} space, without voxels that "
            "the image does not cover or where it has no signal",
            "Type": "Brain",
        }

    in_templates = {}
    for space in spaces:
        if space.is_template:
            fields = {**_space_fields(space), "Transformation": TO_TEMPLATE, "Sources": sources}
            in_templates[space.kind("preproc")] = {**preproc(space.name), **fields}
            in_templates[space.kind("brain_mask")] = {**brain_mask(space.name), **fields}
    return {
        "preproc": {**preproc(NAME), **in_space},
        "brain_mask": {**brain_mask(NAME), **in_space},
        **in_templates,
        "native_mask": {
            "Description": f"Brain mask of the {unit.modality} image in native space",
            "Type": "Brain",
            "SpatialReference": "orig",
            "Sources": sources,
        },
    }


def quality_sidecar(preproc: Path, brain_mask: Path) -> dict[str, Any]:
    """Return the sidecar of a quality-control table; the paths are relative to the dataset."""
    return {
        "Description": "Image quality metrics and quality control of the preprocessing of one image",
        **QUALITY_COLUMNS,
        "Sources": [own_uri(preproc), own_uri(brain_mask)],
        "SpatialReference": SPATIAL_REFERENCE,
        "SoftwareVersion": __version__,
    }


def longitudinal_sidecar(
    sources: Iterable[Path], sessions: Iterable[str], max_residual: float, limits: dict[str, float]
) -> dict[str, Any]:
    """Return the sidecar of a table of lesions in several sessions.

    Parameters
    ----------
    sources : iterable of pathlib.Path
        Label images of the components, relative to the dataset.
    sessions : iterable of str
        Labels of the sessions in their order.
    max_residual : float
        Misalignment in mm above which sessions are not matched.
    limits : dict of str to float
        Limits of change of the modality: `ChangeLimitVolume` (mm3), `ChangeLimitFraction` and
        `ChangeLimitSingle` (mm3).

    Returns
    -------
    dict
        Metadata of the table.
    """
    return {
        "Description": "Change of each lesion (connected component of the anomaly masks) between consecutive "
        "sessions, by overlap in SRI24 space",
        **LONGITUDINAL_COLUMNS,
        "Sessions": list(sessions),
        "MaxResidual": max_residual,
        **limits,
        "Sources": [own_uri(path) for path in sources],
        "SpatialReference": SPATIAL_REFERENCE,
        "SoftwareVersion": __version__,
        "Note": NOT_CLINICAL,
    }


def lesion_uri(mask: Path, lesions_dir: Path) -> str:
    """Return the BIDS URI of a lesion mask."""
    return bids_uri("lesions", mask.relative_to(lesions_dir))


def lesion_sidecar(mask_uri: str, own: dict[str, Any]) -> dict[str, Any]:
    """Return the sidecar of a lesion mask in SRI24 space.

    Parameters
    ----------
    mask_uri : str
        BIDS URI of the input mask.
    own : dict
        Sidecar of the input mask, from which the field `Manual` (drawn by hand) is copied.

    Returns
    -------
    dict
        Metadata of the mask.
    """
    manual = {"Manual": own["Manual"]} if isinstance(own.get("Manual"), bool) else {}
    return {
        "Description": f"Lesion mask provided by the user, resampled to {NAME} space",
        "Type": "Lesion",
        **manual,
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
    spaces: Iterable[OutputSpace] = (),
) -> dict[str, dict[str, Any]]:
    """Return the sidecars of the outputs of one detector for an image.

    Parameters
    ----------
    files : dict of str to pathlib.Path
        Outputs by kind, relative to the dataset (:func:`bids_uad.dataset.naming.detection_outputs`).
    inputs : dict of str to pathlib.Path
        Inputs: `preproc`, `brain_mask`, `raw` (a BIDS URI) and, with a lesion mask, `lesion`.
    model : dict
        Fields of the model in every sidecar: `Model`, `ModelSHA256`, `Threshold` and so on.
    run : dict
        Fields of the run in every sidecar: `Device`, `RandomSeed` and so on.
    parcellations : iterable of str, default=()
        Parcellations that have a column in the table of components.
    min_lesion_volume : float
        Minimum volume of a counted lesion in mm3.
    spaces : iterable of OutputSpace, default=()
        Further spaces of map, mask and components.

    Returns
    -------
    dict of str to dict
        Metadata by kind, for every kind in `files`. `dseg`, `components` and look-up tables share one
        sidecar.
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
            name.lower(): {
                "Description": f"Region of {name} with most of the component; n/a outside all regions"
            }
            for name in parcellations
        },
        **derived,
    }
    lesions = {
        "lesions": {
            "Description": "Lesions (26-connected components of the lesion mask inside the brain) of any "
            "size, and their detection; lesions below MinLesionVolume (mm3) are not counted in other tables",
            **LESION_COLUMNS,
            **in_space,
            "Sources": [own_uri(inputs["preproc"]), *counted],
            **counting,
        }
    }
    native = {
        "Type": "Lesion",
        "Sources": [own_uri(files["mask"]), str(inputs["raw"])],
        "SpatialReference": "orig",
        **common,
    }
    roi = {"Description": "Anomaly mask on the grid of the raw T1w image, for fMRIPrep and FastSurfer"}
    resampled = {}
    for space in spaces:
        for kind, description in _RESAMPLED.items():
            if space.kind(kind) not in files:
                continue
            resampled[space.kind(kind)] = {
                "Description": description,
                **({"Type": "Lesion"} if kind == "mask" else {}),
                **_space_fields(space),
                **({"Transformation": TO_TEMPLATE} if space.is_template else {}),
                "Sources": [own_uri(files[kind]), *([] if space.is_template else [str(inputs["raw"])])],
                **common,
            }
    return {
        **(lesions if "lesions" in files else {}),
        **({"roi": {**roi, **native}} if "roi" in files else {}),
        "anomalymap": {
            "Description": DEVIATION_MAP if "Deviation" in model else ANOMALY_MAP,
            **scored,
        },
        "probseg": {
            "Description": "Anomaly score rescaled to [0, 1), with the threshold at 0.5; not a probability",
            "Formula": PROBSEG_FORMULA,
            **derived,
        },
        "mask": {
            "Description": MASK_BY_RULE
            if "LowThreshold" in model
            else "Anomaly mask: voxels whose score is above the threshold",
            "Type": "Lesion",
            **derived,
        },
        "dseg": components,
        "components": components,
        **dict.fromkeys(LOOK_UP_TABLES, components),
        "native_mask": {"Description": "Anomaly mask on the grid of the raw image", **native},
        "histogram": {
            "Description": "Histogram of the anomaly scores of the brain voxels",
            **HISTOGRAM_COLUMNS,
            **in_space,
            "Sources": counted,
            **common,
        },
        "metrics": {
            "Description": "Volumes and lesion counts of one image at the threshold of the detector",
            **METRICS_COLUMNS,
            **in_space,
            "Sources": counted,
            **counting,
        },
        **resampled,
    }
