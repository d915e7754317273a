"""Calibration on validation scans: thresholds, score histograms and the normative reference."""
