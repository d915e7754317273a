"""Methods text of the participant level, which users may copy into a manuscript, and its files in `logs/`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Any

from bids_uad import __version__
from bids_uad.calibration.normative import FWHM
from bids_uad.engine.bundle import OPTION_MINIMUM
from bids_uad.files import write_text
from bids_uad.methods.registry import detector_name
from bids_uad.preprocessing.brain_extraction.masks import COMBINED, TEMPLATE
from bids_uad.reports.bibliography import read_entries
from bids_uad.reports.pathways import EXTRACTED, Pathway, lesion_text, preprocessing_text

THRESHOLD_NAMES = {
    "max_dice": "best Dice on validation lesions",
    "max_dice_f1": "best mean of Dice and lesion-wise F1 on validation lesions, with a decision rule",
    "fpr_1pct": "1 % false positives in healthy validation brains",
    "fpr_5pct": "5 % false positives in healthy validation brains",
}
REGION_SOURCES = {"LPBA40": "LPBA40 [@lpba40]", "TZO116": "TZO116 [@tzo116]"}
SYNTHSEG_MAPS = "training_seg_"
"""Prefix of the names of SynthSeg's training label maps."""
RENAMED_FIELDS = {"met": "seen_in", "reference": "normative_cohort", "assumed": "imputed"}
"""Fields of `UsedModel` in completion records of earlier versions, and their names now."""
_PANDOC_SECONDS = 60


@dataclass(frozen=True)
class UsedModel:
    """A model that was applied in a run.

    Attributes
    ----------
    detector, modality, preset : str
        As in the model bundle; the detector with the suffix of its deviation (`pls+normative`).
    threshold : float
        The fixed threshold.
    threshold_name : str
        How it was fixed, such as ``max_dice``.
    training : mapping, default={}
        Training cohort: `n_scans`, `n_subjects`, `n_held_out_subjects`, `source` and `anatomies` of
        `training` in ``bundle.json``.
    post_processing : str, default=""
        Filter of the scores (`Bundle.post_processing`); empty if not known.
    precision : str, default=""
        Precision of the networks, `fp32` or `bf16`; empty if not known.
    seen_in : tuple of str, default=()
        Cohorts of the model to which participants of this dataset belong: `training`, `validation`,
        `normative reference`.
    covariates : tuple of str, default=()
        Covariates of the normative reference besides brain volume: `age`, `sex`.
    normative_cohort : str, default=""
        Dataset on which the normative reference was fitted in addition to the validation scans.
    imputed : bool, default=False
        Whether a missing age or sex of a participant was replaced by the mean of the reference.
    rule : mapping, default={}
        Decision rule besides the threshold, see :func:`describe_rule`; empty for a plain threshold.
    """

    detector: str
    modality: str
    preset: str
    threshold: float
    threshold_name: str
    training: Mapping[str, Any] = field(default_factory=dict)
    post_processing: str = ""
    precision: str = ""
    seen_in: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    normative_cohort: str = ""
    imputed: bool = False
    rule: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_record(cls, fields: Mapping[str, Any]) -> UsedModel:
        """Create the description from a completion record, also one of an earlier version."""
        values = {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}
        return cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        )

    @property
    def title(self) -> str:
        """Detector and modality, as printed in the text."""
        return f"{detector_name(self.detector)} on {self.modality}"


def assets() -> Traversable:
    """Return the folder of the text fragments: inside the installed package, or beside it in a checkout.

    Raises
    ------
    FileNotFoundError
        If there is none, because the installation is incomplete.
    """
    package = resources.files("bids_uad")
    for folder in (package / "data" / "boilerplate", Path(str(package)).parent / "boilerplate"):
        if (folder / "bids_uad.bib").is_file():
            return folder
    raise FileNotFoundError("the fragments of the methods text are not installed; install bids_uad again")


def bibliography() -> dict[str, dict[str, str]]:
    """Read ``bids_uad.bib``: fields by citation key."""
    return read_entries((assets() / "bids_uad.bib").read_text(encoding="utf-8"))


def describe_threshold(name: str) -> str:
    """Return how a threshold was fixed, in words; names that are not known are returned unchanged."""
    return THRESHOLD_NAMES.get(name, name)


def describe_rule(rule: Mapping[str, Any]) -> str:
    """Return a decision rule besides its threshold in words; empty without one.

    Parameters
    ----------
    rule : mapping
        Entries of `DecisionRule.entries` and, if known, `min_volume_source`, the source of the minimum volume
        (`Bundle.min_component_volume_source`); empty for a plain threshold.
    """
    if not rule:
        return ""
    minimum = rule["min_volume_mm3"]
    volume = f"at least {minimum:g} mm\N{SUPERSCRIPT THREE}" if minimum else "any volume"
    source = f" ({OPTION_MINIMUM})" if rule.get("min_volume_source") == OPTION_MINIMUM else ""
    holes = {"3d": ", cavities filled", "axial": ", holes of axial slices filled"}.get(rule["holes"], "")
    return (
        f"components of voxels above {rule['low_threshold']:.3g} with a voxel above the threshold and "
        f"{volume}{source}{holes}"
    )


def methods_text(
    models: Sequence[UsedModel],
    *,
    pathways: Mapping[Pathway, int] | None = None,
    parcellations: Sequence[str] = (),
    template: str = "",
    version: str = __version__,
) -> str:
    """Write the methods section for images that were processed.

    Parameters
    ----------
    models : sequence of UsedModel
        Models that were applied, in the order in which they are named.
    pathways : mapping of Pathway to int, optional
        Number of images of each preprocessing pathway.
    parcellations : sequence of str, default=()
        Parcellations of the atlas that name the components.
    template : str, default=""
        Template in whose space there are outputs as well; empty if there are none.
    version : str
        Version of bids_uad; by default this one.

    Returns
    -------
    str
        Markdown with `[@key]` citations of ``bids_uad.bib``.
    """
    pathways = pathways or {}
    parts = [fragment("introduction", version=version)]
    if pathways:
        parts.append(preprocessing_text(pathways))
        stand_in = any(pathway.stand_in for pathway in pathways)
        parts.append(fragment("reference_standin" if stand_in else "reference_atlas"))
        parts.append(fragment("quality"))
    if models:
        parts += _detection(models)
        parts.append(fragment("region_atlas"))
        if parcellations:
            sources = [REGION_SOURCES.get(name, name) for name in parcellations]
            parts.append(fragment("regions", parcellations=" and ".join(sources)))
    if template:
        parts.append(fragment("output_space", template=template))
    if lesions := lesion_text(pathways):
        parts.append(fragment("ground_truth", lesions=lesions))
    parts += [_software(models, pathways), fragment("copyright")]
    return "\n\n".join(parts) + "\n"


def _detection(models: Sequence[UsedModel]) -> list[str]:
    """Describe detectors, training, deviations and thresholds, one paragraph each."""
    names = list(dict.fromkeys(model.detector.split("+")[0] for model in models))
    parts = [fragment("detection", detectors=_detector_list(models), filters=_filters(models))]
    protocols = {"published" if model.preset == "paper" else "corrected" for model in models}
    parts += [fragment(f"protocol_{name}") for name in sorted(protocols)]
    parts += [_detector_fragment(name) for name in names]
    parts += _training(models)
    parts += _normative(models)
    seen = [model for model in models if "validation" in model.seen_in]
    tuned = (
        f"Participants of this dataset were among the validation scans of {_titles(seen)}, for which results "
        "are therefore optimistic."
        if seen
        else "No threshold was tuned on the data reported here."
    )
    return [*parts, fragment("thresholds", thresholds=threshold_list(models), tuned=tuned)]


def _filters(models: Sequence[UsedModel]) -> str:
    """Describe the filters of the scores, grouping models with the same filter, and the precision."""
    filters: dict[str, list[UsedModel]] = {}
    for model in models:
        filters.setdefault(model.post_processing or "three-dimensional median filter", []).append(model)
    if len(filters) == 1:
        texts = list(filters)
    else:
        texts = [f"{text} for {_titles(group)}" for text, group in filters.items()]
    reduced = [model for model in models if model.precision == "bf16"]
    if not reduced:
        return "; ".join(texts)
    which = "" if len(reduced) == len(models) else f" of {_titles(reduced)}"
    return f"{'; '.join(texts)}. Networks{which} were evaluated in bfloat16 precision"


def _titles(models: Sequence[UsedModel]) -> str:
    return ", ".join(dict.fromkeys(model.title for model in models))


def _software(models: Sequence[UsedModel], pathways: Mapping[Pathway, int]) -> str:
    """Describe the software; ANTs and PyTorch only if they were used."""
    by_template = any(
        pathway.mask_origin == EXTRACTED and pathway.extraction in (COMBINED, TEMPLATE)
        for pathway in pathways
    )
    uses = {
        "extracted brains by registration": by_template,
        "corrected intensity non-uniformity": not all(pathway.image_given for pathway in pathways),
    }
    ants = " and ".join(use for use, applies in uses.items() if applies)
    parts = [fragment("software_ants", did=ants)] if ants else []
    parts += [fragment("software_torch")] if models else []
    return fragment("software", further="".join(f"{part} " for part in parts))


def fragment(name: str, /, **values: str) -> str:
    """Read a fragment of methods text and insert values.

    Parameters
    ----------
    name : str
        Name of a file in ``boilerplate/methods``, without extension.
    **values : str
        Value of each ``$name``. Other names are those of packages, and are replaced by their versions.
    """
    template = Template((assets() / "methods" / f"{name}.md").read_text(encoding="utf-8"))
    versions = {
        package: metadata.version(package) for package in template.get_identifiers() if package not in values
    }
    return template.substitute(values | versions).strip()


def write_citation(out_dir: Path, text: str, name: str = "CITATION", *, md_only: bool = False) -> list[Path]:
    """Write the methods text and its bibliography to ``logs/``.

    Parameters
    ----------
    out_dir : pathlib.Path
        Root of the derivative dataset.
    text : str
        Markdown of `methods_text`.
    name : str, default="CITATION"
        Name of the files without extension; the bibliography is always ``CITATION.bib``.
    md_only : bool, default=False
        Whether pandoc is not used.

    Returns
    -------
    list of pathlib.Path
        ``CITATION.md``, ``CITATION.bib`` and, where pandoc is used, installed and works, ``CITATION.html``
        and ``CITATION.tex``.
    """
    logs = Path(out_dir) / "logs"
    references = write_text(logs / "CITATION.bib", (assets() / "bids_uad.bib").read_text(encoding="utf-8"))
    written = [references]
    for kind in ("html", "tex"):
        page = logs / f"{name}.{kind}"
        # Remove the page of an earlier run, which would contradict the text.
        page.unlink(missing_ok=True)
        content = None if md_only else _pandoc(text, kind, references)
        if content is not None:
            written.append(write_text(page, content))
    # The text comes last: where it is up to date, the other files are.
    return [write_text(logs / f"{name}.md", text), *written]


def _pandoc(text: str, kind: str, references: Path) -> str | None:
    """Convert the text with pandoc; return None if it is not installed or its output is incomplete."""
    pandoc = shutil.which("pandoc")
    if pandoc is None:
        return None
    style, to, end = {
        "html": ("--citeproc", "html", "</body>"),
        "tex": ("--natbib", "latex", r"\end{document}"),
    }[kind]
    command = [pandoc, "--standalone", style, "--bibliography", references.name]
    command += ["--metadata", "pagetitle=bids_uad methods", "--from", "markdown", "--to", to]
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            timeout=_PANDOC_SECONDS,
            check=False,
            cwd=references.parent,
        )
    except subprocess.TimeoutExpired:
        return None
    # fMRIPrep-like report assemblers require a complete page.
    return done.stdout if done.returncode == 0 and end in done.stdout else None


def _detector_fragment(detector: str) -> str:
    if (assets() / "methods" / f"{detector}.md").is_file():
        return fragment(detector)
    return fragment("other_detector", name=detector_name(detector))


def _detector_list(models: Sequence[UsedModel]) -> str:
    used = [f"{model.title} (preset `{model.preset}`)" for model in models]
    noun = "detector was" if len(used) == 1 else "detectors were"
    return f"The following {noun} applied: {', '.join(used)}"


def _training(models: Sequence[UsedModel]) -> list[str]:
    """Describe the training cohorts, grouping models with the same cohort."""
    cohorts: dict[str, list[UsedModel]] = {}
    anatomies: set[str] = set()
    for model in models:
        if not model.training:
            continue
        cohort = model.training
        words = f"{cohort['n_scans']} scans of {cohort['n_subjects']} subjects ({cohort['source']}"
        held_out = cohort.get("n_held_out_subjects")
        words += f"; {held_out} of them held out to monitor the training)" if held_out else ")"
        cohorts.setdefault(words, []).append(model)
        anatomies.update(cohort.get("anatomies") or ())
    if not cohorts:
        return []
    text = "; ".join(f"{words}: {_titles(group)}" for words, group in cohorts.items())
    seen = [model for model in models if "training" in model.seen_in]
    if seen:
        text += f". Participants of this dataset were among the training data of {_titles(seen)}"
    parts = [fragment("training", cohorts=text)]
    if any(name.startswith(SYNTHSEG_MAPS) for name in anatomies):
        parts.append(fragment("training_synthseg"))
    return parts


def _normative(models: Sequence[UsedModel]) -> list[str]:
    """Describe the normative references, grouping models with the same covariates and cohort."""
    groups: dict[tuple[tuple[str, ...], str], list[UsedModel]] = {}
    for model in models:
        if "+" in model.detector:
            groups.setdefault((model.covariates, model.normative_cohort), []).append(model)
    parts = []
    for (covariates, added), group in groups.items():
        names = ", ".join(covariates) + " and brain volume" if covariates else "brain volume"
        names += ", with a variance linear in age" if "age" in covariates else ""
        cohort = f"validation scans and {added}" if added else "validation scans"
        values = {"models": _titles(group), "covariates": names, "cohort": cohort, "fwhm": f"{FWHM:g}"}
        parts.append(fragment("normative", **values))
        if any(model.imputed for model in group):
            parts.append(fragment("normative_imputed"))
    return parts


def threshold_list(models: Sequence[UsedModel]) -> str:
    """List the threshold of each model and how it was fixed."""
    return "; ".join(
        f"{model.title}: {model.threshold:.4g} ({describe_threshold(model.threshold_name)}"
        f"{': ' if model.rule else ''}{describe_rule(model.rule)})"
        for model in models
    )
