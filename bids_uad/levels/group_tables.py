"""Selection of score tables that are listed by completion records and whose inputs have not changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from bids_uad.dataset.naming import entities_of
from bids_uad.dataset.participants import Participants
from bids_uad.errors import truncate_list
from bids_uad.evaluation.tables import subject_of
from bids_uad.levels.participant.completion_records import CompletionRecord, ModelRecord, read_records

UNLISTED = "not listed by a completion record, since their run did not finish, or others have replaced it"
REMOVED = "of images that are no longer in BIDS_DIR"
CHANGED = "of images that have changed since"
OTHER_COVARIATES = "of deviations for another age or sex than in participants.tsv"


def current_tables(
    output_dir: Path, paths: Sequence[Path], bids_dir: Path, participants: Participants
) -> tuple[list[Path], str]:
    """Leave out score tables that no record lists, or whose inputs have changed.

    Images are not read: an image has changed if its file has another size, and is removed if neither the file
    nor a link exists. If `bids_dir` contains no images at all, only copies of tables and sidecars, images are
    not checked.

    Parameters
    ----------
    output_dir : pathlib.Path
        Root of the derivatives.
    paths : sequence of pathlib.Path
        Metrics tables, grouped by participant.
    bids_dir : pathlib.Path
        Raw dataset.
    participants : Participants
        Present age and sex of the participants.

    Returns
    -------
    current : list of pathlib.Path
        Tables that are up to date.
    message : str
        Number of the others by reason, in one line; empty if there are none.
    """
    raw = bids_dir if any(bids_dir.glob("sub-*/**/anat/sub-*.nii*")) else None
    current, left_out = [], {}
    for subject, tables in groupby(paths, subject_of):
        reasons = dict(_reasons(output_dir, subject, raw, participants))
        for path in tables:
            reason = reasons.get(path.relative_to(output_dir).as_posix(), UNLISTED)
            if reason is None:
                current.append(path)
            else:
                left_out.setdefault(reason, []).append(path.name)
    return current, _message(left_out)


def _message(left_out: dict[str, list[str]]) -> str:
    if not left_out:
        return ""
    total = sum(map(len, left_out.values()))
    parts = [f"{len(names)} {reason} ({truncate_list(names, 3)})" for reason, names in left_out.items()]
    return (
        f"{total} score table{'s are' if total > 1 else ' is'} left out: {'; '.join(parts)}. Run the "
        "participant level again, or remove the outputs of removed images."
    )


def _reasons(
    output_dir: Path, subject: str, raw: Path | None, participants: Participants
) -> Iterator[tuple[str, str | None]]:
    """Yield the outputs in a participant's records: name, and the reason why it is outdated, or None."""
    for record in read_records(output_dir, subject):
        outdated = None if raw is None else _image_outdated(record, raw)
        for model in record.models.values():
            reason = outdated or _model_outdated(record, model, participants)
            yield from ((name, reason) for name in model.outputs)


def _image_outdated(record: CompletionRecord, raw: Path) -> str | None:
    source = raw / record.source
    if not os.path.lexists(source):
        return REMOVED
    # The content of a link (git-annex) may not be present.
    if source.exists() and source.stat().st_size != record.fingerprint.get("input_bytes"):
        return CHANGED
    return None


def _model_outdated(record: CompletionRecord, model: ModelRecord, participants: Participants) -> str | None:
    if not model.covariates:
        return None
    entities = entities_of(Path(record.key))
    current = participants.person(f"sub-{entities['sub']}", entities.get("ses")).covariates
    changed = any(current[name] not in (None, value) for name, value in model.covariates.items())
    return OTHER_COVARIATES if changed else None
