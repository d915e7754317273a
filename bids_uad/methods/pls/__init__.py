"""Painted-lesion segmentation, the default detector."""
