"""Figures of the participant report, one module per kind; plain SVG with the images embedded."""
