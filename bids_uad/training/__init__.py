"""Training and calibration of models; the participant and group levels do not import this package."""
