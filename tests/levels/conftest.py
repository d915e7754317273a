"""Worker processes of the runs in these tests."""

from __future__ import annotations

import pytest

from bids_uad.levels.participant import executors


@pytest.fixture(scope="session", autouse=True)
def warmed_workers():
    """Compute once what is the same in every run: the location classes, and the schema of BIDS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "PRELOADED", (*executors.PRELOADED, "tests.levels.warmed"))
        yield
