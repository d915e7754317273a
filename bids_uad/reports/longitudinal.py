"""Comparison of the sessions of a participant: table of lesions, figures, and section of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_uad.dataset.naming import entities_of, longitudinal_output, natural_key
from bids_uad.dataset.participants import Participants
from bids_uad.dataset.sidecars import LONGITUDINAL_COLUMNS, longitudinal_sidecar
from bids_uad.evaluation.longitudinal import (
    CHANGE_LIMITS,
    CHANGES,
    GONE,
    MAX_RESIDUAL_MM,
    UNCHANGED,
    Match,
    match_components,
    number_lesions,
    residual_misalignment,
)
from bids_uad.files import write_json, write_tsv
from bids_uad.preprocessing.registration import Volume
from bids_uad.reports.derivatives import Detection, Image
from bids_uad.reports.figures.display import bounding_box, load_ras
from bids_uad.reports.figures.sessions import SessionView, draw_sessions, draw_volumes
from bids_uad.space import NAME

MAX_ROWS = 30
"""Rows of the table of changed lesions in the report."""
MAX_SESSIONS = 6
"""Number of sessions, the last ones, in the figure of slices."""


@dataclass(frozen=True)
class SessionScan:
    """Image of one session with the outputs of one detector.

    Parameters
    ----------
    session : str
        Label without `ses-`.
    image : Image
        Derivatives of the image.
    detection : Detection
        Outputs of the detector, with components and their table.
    unusable : str, default=""
        Why the image cannot be compared, in words.
    """

    session: str
    image: Image
    detection: Detection
    unusable: str = ""

    def labels(self) -> np.ndarray:
        """Read the label image of the components, in RAS+ voxel order."""
        return load_ras(self.detection.components, np.int32).data

    @cached_property
    def components(self) -> pd.DataFrame:
        """Table of the components, by index."""
        return pd.read_csv(self.detection.component_table, sep="\t", na_values="n/a").set_index("index")

    @property
    def model(self) -> tuple[Any, ...]:
        """Model and decision rule, which must be equal in all sessions."""
        rule = self.detection.rule
        return self.detection.metrics.get("model_sha256"), self.detection.threshold, *rule.values()


@dataclass(frozen=True)
class Series:
    """Images of consecutive sessions with equal entities and modality, scored by one detector.

    Parameters
    ----------
    prefix : str
        Entities of the images without session, such as `sub-01_acq-mprage`.
    scans : tuple of SessionScan
        One per session, in the order of the sessions; at least two.
    """

    prefix: str
    scans: tuple[SessionScan, ...]

    @property
    def modality(self) -> str:
        """Modality of the images."""
        return self.scans[0].image.modality

    @property
    def desc(self) -> str:
        """Modality and detector, such as `T1wPls`."""
        return self.scans[0].detection.desc

    @property
    def entities(self) -> dict[str, str]:
        """Entities of the images except subject and session, by pybids name."""
        return {key: value for key, value in self.scans[0].image.entities.items() if key != "session"}

    @property
    def title(self) -> str:
        """Name printed in the report, such as ``PLS on T1w``."""
        entities = [f"{key} {value}" for key, value in self.entities.items()]
        return ", ".join([f"{self.scans[0].detection.title} on {self.modality}", *entities])


@dataclass(frozen=True)
class SessionPair:
    """Two consecutive sessions of a series.

    Parameters
    ----------
    before, after : str
        Labels of the sessions.
    residual : float or None
        Residual misalignment in mm; None if it was not measured.
    not_matched : str
        Why the sessions were not matched; empty if they were.
    matches : list of Match
        Lesions. Without matching, each component is a lesion of one session.
    """

    before: str
    after: str
    residual: float | None
    not_matched: str
    matches: list[Match]


@dataclass(frozen=True)
class Comparison:
    """Lesions of a series of sessions.

    Parameters
    ----------
    series : Series
        Images that are compared.
    pairs : tuple of SessionPair
        Pairs of consecutive sessions.
    lesions : dict of (int, int) to int
        Number of the lesion by session (position in the series) and label of a component.
    """

    series: Series
    pairs: tuple[SessionPair, ...]
    lesions: dict[tuple[int, int], int] = field(default_factory=dict)

    def change_of(self, match: Match) -> str:
        """Return the change of a lesion beyond the limit of its modality."""
        return match.change(self.limit_of(match))

    def limit_of(self, match: Match) -> float:
        """Return the limit of change of a lesion in mm3."""
        return CHANGE_LIMITS[self.series.modality].at(match.volume_before, match.volume_after)

    def volumes(self) -> pd.DataFrame:
        """Return the volumes in mm3 of each lesion (row) in each session (column)."""
        volumes = pd.DataFrame(
            0.0, index=sorted(set(self.lesions.values())), columns=range(len(self.series.scans))
        )
        for (session, label), lesion in self.lesions.items():
            volumes.loc[lesion, session] += self.series.scans[session].components.loc[label, "volume_mm3"]
        return volumes

    def table(self) -> pd.DataFrame:
        """Return the lesions of each pair of sessions, with the columns of `LONGITUDINAL_COLUMNS`."""
        rows = []
        for position, pair in enumerate(self.pairs):
            common = {
                "modality": self.series.modality,
                "detector": self.series.scans[0].detection.metrics.get(
                    "detector", self.series.scans[0].detection.detector.lower()
                ),
                "session_before": pair.before,
                "session_after": pair.after,
                "residual_mm": None if pair.residual is None else round(pair.residual, 2),
                "not_matched": pair.not_matched or None,
            }
            if pair.not_matched:
                rows.append(common)
            else:
                rows += [common | self._row(position, match) for match in pair.matches]
        table = pd.DataFrame(rows, columns=list(LONGITUDINAL_COLUMNS))
        return table.astype({"lesion": "Int64"})

    def _row(self, position: int, match: Match) -> dict[str, Any]:
        """Return the columns of one lesion of the pair of sessions that starts at a position."""
        later = bool(match.after)
        labels, session = (match.after, position + 1) if later else (match.before, position)
        own = self.series.scans[session].components.loc[list(labels)]
        largest = own["volume_mm3"].idxmax()
        return {
            "lesion": self.lesions[session, labels[0]],
            "change": self.change_of(match),
            "volume_before_mm3": match.volume_before,
            "volume_after_mm3": match.volume_after,
            "volume_change_mm3": match.volume_after - match.volume_before,
            "change_limit_mm3": round(self.limit_of(match), 1),
            "overlap_mm3": match.overlap,
            "components_before": ",".join(map(str, match.before)) or None,
            "components_after": ",".join(map(str, match.after)) or None,
            **{
                f"centroid_{axis}": round(
                    float(np.average(own[f"centroid_{axis}"], weights=own["volume_mm3"])), 2
                )
                for axis in "xyz"
            },
            "region": own.loc[largest, "region"] if "region" in own else None,
        }


def order_sessions(
    participants: Participants, subject: str, sessions: Iterable[str]
) -> list[tuple[str, float | None]]:
    """Order sessions by time if `sessions.tsv` has `acq_time` for all, else by label.

    Parameters
    ----------
    participants : Participants
        Contents of `sessions.tsv`.
    subject : str
        Label without `sub-`.
    sessions : iterable of str
        Labels without `ses-`.

    Returns
    -------
    list of (str, float or None)
        Sessions, and days since the first; None if the times are not known. Numbers in labels are compared
        as numbers.
    """
    times = {}
    for session in sessions:
        try:
            text = str(participants.row(f"sub-{subject}", session).get("acq_time"))
            times[session] = datetime.fromisoformat(text).replace(tzinfo=None)
        except ValueError:
            times[session] = None
    if times and None not in times.values():
        first = min(times.values())
        order = sorted(times, key=lambda session: (times[session], session))
        return [(session, (times[session] - first).total_seconds() / 86400) for session in order]
    return [(session, None) for session in sorted(times, key=natural_key)]


def find_series(
    images: Sequence[Image], order: Sequence[str], unusable: Mapping[tuple[str, str], str]
) -> list[Series]:
    """Find the images and detectors with components in at least two sessions.

    Parameters
    ----------
    images : sequence of Image
        Images of one participant.
    order : sequence of str
        Labels of the sessions in their order.
    unusable : mapping of (str, str) to str
        Why an image cannot be compared, by prefix and modality.

    Returns
    -------
    list of Series
        Sorted by prefix, modality and detector.
    """
    found: dict[tuple[str, str, str], dict[str, SessionScan]] = {}
    for image in images:
        session = image.entities.get("session")
        if session is None:
            continue
        prefix = image.prefix.replace(f"_ses-{session}", "", 1)
        for detection in image.detections:
            if detection.components is not None and detection.component_table is not None:
                reason = unusable.get((image.prefix, image.modality), "")
                scan = SessionScan(session, image, detection, reason)
                found.setdefault((prefix, image.modality, detection.detector), {})[session] = scan
    return [
        Series(prefix, tuple(scans[session] for session in order if session in scans))
        for (prefix, _, _), scans in sorted(found.items())
        if len(scans) > 1
    ]


class Residuals:
    """Residual misalignments of pairs of images, each measured once for all detectors."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, Path], float | None] = {}

    def of(self, before: Image, after: Image) -> float | None:
        """Return the residual misalignment in mm; None without both images or their masks."""
        if None in (before.preproc, before.brain, after.preproc, after.brain):
            return None
        key = (before.preproc, after.preproc)
        if key not in self._known:
            volumes = []
            for image in (before, after):
                scan = load_ras(image.preproc)
                volumes.append(Volume(scan.data, scan.affine, load_ras(image.brain, bool).data))
            empty = not all(volume.mask.any() for volume in volumes)
            self._known[key] = None if empty else residual_misalignment(*volumes)
        return self._known[key]


def compare_series(series: Series, residuals: Residuals) -> Comparison:
    """Match the lesions of consecutive sessions.

    Parameters
    ----------
    series : Series
        Images of at least two sessions.
    residuals : Residuals
        Misalignments that are known.

    Returns
    -------
    Comparison
        Pairs of sessions; those that cannot be compared have a reason instead of matched lesions.
    """
    pairs = []
    labels = series.scans[0].labels()
    for before, after in zip(series.scans, series.scans[1:], strict=False):
        previous, labels = labels, after.labels()
        residual = residuals.of(before.image, after.image)
        reason = _not_comparable(before, after, residual)
        if reason:
            nothing = np.zeros_like(labels)
            matches = match_components(previous, nothing) + match_components(nothing, labels)
        else:
            matches = match_components(previous, labels)
        pairs.append(SessionPair(before.session, after.session, residual, reason, matches))
    return Comparison(series, tuple(pairs), number_lesions([pair.matches for pair in pairs]))


def _not_comparable(before: SessionScan, after: SessionScan, residual: float | None) -> str:
    """Return why two sessions cannot be compared; empty if they can."""
    for scan in (before, after):
        if scan.unusable:
            return f"session {scan.session}: {scan.unusable}"
    if before.model != after.model:
        return "models or thresholds differ; process both sessions with the same --models and --deviation"
    if residual is None:
        return "residual misalignment unknown, since a preprocessed image or brain mask is missing"
    if residual > MAX_RESIDUAL_MM:
        return (
            f"residual misalignment of {residual:.1f} mm, above {MAX_RESIDUAL_MM:g} mm; check the "
            "registration of both sessions to SRI24"
        )
    return ""


def write_comparisons(out_dir: Path, subject: str, comparisons: Sequence[Comparison]) -> None:
    """Write the tables of lesions in several sessions, and remove those that are no longer valid.

    Parameters
    ----------
    out_dir : pathlib.Path
        Root of the derivative dataset.
    subject : str
        Label without `sub-`.
    comparisons : sequence of Comparison
        Comparisons of the participant.
    """
    written = set()
    for comparison in comparisons:
        series = comparison.series
        path = out_dir / longitudinal_output({"subject": subject, **series.entities}, series.desc)
        limit = CHANGE_LIMITS[series.modality]
        sidecar = longitudinal_sidecar(
            [scan.detection.components.relative_to(out_dir) for scan in series.scans],
            [scan.session for scan in series.scans],
            MAX_RESIDUAL_MM,
            {
                "ChangeLimitVolume": limit.volume,
                "ChangeLimitFraction": limit.fraction,
                "ChangeLimitSingle": limit.single,
            },
        )
        write_json(path.with_suffix(".json"), sidecar)
        write_tsv(path, comparison.table())
        written |= {path, path.with_suffix(".json")}
    for path in (out_dir / f"sub-{subject}" / "anat").glob("*_desc-longitudinal_lesions.*"):
        if path not in written:
            path.unlink()


def draw_comparison(folder: Path, comparison: Comparison, days: Mapping[str, float | None]) -> None:
    """Draw the volumes over time, and slices of the sessions side by side.

    Parameters
    ----------
    folder : pathlib.Path
        Folder of the figures.
    comparison : Comparison
        Lesions of a series.
    days : mapping of str to (float or None)
        Days since the first session, by session.
    """
    series = comparison.series
    start = f"{series.prefix}_space-{NAME}_desc-{series.desc}"
    names = [scan.session for scan in series.scans]
    draw_volumes(folder / f"{start}_volumes.svg", names, [days[name] for name in names], comparison.volumes())
    shown = [
        (position, scan)
        for position, scan in enumerate(series.scans)
        if scan.image.preproc is not None and scan.image.brain is not None
    ][-MAX_SESSIONS:]
    brain = np.logical_or.reduce([load_ras(scan.image.brain, bool).data for _, scan in shown])
    if brain.any():
        box = bounding_box(brain)
        views = [
            SessionView(
                f"Session {scan.session}",
                load_ras(scan.image.preproc).crop(box),
                {name: mask[box] for name, mask in _masks_by_change(comparison, position).items()},
            )
            for position, scan in shown
        ]
        draw_sessions(folder / f"{start}_sessions.svg", views, brain[box], title=series.title)


def _masks_by_change(comparison: Comparison, position: int) -> dict[str, np.ndarray]:
    """Return the lesions of a session by change since the session before; see :class:`SessionView`."""
    labels = comparison.series.scans[position].labels()
    if position == 0:
        return {"first": labels > 0}
    pair = comparison.pairs[position - 1]
    if pair.not_matched:
        return {"not matched": labels > 0}
    groups: dict[str, list[int]] = {change: [] for change in CHANGES}
    for match in pair.matches:
        change = comparison.change_of(match)
        groups[change] += match.before if change == GONE else match.after
    masks = {change: np.isin(labels, group) for change, group in groups.items() if change != GONE}
    if groups[GONE]:
        masks[GONE] = np.isin(comparison.series.scans[position - 1].labels(), groups[GONE])
    return masks


def summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of the table of session pairs in the report."""
    totals = comparison.volumes().sum()
    rows = []
    for position, pair in enumerate(comparison.pairs):
        changes = [comparison.change_of(match) for match in pair.matches]
        rows.append(
            {
                "sessions": f"{pair.before} \N{RIGHTWARDS ARROW} {pair.after}",
                "residual": "\N{EN DASH}" if pair.residual is None else f"{pair.residual:.1f}",
                "not_matched": pair.not_matched,
                "before": f"{totals[position] / 1000:,.2f}",
                "after": f"{totals[position + 1] / 1000:,.2f}",
                "counts": [changes.count(change) for change in CHANGES],
            }
        )
    return rows


def lesion_rows(comparison: Comparison) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of the table of changed lesions in the report, largest change first, and their number.

    Parameters
    ----------
    comparison : Comparison
        Lesions of a series.

    Returns
    -------
    rows : list of dict
        At most `MAX_ROWS` rows.
    number : int
        Number of changed lesions.
    """
    table = comparison.table()
    table = table[table["change"].notna() & (table["change"] != UNCHANGED)]
    largest = table["volume_change_mm3"].astype(float).abs().sort_values(ascending=False, kind="stable").index
    rows = [
        {
            "sessions": f"{row.session_before} \N{RIGHTWARDS ARROW} {row.session_after}",
            "lesion": int(row.lesion),
            "change": row.change,
            "before": f"{row.volume_before_mm3:,.0f}",
            "after": f"{row.volume_after_mm3:,.0f}",
            "difference": f"{row.volume_change_mm3:+,.0f}".replace("-", "\N{MINUS SIGN}"),
            "limit": f"{row.change_limit_mm3:,.0f}",
            "centroid": ", ".join(
                f"{value:.0f}".replace("-", "\N{MINUS SIGN}")
                for value in (row.centroid_x, row.centroid_y, row.centroid_z)
            ),
            "region": row.region if pd.notna(row.region) else "\N{EN DASH}",
        }
        for row in table.loc[largest].head(MAX_ROWS).itertuples()
    ]
    return rows, len(table)


def missing_sessions(
    series: Series, order: Sequence[str], run_images: Iterable[Mapping[str, str]]
) -> list[tuple[str, str]]:
    """List the sessions of the participant that a series lacks, with the reason if it is known.

    Parameters
    ----------
    series : Series
        Images that are compared.
    order : sequence of str
        All sessions of the participant with outputs.
    run_images : iterable of mapping
        Status of the images in the last runs: `image` (name) and `message`.

    Returns
    -------
    list of (str, str)
        Session, and error message of its image (empty without one).
    """
    present = {scan.session for scan in series.scans}
    failed = {}
    for entry in run_images:
        session = entities_of(Path(entry["image"])).get("ses")
        name = entry["image"].replace(f"_ses-{session}", "", 1)
        if session is not None and name == f"{series.prefix}_{series.modality}":
            failed[session] = entry.get("message", "")
    known = dict.fromkeys([*order, *sorted(failed, key=natural_key)])
    return [(session, failed.get(session, "")) for session in known if session not in present]
