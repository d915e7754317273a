"""The data sink: from a node's working folder into the derivative dataset, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bids_uad.atomic import atomic_path
from bids_uad.dataset.naming import ENTITIES, PATTERNS

_EMPTY_ARCHIVE = Path(__file__).parents[1] / "data" / "templateflow"


def _import_sink() -> type:
    """Import niworkflows' sink without letting it index, or write, a TemplateFlow archive."""
    variable = "TEMPLATEFLOW_HOME"
    users = os.environ.get(variable)
    os.environ[variable] = str(_EMPTY_ARCHIVE)
    try:
        from niworkflows.interfaces.bids import DerivativesDataSink
    finally:
        if users is None:
            del os.environ[variable]
        else:
            os.environ[variable] = users
    return DerivativesDataSink


_NiworkflowsSink = _import_sink()


class DerivativesDataSink(_NiworkflowsSink):
    """niworkflows' data sink with bids_uad's names, no folder of its own, and atomic writing.

    SRI24 is kept out of the standard spaces: whether a machine's TemplateFlow archive happens to hold
    `tpl-SRI24` must not change the headers. Always pass `compress=True` for images: inside a workflow the
    inherited default is lost and the image would be written uncompressed.
    """

    out_path_base = ""
    _config_entities = frozenset(entity["name"] for entity in ENTITIES)
    _config_entities_dict = ENTITIES
    _standard_spaces = frozenset()
    _file_patterns = PATTERNS

    def _run_interface(self, runtime):
        target = Path(self.inputs.base_directory).absolute()
        staging = Path(runtime.cwd) / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        # The sink unlinks and then writes; it may do so in a folder that nobody reads.
        self.inputs.base_directory = str(staging)
        try:
            runtime = super()._run_interface(runtime)
        finally:
            self.inputs.base_directory = str(target)
        for field in ("out_file", "out_meta"):
            if field in self._results:
                self._results[field] = _publish(self._results[field], staging, target)
        shutil.rmtree(staging)
        return runtime


def sidecar_of(path: Path) -> Path:
    """Give the JSON file that belongs to an output."""
    return path.with_name(path.name.split(".", 1)[0] + ".json")


def _publish(staged: str | list[str], staging: Path, target: Path) -> str | list[str]:
    """Copy staged files to their places in the dataset; one stays one, a list a list."""
    if isinstance(staged, list):
        return [str(_publish(file, staging, target)) for file in staged]
    final = target / Path(staged).relative_to(staging)
    with atomic_path(final) as temporary:
        shutil.copyfile(staged, temporary)
    return str(final)
