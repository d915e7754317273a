"""Install the SRI24 atlas in the image, if it is available: ``bake_atlas.py FOLDER ARCHIVE``.

The zip file of NITRC is read from FOLDER, or from SRI24_URL if that is set; SRI24_SHA256 is its checksum.
"""

import hashlib
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

from bids_uad.preprocessing.atlas import install_atlas

NOTE = "Templates that bids_uad finds without a network. tpl-SRI24 is here if the image was built with it.\n"


def main(folder: Path, archive: Path) -> None:
    """Check and install the atlas, or leave the archive empty."""
    archive.mkdir()
    (archive / "README.md").write_text(NOTE)
    with tempfile.TemporaryDirectory() as scratch:
        packages = sorted(folder.glob("*.zip"))
        if url := os.environ.get("SRI24_URL"):
            packages = [Path(scratch) / "sri24.zip"]
            urllib.request.urlretrieve(url, packages[0])  # noqa: S310
        if not packages:
            print("No SRI24 package: the image uses the built-in reference image by default")
            return
        (package,) = packages
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        wanted = os.environ.get("SRI24_SHA256")
        if found != wanted:
            sys.exit(f"{package.name} has the SHA-256 {found}, SRI24_SHA256 is {wanted or 'not set'}")
        print("Atlas:", install_atlas(package, archive))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
