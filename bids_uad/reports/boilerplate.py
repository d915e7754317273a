"""The methods text that users may copy into their manuscript, with its references."""

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
from bids_uad.atomic import write_text
from bids_uad.calibration.normative import FWHM
from bids_uad.reports.bibliography import read_entries
from bids_uad.reports.group_text import detector_name

THRESHOLD_NAMES = {
    "max_dice": "best Dice on validation lesions",
    "fpr_1pct": "1 % false positives in healthy validation brains",
    "fpr_5pct": "5 % false positives in healthy validation brains",
}
REGION_SOURCES = {"LPBA40": "LPBA40 [@lpba40]", "TZO116": "TZO116 [@tzo116]"}
SYNTHSEG_MAPS = "training_seg_"
"""What the label maps of SynthSeg's training are called."""
_PANDOC_SECONDS = 60


@dataclass(frozen=True)
class UsedModel:
    """A model that took part in a run.

    Attributes
    ----------
    detector, modality, preset : str
        As in the model bundle.
    threshold : float
        The fixed threshold.
    threshold_name : str
        How it was fixed, such as ``max_dice``.
    training : mapping
        Cohort it has learnt from: `training` of its ``bundle.json``.
    """

    detector: str
    modality: str
    preset: str
    threshold: float
    threshold_name: str
    training: Mapping[str, Any] = field(default_factory=dict)


def assets() -> Traversable:
    """Find the folder with the fragments: inside the installed package, or beside it in a checkout.

    Raises
    ------
    FileNotFoundError
        If neither is there: the installation is broken.
    """
    package = resources.files("bids_uad")
    for folder in (package / "data" / "boilerplate", Path(str(package)).parent / "boilerplate"):
        if (folder / "bids_uad.bib").is_file():
            return folder
    raise FileNotFoundError("the methods text's fragments are not installed with bids_uad")


def bibliography() -> dict[str, dict[str, str]]:
    """Read ``bids_uad.bib``: fields by citation key."""
    return read_entries((assets() / "bids_uad.bib").read_text(encoding="utf-8"))


def threshold_words(name: str) -> str:
    """Say how a threshold was fixed."""
    return THRESHOLD_NAMES.get(name, name)


def methods_text(
    models: Sequence[UsedModel],
    *,
    stand_in: bool,
    preprocessing: str | None = None,
    ground_truth: bool = False,
    parcellations: Sequence[str] = (),
    version: str = __version__,
) -> str:
    """Write the methods section of a run.

    Parameters
    ----------
    models : sequence of UsedModel
        In the order they are named.
    stand_in : bool
        Whether the built-in reference took the place of the SRI24 atlas.
    preprocessing : str, optional
        What the preprocessing workflow says about itself (`LiterateWorkflow.visit_desc`); without it, a
        summary.
    ground_truth : bool
        Whether lesion masks were given.
    parcellations : sequence of str
        Of the atlas, by whose regions components are named.
    version : str
        Version of bids_uad.

    Returns
    -------
    str
        Markdown with `[@key]` citations, each of which is in ``bids_uad.bib``.
    """
    parts = [fragment("introduction", version=version)]
    told = (preprocessing or "").strip()
    parts.append(f"**Preprocessing.** {told}" if told else fragment("preprocessing"))
    parts.append(fragment("reference_standin" if stand_in else "reference_atlas"))
    parts.append(fragment("quality"))
    if models:
        names = list(dict.fromkeys(model.detector.split("+")[0] for model in models))
        parts.append(fragment("detection", detectors=_detector_list(models)))
        protocols = {"published" if model.preset == "paper" else "corrected" for model in models}
        parts.extend(fragment(f"protocol_{name}") for name in sorted(protocols))
        parts.extend(_detector_fragment(name) for name in names)
        parts.extend(_training(models))
        if any("+" in model.detector for model in models):
            parts.append(fragment("normative", fwhm=f"{FWHM:g}"))
        parts.append(fragment("thresholds", thresholds=threshold_list(models)))
        if parcellations:
            sources = [REGION_SOURCES.get(name, name) for name in parcellations]
            parts.append(fragment("regions", parcellations=" and ".join(sources)))
    if ground_truth:
        parts.append(fragment("ground_truth"))
    parts += [fragment("software"), fragment("copyright")]
    return "\n\n".join(parts) + "\n"


def fragment(name: str, /, **values: str) -> str:
    """Read a piece of methods text and fill it in.

    Parameters
    ----------
    name : str
        File in ``boilerplate/methods``.
    **values : str
        What stands for each ``$name``; a name that is not given is that of a package, whose version it is.
    """
    template = Template((assets() / "methods" / f"{name}.md").read_text(encoding="utf-8"))
    versions = {
        package: metadata.version(package) for package in template.get_identifiers() if package not in values
    }
    return template.substitute(values | versions).strip()


def write_citation(out_dir: Path, text: str, name: str = "CITATION") -> list[Path]:
    """Write the methods text into ``logs/``, beside its bibliography.

    Parameters
    ----------
    out_dir : pathlib.Path
        Root of the derivative dataset.
    text : str
        From `methods_text`.
    name : str
        Of the files; the bibliography is ``CITATION.bib`` for all of them.

    Returns
    -------
    list of pathlib.Path
        ``CITATION.md``, ``CITATION.bib`` and, where pandoc is installed and works, ``CITATION.html`` and
        ``CITATION.tex``.
    """
    logs = Path(out_dir) / "logs"
    references = write_text(logs / "CITATION.bib", (assets() / "bids_uad.bib").read_text(encoding="utf-8"))
    written = [write_text(logs / f"{name}.md", text), references]
    for kind in ("html", "tex"):
        page = logs / f"{name}.{kind}"
        # A page of an earlier run must not stay beside a newer text.
        page.unlink(missing_ok=True)
        content = _pandoc(text, kind, references)
        if content is not None:
            written.append(write_text(page, content))
    return written


def _pandoc(text: str, kind: str, references: Path) -> str | None:
    """Let pandoc make a page; None unless it is installed and gives a whole one."""
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
    # Report assemblers look for the body and fall over a fragment.
    return done.stdout if done.returncode == 0 and end in done.stdout else None


def _detector_fragment(detector: str) -> str:
    if (assets() / "methods" / f"{detector}.md").is_file():
        return fragment(detector)
    return fragment("other_detector", name=detector_name(detector))


def _detector_list(models: Sequence[UsedModel]) -> str:
    used = [
        f"{detector_name(model.detector)} on {model.modality} (preset `{model.preset}`)" for model in models
    ]
    noun = "detector was" if len(used) == 1 else "detectors were"
    return f"The following {noun} applied: {', '.join(used)}"


def _training(models: Sequence[UsedModel]) -> list[str]:
    """Say whom the models have learnt from, those with the same cohort together."""
    told: dict[str, list[str]] = {}
    anatomies: set[str] = set()
    for model in models:
        if not model.training:
            continue
        cohort = model.training
        words = f"{cohort['n_scans']} scans of {cohort['n_subjects']} people ({cohort['source']})"
        told.setdefault(words, []).append(f"{detector_name(model.detector)} on {model.modality}")
        anatomies.update(cohort["anatomies"] or ())
    if not told:
        return []
    cohorts = "; ".join(f"{words}: {', '.join(who)}" for words, who in told.items())
    parts = [fragment("training", cohorts=cohorts)]
    if any(name.startswith(SYNTHSEG_MAPS) for name in anatomies):
        parts.append(fragment("training_synthseg"))
    return parts


def threshold_list(models: Sequence[UsedModel]) -> str:
    """Name each model's threshold and how it was fixed."""
    return "; ".join(
        f"{detector_name(model.detector)} on {model.modality}: {model.threshold:.4g} "
        f"({threshold_words(model.threshold_name)})"
        for model in models
    )
