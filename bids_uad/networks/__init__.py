"""Building blocks that several detectors share, in plain PyTorch."""
