"""Participant report: a page with figures and numbers of all derivatives of a participant."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

from bids_uad.dataset.naming import longitudinal_output
from bids_uad.dataset.participants import Participants
from bids_uad.evaluation.longitudinal import CHANGE_LIMITS, CHANGES
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
from bids_uad.reports.longitudinal import (
    Residuals,
    Series,
    compare_series,
    draw_comparison,
    find_series,
    lesion_rows,
    missing_sessions,
    order_sessions,
    summary_rows,
    write_comparisons,
)
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
ImageFindings = tuple[Image, list[tuple[Detection, Finding]]]
"""Image with the numbers of its detections."""
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

    Missing derivatives are skipped. The files are the same in each run. Lesions of several sessions are
    matched, and a table of them is written for each detector.

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
        Path of ``sub-<subject>.html``; its figures and viewers are in ``sub-<subject>/figures``. With several
        sessions, each has a page ``sub-<subject>_ses-<session>.html``, and that of the participant compares
        them.
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
    remarks = dict(remarks or {})
    order = order_sessions(
        participants, subject, {image.entities["session"] for image in images if "session" in image.entities}
    )
    # Without several sessions, all images are on the page of the participant.
    pages = {session: f"sub-{subject}_ses-{session}.html" for session, _ in order if len(order) > 1}
    whole = f"sub-{subject}.html"
    final = out_dir / f"sub-{subject}" / "figures"
    # nireports reads entities from whole paths: a temporary folder excludes those of the output folder.
    with tempfile.TemporaryDirectory(prefix="bids_uad-") as temporary:
        figures = Path(temporary) / f"sub-{subject}" / "figures"
        figures.mkdir(parents=True)
        findings = [
            (
                image,
                _write_image(
                    figures,
                    image,
                    reference,
                    page=pages.get(image.entities.get("session"), whole),
                    is_control=image.prefix in controls,
                    with_viewer=viewer,
                ),
            )
            for image in images
        ]
        series = _compare_sessions(
            out_dir, subject, images, order, exclusions | remarks, run_info.get("images", ()), figures
        )

        def text_of(name: str, own: Sequence[ImageFindings], session: str | None = None) -> str:
            """Return the page of one session, or of the participant."""
            is_own = partial(_concerns_session, session=session)
            info = {**run_info, "images": [row for row in run_info.get("images", ()) if is_own(row["image"])]}
            shown = [error for error in errors if is_own(error)]
            links = {} if session else pages
            parts = {
                "summary": _summary(own, reference, shown, info, exclusions, controls, remarks, links),
                "errors": _errors(out_dir / f"sub-{subject}", shown, info),
                "methods": _methods(methods),
                "about": _about([image for image, _ in own], reference, info),
            }
            for part, text in parts.items():
                (figures / f"sub-{subject}_desc-{part}_report.html").write_text(text, encoding="utf-8")
            figured = [image for image, _ in own if image.entities.get("session") not in links]
            return _assemble(name, figured, () if session else series, Path(temporary))

        texts = {
            page: text_of(
                f"sub-{subject}, session {session}",
                [each for each in findings if each[0].entities.get("session") == session],
                session,
            )
            for session, page in pages.items()
        }
        texts[whole] = text_of(f"sub-{subject}", findings)
        drawn = {path.name for path in _drawn_files(figures)}
        for name in drawn:
            with atomic_path(final / name) as unfinished:
                shutil.copyfile(figures / name, unfinished)
        # The page of the participant is written last, so that its figures and the other pages exist.
        for page, text in texts.items():
            write_text(out_dir / page, text)
    stale = [path for path in _drawn_files(final) if path.name not in drawn]
    stale += [path for path in out_dir.glob(f"sub-{subject}_ses-*.html") if path.name not in texts]
    for path in stale:
        path.unlink()
    return out_dir / whole


def _concerns_session(text: str, *, session: str | None) -> bool:
    """Return whether a message or image name concerns a session, or the participant as a whole (None)."""
    return session is None or re.search(rf"ses-{re.escape(session)}(?![a-zA-Z0-9])", text) is not None


def _compare_sessions(
    out_dir: Path,
    subject: str,
    images: Sequence[Image],
    order: Sequence[tuple[str, float | None]],
    unusable: Mapping[tuple[str, str], str],
    run_images: Sequence[Mapping[str, str]],
    figures: Path,
) -> list[Series]:
    """Compare the sessions of a participant: write tables and figures, and return what was compared."""
    names = [session for session, _ in order]
    residuals = Residuals()
    comparisons = [compare_series(series, residuals) for series in find_series(images, names, unusable)]
    write_comparisons(out_dir, subject, comparisons)
    for comparison in comparisons:
        series = comparison.series
        draw_comparison(figures, comparison, dict(order))
        rows, total = lesion_rows(comparison)
        _write(
            figures / f"{series.prefix}_space-{NAME}_desc-{series.desc}_change.html",
            "change",
            changes=CHANGES,
            pairs=summary_rows(comparison),
            missing=missing_sessions(series, names, run_images),
            limit=CHANGE_LIMITS[series.modality],
            rows=rows,
            total=total,
            file=longitudinal_output({"subject": subject, **series.entities}, series.desc).as_posix(),
        )
    return [comparison.series for comparison in comparisons]


def _drawn_files(folder: Path) -> list[Path]:
    """List the figures and viewers in a folder."""
    return [path for pattern in ("*.svg", "*_viewer.html") for path in folder.glob(pattern)]


def _assemble(name: str, images: Sequence[Image], series: Sequence[Series], staging: Path) -> str:
    """Assemble the staged parts into one page with nireports; figures are part of the page."""
    template = resources.files("bids_uad").joinpath("data/reports/participant.html.j2")
    with resources.as_file(template) as template_path:
        spec, page = staging / "spec.yml", staging / "page.html"
        outline = expand_outline(name, images, series, str(template_path.resolve()))
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
    figures: Path, image: Image, reference: Reference, *, page: str, is_control: bool, with_viewer: bool
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
                page=page,
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
    page: str,
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
            components=labels,
            lesion=lesion,
        )
    _write(
        figures / f"{start}_summary.html",
        "detection",
        tiles=summary_tiles(finding),
        viewer=viewer,
        excess=finding.excess,
    )
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
    pages: Mapping[str, str],
) -> str:
    """Write the summary: status of the images, image quality, findings, and reference image.

    `pages` are the pages of the sessions, to which the summary of the participant links.
    """
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
            "link": f"{pages.get(image.entities.get('session'), '')}#{anchor(image, detection)}",
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
        pages=list(pages.items()),
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
    warnings += [finding.excess for _, finding in found if finding.excess]
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
