"""Which images of a participant are looked at: default rules and the user's filter file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bids.layout import Query
from bids.utils import listify

from bids_uad.errors import ConfigError

EXTENSIONS = [".nii.gz", ".nii"]

SUFFIXES = {"T1w": ["T1w", "UNIT1"], "T2w": ["T2w"]}
"""Suffixes of the images of each modality; UNIT1 is the T1-weighted image of MP2RAGE."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    modality: {
        "datatype": "anat",
        "suffix": suffixes,
        "extension": EXTENSIONS,
        "ceagent": None,
        "part": [None, "mag"],
        "chunk": None,
        "inv": None,
    }
    for modality, suffixes in SUFFIXES.items()
}


def default_queries() -> dict[str, dict[str, Any]]:
    """Give the query of each modality.

    Contrast-enhanced (`ce-`) images are left out: the models have learnt plain T1w and T2w images, and a
    vessel that shines with gadolinium is no anomaly. So are phase, real and imaginary images (`part-`),
    parts of a scan (`chunk-`) and single inversions of MP2RAGE (`inv-`).
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
        suffixes = listify(query.get("suffix"))
        if not suffixes or any(suffix not in SUFFIXES[modality] for suffix in suffixes):
            raise ConfigError(
                f"--bids-filter-file {path}: '{modality.lower()}' must keep the suffix "
                f"{' or '.join(SUFFIXES[modality])}"
            )
        queries[modality] = query
    return queries


def translate(filters: dict[str, Any]) -> dict[str, Any]:
    """Turn null and `"*"`, alone or in a list, into pybids' query marks."""
    marks = {None: Query.NONE, "*": Query.ANY}

    def translated(value: Any) -> Any:
        if isinstance(value, list):
            return [translated(item) for item in value]
        return marks.get(value, value) if value is None or isinstance(value, str) else value

    return {name: translated(value) for name, value in filters.items()}
