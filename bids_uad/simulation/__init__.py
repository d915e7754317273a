"""Synthetic T1w and T2w cohorts of skull-stripped brains with known truth.

Anatomy comes from the ICBM152 template that nilearn carries (permissive licence, no download) and,
optionally, from FreeSurfer-type label maps such as the sixteen of SynthSeg (Apache-2.0). Everything else
(shape, age, scanner, contrast, noise, lesions) is drawn from one seed: one seed is one dataset.
"""
