"""Simulated T1w, T2w and FLAIR cohorts of skull-stripped brains with known lesion masks and tissue labels.

Anatomy comes from the ICBM152 template that nilearn carries (permissive licence, no download) and,
optionally, from FreeSurfer-type label maps such as the sixteen of SynthSeg (Apache-2.0). Shape, age,
scanner, contrast, noise and lesions are random draws; one seed always gives the same dataset.
"""
