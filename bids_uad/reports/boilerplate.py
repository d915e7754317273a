"""The methods text that users may copy into their manuscript, with its references."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from bids_uad import __version__
from bids_uad.atomic import write_text
from bids_uad.reports.group_text import detector_name

THRESHOLD_NAMES = {
    "max_dice": "best Dice on validation lesions",
    "fpr_1pct": "1 % false positives in healthy validation brains",
    "fpr_5pct": "5 % false positives in healthy validation brains",
}
_PANDOC_SECONDS = 30


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
    """

    detector: str
    modality: str
    preset: str
    threshold: float
    threshold_name: str


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


def threshold_words(name: str) -> str:
    """Say how a threshold was fixed."""
    return THRESHOLD_NAMES.get(name, name)


def methods_text(
    models: Sequence[UsedModel],
    *,
    stand_in: bool,
    preprocessing: str | None = None,
    ground_truth: bool = False,
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
    version : str
        Version of bids_uad.

    Returns
    -------
    str
        Markdown with `[@key]` citations, each of which is in ``bids_uad.bib``.
    """
    parts = [_fragment("introduction", version=version)]
    told = (preprocessing or "").strip()
    parts.append(f"**Preprocessing.** {told}" if told else _fragment("preprocessing"))
    parts.append(_fragment("reference_standin" if stand_in else "reference_atlas"))
    if models:
        names = list(dict.fromkeys(model.detector for model in models))
        parts.append(_fragment("detection", detectors=_detector_list(models)))
        protocols = {"published" if model.preset == "paper" else "corrected" for model in models}
        parts.extend(_fragment(f"protocol_{name}") for name in sorted(protocols))
        parts.extend(_detector_fragment(name) for name in names)
        parts.append(_fragment("thresholds", thresholds=_threshold_list(models)))
    if ground_truth:
        parts.append(_fragment("ground_truth"))
    parts.append(_fragment("software"))
    return "\n\n".join(parts) + "\n"


def write_citation(out_dir: Path, text: str) -> list[Path]:
    """Write the methods text into ``logs/``, beside its bibliography.

    Parameters
    ----------
    out_dir : pathlib.Path
        Root of the derivative dataset.
    text : str
        From `methods_text`.

    Returns
    -------
    list of pathlib.Path
        ``CITATION.md``, ``CITATION.bib`` and, where pandoc is installed and works, ``CITATION.html``.
    """
    logs = Path(out_dir) / "logs"
    bibliography = write_text(logs / "CITATION.bib", (assets() / "bids_uad.bib").read_text(encoding="utf-8"))
    written = [write_text(logs / "CITATION.md", text), bibliography]
    page = logs / "CITATION.html"
    # A page of an earlier run must not stay beside a newer text.
    page.unlink(missing_ok=True)
    html = _pandoc(text, bibliography)
    if html is not None:
        written.append(write_text(page, html))
    return written


def _pandoc(text: str, bibliography: Path) -> str | None:
    """Let pandoc make a page; None unless it is installed and gives a whole one."""
    pandoc = shutil.which("pandoc")
    if pandoc is None:
        return None
    command = [pandoc, "--standalone", "--citeproc", "--bibliography", str(bibliography)]
    command += ["--metadata", "pagetitle=bids_uad methods", "--from", "markdown", "--to", "html"]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_PANDOC_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    # Report assemblers look for the body and fall over a fragment.
    whole = done.returncode == 0 and "<body" in done.stdout and "</body>" in done.stdout
    return done.stdout if whole else None


def _fragment(name: str, /, **values: str) -> str:
    text = (assets() / "methods" / f"{name}.md").read_text(encoding="utf-8")
    return Template(text).substitute(values).strip()


def _detector_fragment(detector: str) -> str:
    if (assets() / "methods" / f"{detector}.md").is_file():
        return _fragment(detector)
    return _fragment("other_detector", name=detector_name(detector))


def _detector_list(models: Sequence[UsedModel]) -> str:
    used = [
        f"{detector_name(model.detector)} on {model.modality} (preset `{model.preset}`)" for model in models
    ]
    noun = "detector was" if len(used) == 1 else "detectors were"
    return f"The following {noun} applied: {', '.join(used)}"


def _threshold_list(models: Sequence[UsedModel]) -> str:
    return "; ".join(
        f"{detector_name(model.detector)} on {model.modality}: {model.threshold:.4g} "
        f"({threshold_words(model.threshold_name)})"
        for model in models
    )
