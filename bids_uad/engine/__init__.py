"""From volumes to maps, and from slices to trained detectors, in plain PyTorch."""
