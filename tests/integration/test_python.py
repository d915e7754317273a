"""`detect` on a simulated scan: the commands of docs/python.md, with their output."""

from __future__ import annotations

import dataclasses
import doctest
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from bids_uad.levels.scans import Result

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_page_runs_as_shown_and_leaves_nothing_else(data, tmp_path, monkeypatch, capfd):
    shutil.copy(data / "sub-002" / "anat" / "sub-002_T2w.nii.gz", tmp_path / "patient_T2w.nii.gz")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    examples = doctest.DocTestParser().get_doctest(blocks, {}, PAGE.name, str(PAGE), 0)
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(examples, out=failures.append).failed == 0, "".join(failures)
    assert len(examples.examples) > 15
    assert capfd.readouterr().out == ""
    assert list((tmp_path / "temporary").iterdir()) == []
    written = {path.name for path in (tmp_path / "OUT").iterdir()}
    ends = (".html", "_anomalymap.nii.gz", "_anomalymask.nii.gz", "_components.tsv")
    assert written == {"bids", *(f"patient_T2w{end}" for end in ends)}
    report = (tmp_path / "OUT" / "patient_T2w.html").read_text()
    links = re.findall(r'="\./([^"]+)"', report)
    assert len(links) > 3
    assert [link for link in links if not (tmp_path / "OUT" / link).is_file()] == []


def test_page_describes_every_attribute():
    text = PAGE.read_text()
    assert [item.name for item in dataclasses.fields(Result) if f"`{item.name}" not in text] == []
