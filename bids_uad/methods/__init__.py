"""The detectors, one file each, readable beside their papers."""
