"""Entry point of ``python -m bids_uad``."""

from __future__ import annotations

import sys

from bids_uad.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
