"""Sphinx configuration; `make docs` builds pages that need no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bids_uad import __version__

project = "bids_uad"
author = "The bids_uad developers"
project_copyright = f"{author}. Research software, not for clinical use"
version = release = __version__

extensions = ["myst_parser", "sphinx_ext.mathml", "sphinx_ext.reference"]
exclude_patterns = ["build"]
nitpicky = True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"bids_uad {version}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
