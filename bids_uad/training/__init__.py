"""Training and calibration of models; nothing here is imported by a run on scans."""
