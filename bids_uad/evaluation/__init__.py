"""Evaluation of a cohort from the score tables of the participant level: benchmark and secondary analyses."""
