"""What preprocessing measured: into the sidecar of the image, and into a table of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from nipype.interfaces.base import BaseInterfaceInputSpec, File, SimpleInterface, TraitedSpec, traits

from bids_uad.atomic import write_json, write_tsv
from bids_uad.dataset.outputs import sidecar_of
from bids_uad.dataset.sidecars import QUALITY_COLUMNS
from bids_uad.errors import InputError
from bids_uad.evaluation.tables import read_row

_VERDICT = ("exclude", "exclude_reasons", "exclude_dependents")


class _AddQualityInputSpec(BaseInterfaceInputSpec):
    metadata = traits.Dict(mandatory=True, desc="metadata of the preprocessed image")
    quality = traits.Dict(mandatory=True, desc="what preprocessing measured")


class _AddQualityOutputSpec(TraitedSpec):
    metadata = traits.Dict(desc="both")


class AddQuality(SimpleInterface):
    """Put what preprocessing measured into the sidecar of the preprocessed image."""

    input_spec = _AddQualityInputSpec
    output_spec = _AddQualityOutputSpec

    def _run_interface(self, runtime):
        self._results["metadata"] = {
            **self.inputs.metadata,
            "PreprocessingQuality": dict(self.inputs.quality),
        }
        return runtime


class _WriteQualityInputSpec(BaseInterfaceInputSpec):
    quality = traits.Dict(mandatory=True, desc="what preprocessing measured")
    facts = traits.Dict(mandatory=True, desc="columns that say which image it is")
    sidecar = traits.Dict(mandatory=True, desc="metadata of the table")
    target = traits.Str(mandatory=True, desc="where the table goes")


class _WriteQualityOutputSpec(TraitedSpec):
    out_file = File(exists=True, desc="the table")


class WriteQuality(SimpleInterface):
    """Write the table of an image's quality.

    Runs every time, since it writes into the dataset: what is there may have been removed. Where a table is
    there, its verdict is kept, which may have been changed by hand. Tables of other inputs are removed before
    the workflow runs.
    """

    input_spec = _WriteQualityInputSpec
    output_spec = _WriteQualityOutputSpec
    _always_run = True

    def _run_interface(self, runtime):
        target = Path(self.inputs.target)
        write_json(sidecar_of(target), self.inputs.sidecar)
        table = quality_table(self.inputs.quality, self.inputs.facts)
        for column, value in _verdict(target).items():
            table[column] = value
        write_tsv(target, table)
        self._results["out_file"] = str(target)
        return runtime


def _verdict(path: Path) -> dict[str, str]:
    """Read the verdict from a quality table; empty if there is no table, or none that can be read."""
    try:
        row = read_row(path, _VERDICT)
    except InputError:
        return {}
    return row if row["exclude"].strip().lower() in ("yes", "no") else {}


def quality_table(quality: dict[str, Any], facts: dict[str, str]) -> pd.DataFrame:
    """Make the one row of an image.

    Parameters
    ----------
    quality : dict
        Of :func:`bids_uad.preprocessing.quality.assess`.
    facts : dict
        ``source_image``, ``modality`` and ``depends_on``.

    Returns
    -------
    pandas.DataFrame
        Columns of ``QUALITY_COLUMNS``.
    """
    failures = quality.get("failures", [])
    verdict = "yes" if failures else "no"
    # Every failure that is found automatically is one of geometry: brain mask, registration or orientation.
    judged = {
        "exclude": verdict,
        "exclude_reasons": " ".join(failures) or None,
        "exclude_dependents": verdict,
    }
    row = {**quality, **facts, **judged}
    return pd.DataFrame([{name: row.get(name) for name in QUALITY_COLUMNS}])
