"""Brains in whole heads of any contrast, found by a small network that has learnt from label maps alone."""
