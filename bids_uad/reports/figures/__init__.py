"""Figures of the participant report, one module each: SVG with embedded images."""
