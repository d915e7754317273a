"""The program with stand-ins for preprocessing and detection: `python -m tests.levels.with_fakes ARGUMENTS`.

REFERENCE names the folder of :func:`tests.levels.fakes.fake_reference`. Reports are stand-ins, too, unless
REPORTS is `real`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bids_uad.cli.main import main
from bids_uad.levels.participant import run, summary, workflow
from bids_uad.levels.participant import workflow as writing
from tests.levels.fakes import FakeDetect, fake_reference, init_fake_preproc_wf, write_page

if __name__ == "__main__":
    workflow.init_preproc_wf = init_fake_preproc_wf
    writing.Detect = FakeDetect
    run.resolve_reference = lambda atlas, cache: fake_reference(Path(os.environ["REFERENCE"]))
    if os.environ.get("REPORTS") != "real":
        summary.write_report = write_page
    sys.exit(main())
