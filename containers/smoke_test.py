"""Check in seconds that an installation is complete: when the image is built, and by `apptainer test`."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import bids_uad
from bids_uad.config import MODALITIES
from bids_uad.engine.bundle import resolve_bundles
from bids_uad.preprocessing.reference import resolve_reference
from bids_uad.reports.boilerplate import assets


def main() -> None:
    """Fail if a file is missing or not readable by all users, or if versions differ."""
    program = Path(sys.executable).with_name("bids_uad")
    printed = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()
    tag = os.environ["BIDS_UAD_CONTAINER_TAG"]
    assert printed == ["bids_uad", bids_uad.__version__], printed
    subprocess.run(["/bin/sh", "-l", "-c", "bids_uad --version"], stdout=subprocess.DEVNULL, check=True)
    assert tag in ("bids_uad", *(f"bids_uad:{bids_uad.__version__}{kind}" for kind in ("", "-cuda"))), tag
    assert "site-packages" in bids_uad.__file__
    assert importlib.metadata.version("bids_uad") == bids_uad.__version__

    bundles = resolve_bundles(["all"], MODALITIES, skip_missing=True)
    assert len(bundles) >= 20, bundles
    assert (assets() / "bids_uad.bib").is_file()
    with tempfile.TemporaryDirectory() as scratch:
        reference = resolve_reference(None, scratch)

    for root in (sys.prefix, os.environ["TEMPLATEFLOW_HOME"]):
        hidden = [path for path in Path(root).rglob("*") if not _open_to_all(path)]
        assert not hidden, hidden[:5]
    print(
        f"bids_uad {bids_uad.__version__}: {len(bundles)} models, reference {reference.name}, "
        f"torch {torch.__version__}, {'with' if torch.version.cuda else 'without'} CUDA"
    )


def _open_to_all(path: Path) -> bool:
    needed = 0o005 if path.is_dir() else 0o004
    return path.is_symlink() or path.stat().st_mode & needed == needed


if __name__ == "__main__":
    main()
