"""Which images of a participant are looked at: default rules and the user's filter file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bids.layout import Query

from bids_uad.errors import ConfigError

EXTENSIONS = [".nii.gz", ".nii"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "T1w": {"datatype": "anat", "suffix": "T1w", "extension": EXTENSIONS, "ceagent": None},
    "T2w": {"datatype": "anat", "suffix": "T2w", "extension": EXTENSIONS, "ceagent": None},
}


def default_queries() -> dict[str, dict[str, Any]]:
    """Give the query of each modality.

    Contrast-enhanced (`ce-`) images are left out: the models have learnt plain T1w and T2w images, and a
    vessel that shines with gadolinium is no anomaly.
    """
    return {modality: translate(query) for modality, query in _DEFAULTS.items()}


def read_queries(path: Path | None) -> dict[str, dict[str, Any]]:
    """Merge a filter file into the default queries.

    Parameters
    ----------
    path : pathlib.Path, optional
        JSON: `t1w` and `t2w` (any case) map to entity filters. Null means that the entity must be
        absent, `"*"` that it must be there with any value. Other keys belong to other apps and are
        ignored.

    Returns
    -------
    dict of str to dict
        pybids query by modality.

    Raises
    ------
    ConfigError
        If the file is not JSON of that form.
    """
    if path is None:
        return default_queries()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--bids-filter-file {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--bids-filter-file {path} must hold an object with the keys 't1w' and 't2w'")
    by_name = {name.lower(): filters for name, filters in content.items()}
    queries = {}
    for modality, default in _DEFAULTS.items():
        own = by_name.get(modality.lower(), {})
        if not isinstance(own, dict):
            raise ConfigError(f"--bids-filter-file {path}: '{modality.lower()}' must be an object")
        query = translate({**default, **own})
        if query.get("suffix") != modality:
            raise ConfigError(
                f"--bids-filter-file {path}: '{modality.lower()}' must keep the suffix {modality}"
            )
        queries[modality] = query
    return queries


def translate(filters: dict[str, Any]) -> dict[str, Any]:
    """Turn null and `"*"` into pybids' query marks."""
    marks = {None: Query.NONE, "*": Query.ANY}
    return {
        name: marks.get(value, value) if value is None or isinstance(value, str) else value
        for name, value in filters.items()
    }
