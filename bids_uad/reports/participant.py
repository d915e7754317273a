"""Participant report: a page with figures and numbers of all derivatives of a participant."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from nireports.assembler.report import Report

from bids_uad.dataset.participants import Participants
from bids_uad.evaluation.missing import find_exclusions
from bids_uad.files import atomic_path, write_text
from bids_uad.reports.bibliography import methods_html
from bids_uad.reports.boilerplate import bibliography
from bids_uad.reports.derivatives import (
    Detection,
    Image,
    find_images,
    read_sidecar,
)
from bids_uad.reports.figures.brain_mask import draw_brain_mask
from bids_uad.reports.figures.display import Volume, load_ras
from bids_uad.reports.figures.histogram import ScoreCounts, draw_histogram
from bids_uad.reports.figures.overlay import draw_overlay
from bids_uad.reports.figures.registration import draw_registration
from bids_uad.reports.figures.viewer import write_viewer
from bids_uad.reports.participant_findings import (
    PARCELLATIONS,
    QUALITY_COLUMNS,
    Finding,
    component_rows,
    quality_row,
    summarise,
    summary_row,
    summary_tiles,
)
from bids_uad.reports.participant_spec import anchor, expand_outline
from bids_uad.space import NAME

_PACKAGES = ("nipype", "niworkflows", "nireports", "pybids", "antspyx", "nibabel", "numpy", "scipy", "torch")
_CRASH_CHARACTERS = 20_000
_URL_CHARACTERS = " !$'()*+,-./:;=?@_~"
"""Characters besides letters and digits that need no escape in a data URL within double quotes."""
_GOOD_STATES = ("done", "up to date", "used")


@dataclass(frozen=True)
class Reference:
    """Copies of the reference images in the derivatives; each may be missing."""

    images: dict[str, Path]
    brain: Volume | None
    sidecar: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the reference image, printed in the report."""
        return str(self.sidecar.get("ReferenceName", NAME))


def write_subject_report(
    out_dir: str | Path,
    subject: str,
    *,
    errors: Sequence[str] = (),
    run_info: Mapping[str, Any] | None = None,
    participants: Participants | None = None,
    remarks: Mapping[tuple[str, str], str] | None = None,
    methods: str = "",
    viewer: bool = False,
) -> Path:
    """Draw the figures and write the report of a participant from the derivatives.

    Missing derivatives are skipped. The files are the same in each run.

    Parameters
    ----------
    out_dir : path-like
        Root of the derivative dataset.
    subject : str
        Label, with or without ``sub-``.
    errors : sequence of str, default=()
        Error messages. Nipype's crash files of the run are added.
    run_info : mapping, optional
        Entries of the section *About*, such as `run_id`, `version`, `command` and `device`. `images` is a
        list of mappings with `image`, `status` and `message`, which are shown in the summary.
    participants : Participants, optional
        Contents of participants.tsv; images of healthy controls are not compared with a lesion mask.
    remarks : mapping, optional
        Additional warning about an image, by its prefix and modality.
    methods : str, default=""
        Methods text about the images of the participant, in Markdown.
    viewer : bool, default=False
        Whether an interactive viewer of each anomaly map is written, to which the report links.

    Returns
    -------
    pathlib.Path
        Path of ``sub-<subject>.html``; its figures and viewers are in ``sub-<subject>/figures``.
    """
    out_dir = Path(out_dir).resolve()
    subject = subject.removeprefix("sub-")
    run_info = dict(run_info or {})
    images = find_images(out_dir, subject)
    participants = participants or Participants()
    controls = {
        image.prefix
        for image in images
        if participants.person(f"sub-{subject}", image.entities.get("session")).healthy
    }
    reference = _read_reference(out_dir)
    exclusions, unreadable = find_exclusions(out_dir, frozenset({f"sub-{subject}"}))
    errors = [*errors, *unreadable]
    final = out_dir / f"sub-{subject}" / "figures"
    # nireports reads entities from whole paths: a temporary folder excludes those of the output folder.
    with tempfile.TemporaryDirectory(prefix="bids_uad-") as temporary:
        figures = Path(temporary) / f"sub-{subject}" / "figures"
        figures.mkdir(parents=True)
        findings = [
            (
                image,
                _write_image(
                    figures, image, reference, is_control=image.prefix in controls, with_viewer=viewer
                ),
            )
            for image in images
        ]
        pages = {
            "summary": _summary(
                findings, reference, errors, run_info, exclusions, controls, dict(remarks or {})
            ),
            "errors": _errors(out_dir / f"sub-{subject}", errors, run_info),
            "methods": _methods(methods),
            "about": _about(images, reference, run_info),
        }
        for name, text in pages.items():
            (figures / f"sub-{subject}_desc-{name}_report.html").write_text(text, encoding="utf-8")
        page = _assemble(subject, images, Path(temporary))
        drawn = {path.name for path in _drawn_files(figures)}
        for name in drawn:
            with atomic_path(final / name) as unfinished:
                shutil.copyfile(figures / name, unfinished)
        # The page is written last, so that its figures exist.
        write_text(out_dir / f"sub-{subject}.html", page)
    for stale in _drawn_files(final):
        if stale.name not in drawn:
            stale.unlink()
    return out_dir / f"sub-{subject}.html"


def _drawn_files(folder: Path) -> list[Path]:
    """List the figures and viewers in a folder."""
    return [path for pattern in ("*.svg", "*_viewer.html") for path in folder.glob(pattern)]


def _assemble(subject: str, images: Sequence[Image], staging: Path) -> str:
    """Assemble the staged parts into one page with nireports; figures are part of the page."""
    template = resources.files("bids_uad").joinpath("data/reports/participant.html.j2")
    with resources.as_file(template) as template_path:
        spec, page = staging / "spec.yml", staging / "page.html"
        outline = expand_outline(subject, images, str(template_path.resolve()))
        spec.write_text(yaml.safe_dump(outline, sort_keys=False, allow_unicode=True), encoding="utf-8")
        report = Report(staging, None, bootstrap_file=spec, out_filename=str(page), reportlets_dir=staging)
        report.generate_report()
    return _embed_figures(page.read_text(encoding="utf-8"), staging)


def _embed_figures(page: str, staging: Path) -> str:
    """Replace the relative URLs of figures by data URLs, so that the page needs no other file."""

    def data_url(match: re.Match[str]) -> str:
        svg = (staging / match[2]).read_text(encoding="utf-8")
        # Most of a figure is base64 text, which percent-encoding hardly lengthens.
        return f'{match[1]}="data:image/svg+xml,{quote(svg, safe=_URL_CHARACTERS)}"'

    return re.sub(r'\b(data|src)="\./([^"]+\.svg)"', data_url, page)


def _read_reference(out_dir: Path) -> Reference:
    start = out_dir / f"tpl-{NAME}" / "anat" / f"tpl-{NAME}_desc-brain"
    images = {name: start.with_name(f"{start.name}_{name}.nii.gz") for name in ("T1w", "T2w")}
    mask = start.with_name(f"{start.name}_mask.nii.gz")
    return Reference(
        {name: path for name, path in images.items() if path.is_file()},
        load_ras(mask, bool) if mask.is_file() else None,
        read_sidecar(images["T1w"]),
    )


def _write_image(
    figures: Path, image: Image, reference: Reference, *, is_control: bool, with_viewer: bool
) -> list[tuple[Detection, Finding]]:
    """Draw the figures of one image, and collect the numbers of its detections."""
    scan = None if image.preproc is None else load_ras(image.preproc)
    brain = None if image.brain is None else load_ras(image.brain, bool).data
    if brain is None and scan is not None:
        brain = scan.data > 0
    lesion = None if image.lesion is None or is_control else load_ras(image.lesion, bool).data
    start = f"{image.prefix}_space-{NAME}_desc-"
    if scan is not None:
        # Without a T2w reference image, T2w scans are shown with the T1w one.
        contrast = image.modality if image.modality in reference.images else "T1w"
        if contrast in reference.images and reference.brain is not None:
            draw_registration(
                figures / f"{start}registration_{image.modality}.svg",
                scan,
                load_ras(reference.images[contrast]),
                reference.brain.data,
                scan_name=image.name,
                reference_name=f"{contrast} of {reference.name}",
            )
        draw_brain_mask(
            figures / f"{start}brain_{image.modality}.svg",
            scan,
            brain,
            None if reference.brain is None else reference.brain.data,
            scan_name=image.name,
        )
    return [
        (
            detection,
            _write_detection(
                figures,
                image,
                detection,
                scan=scan,
                brain=brain,
                lesion=lesion,
                is_control=is_control,
                with_viewer=with_viewer,
            ),
        )
        for detection in image.detections
    ]


def _write_detection(
    figures: Path,
    image: Image,
    detection: Detection,
    *,
    scan: Volume | None,
    brain: np.ndarray | None,
    lesion: np.ndarray | None,
    is_control: bool,
    with_viewer: bool,
) -> Finding:
    start = f"{image.prefix}_space-{NAME}_desc-{detection.desc}"
    scores = None if detection.anomaly_map is None else load_ras(detection.anomaly_map).data
    mask = None if detection.mask is None else load_ras(detection.mask, bool).data
    labels = None if detection.components is None else load_ras(detection.components, np.int32).data
    finding = summarise(detection, scores=scores, mask=mask, brain=brain, lesion=lesion)
    if is_control:
        finding = replace(finding, n_lesions=None, n_lesions_found=None, n_false_components=None)
    viewer = ""
    if scan is not None and scores is not None:
        if with_viewer:
            path = figures / f"{start}_viewer.html"
            page = f"{figures.parent.name}.html"
            write_viewer(
                path,
                scan,
                brain,
                scores,
                title=f"{figures.parent.name}: {detection.title} on {image.name}",
                threshold=finding.threshold,
                mask=mask,
                components=labels,
                lesion=lesion,
                report=f"../../{page}",
            )
            viewer = f"./{figures.parent.name}/{figures.name}/{path.name}"
        draw_overlay(
            figures / f"{start}_anomalymap.svg",
            scan,
            brain,
            scores,
            title=f"{detection.title} on {image.name}",
            threshold=finding.threshold,
            threshold_name=finding.threshold_source,
            components=labels,
            lesion=lesion,
        )
    _write(figures / f"{start}_summary.html", "detection", tiles=summary_tiles(finding), viewer=viewer)
    if detection.histogram is not None:
        counts = ScoreCounts.read(detection.histogram)
        draw_histogram(
            figures / f"{start}_histogram.svg",
            counts.pooled if is_control else counts,
            threshold=finding.threshold,
            threshold_name=finding.threshold_source,
        )
    if detection.component_table is not None:
        table = pd.read_csv(detection.component_table, sep="\t", na_values="n/a")
        _write(
            figures / f"{start}_components.html",
            "components",
            rows=component_rows(table, labels, lesion),
            total=len(table),
            regions=any(name in table.columns for name in PARCELLATIONS),
            truth=labels is not None and lesion is not None,
            file=detection.component_table.name,
        )
    return finding


def _leakage_warnings(found: Sequence[tuple[Detection, Finding]]) -> list[str]:
    """Return a warning for each model in whose data the participant was."""
    cohorts = {
        detection.title: str(detection.metrics.get("seen_in_training", "no")) for detection, _ in found
    }
    return [
        f"This participant was in the {cohort} data of {name}: the scores are not an independent test."
        for name, cohort in cohorts.items()
        if cohort != "no"
    ]


def _summary(
    findings: Sequence[tuple[Image, Sequence[tuple[Detection, Finding]]]],
    reference: Reference,
    errors: Sequence[str],
    run_info: Mapping[str, Any],
    exclusions: Mapping[tuple[str, str], str],
    controls: Collection[str],
    remarks: Mapping[tuple[str, str], str],
) -> str:
    """Write the summary: status of the images, image quality, findings, and reference image."""
    rows, qualities = [], []
    for image, found in findings:
        key = (image.prefix, image.modality)
        sidecar = {} if image.preproc is None else read_sidecar(image.preproc)
        rows.append(
            {
                "truth": _describe_truth(image, image.prefix in controls),
                **_image_row(image, found, sidecar, exclusions.get(key), remarks.get(key)),
            }
        )
        quality = quality_row(sidecar.get("PreprocessingQuality", {}))
        qualities.append({"name": image.name, "values": quality})
    for entry in run_info.get("images", ()):
        if entry["status"] not in _GOOD_STATES:
            row = {"name": entry["image"], "status": entry["status"], "remark": entry["message"]}
            rows.append({"good": False, "source": "", "detectors": [], "truth": "", **row})
    found_rows = [
        {
            "anchor": anchor(image, detection),
            "detector": detection.title,
            "preset": detection.metrics.get("preset", ""),
            "scan": image.name,
            **summary_row(finding),
        }
        for image, found in findings
        for detection, finding in found
    ]
    any_truth = any(finding.agreement is not None for _, found in findings for _, finding in found)
    devices = {str(d.sidecar["Device"]) for _, found in findings for d, _ in found if "Device" in d.sidecar}
    facts = [
        (
            "Reference space",
            f"{NAME} grid (240 \N{MULTIPLICATION SIGN} 240 \N{MULTIPLICATION SIGN} 155 voxels of 1 mm)",
        ),
        ("Reference image", _describe_reference(reference)),
        ("Device", ", ".join(sorted(devices)) or run_info.get("device", "")),
        ("bids_uad version", run_info.get("version", "")),
    ]
    return _render(
        "summary",
        images=rows,
        findings=found_rows,
        any_truth=any_truth,
        qualities=qualities,
        quality_columns=list(QUALITY_COLUMNS.values()),
        n_errors=len(errors),
        facts=[(name, value) for name, value in facts if value],
    )


def _image_row(
    image: Image,
    found: Sequence[tuple[Detection, Finding]],
    sidecar: Mapping[str, Any],
    excluded: str | None,
    remark: str | None,
) -> dict[str, Any]:
    """Return the row of an image in the table of images; `excluded` is the reason of its exclusion."""
    sources = {
        str(detection.metrics["source_image"])
        for detection, _ in found
        if "source_image" in detection.metrics
    }
    quality = sidecar.get("PreprocessingQuality", {})
    warnings = [*quality.get("warnings", []), *_leakage_warnings(found), *([remark] if remark else [])]
    if excluded is not None and excluded != " ".join(quality.get("failures", [])):
        warnings.append(f"Excluded from the group level: {excluded}")
    row = {"status": "processed" if excluded is None else "excluded", "remark": " ".join(warnings)}
    if image.preproc is None:
        row = {"status": "incomplete", "remark": "the preprocessed image is missing"}
    return {
        "name": image.name,
        "good": image.preproc is not None and excluded is None,
        "source": ", ".join(sorted(sources or sidecar.get("Sources", [])[:1])),
        "detectors": [detection.title for detection, _ in found],
        **row,
    }


def _describe_truth(image: Image, is_control: bool) -> str:
    """Return the kind of ground truth of an image."""
    if is_control:
        return "healthy control" + ("" if image.lesion is None else "; its lesion mask is not used")
    if image.lesion is None:
        return "none"
    lesion = load_ras(image.lesion, bool).data
    if image.brain is not None:
        lesion = lesion & load_ras(image.brain, bool).data
    return "lesion mask" if lesion.any() else "lesion mask without a voxel in the brain"


def _describe_reference(reference: Reference) -> str:
    if not reference.images:
        return "no copy in the outputs"
    source = reference.sidecar.get("ReferenceSource")
    return f"{reference.name} ({source})" if source else reference.name


def _errors(root: Path, errors: Sequence[str], run_info: Mapping[str, Any]) -> str:
    """List the errors, and nipype's crash files of their runs (by default those of the last run)."""
    logs = sorted(path for path in (root / "log").glob("*") if path.is_dir())
    runs = {run_info.get("run_id")}
    runs |= {image.get("run_id") for image in run_info.get("images", ()) if image["message"]}
    own = [path for path in logs if path.name in runs] or logs[-1:]
    crashes = [path for folder in own for path in sorted(folder.glob("crash*.txt"))]
    texts = [
        (path.name, path.read_text(encoding="utf-8", errors="replace")[-_CRASH_CHARACTERS:])
        for path in crashes
    ]
    return _render("errors", errors=list(errors), crashes=texts)


def _methods(text: str) -> str:
    html = Markup(methods_html(text, bibliography())) if text else ""  # noqa: S704 - escaped by methods_html
    return _render("methods", methods=html)


def _about(images: Sequence[Image], reference: Reference, run_info: Mapping[str, Any]) -> str:
    rows = []
    for key, value in run_info.items():
        if key == "images":
            continue
        written = ", ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)
        rows.append((key.replace("_", " ").capitalize(), written))
    for image in images:
        for detection in image.detections:
            digest = detection.metrics.get("model_sha256")
            if digest:
                name = f"Model, {detection.title} on {image.modality}"
                rows.append((name, f"{detection.metrics.get('preset', '')}, sha256 {digest}"))
    for key, name in (("License", "Reference licence"), ("ReferenceSHA256", "Reference sha256")):
        if key in reference.sidecar:
            rows.append((name, str(reference.sidecar[key])))
    rows.append(("Report written with", ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)))
    return _render("about", rows=list(dict.fromkeys(rows)))


def _write(target: Path, name: str, **values: Any) -> None:
    target.write_text(_render(name, **values), encoding="utf-8")


def _render(name: str, **values: Any) -> str:
    text = (
        resources.files("bids_uad")
        .joinpath(f"data/reports/participant_{name}.html.j2")
        .read_text(encoding="utf-8")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(**values)
