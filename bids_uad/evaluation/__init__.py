"""From the small score tables of each subject to the benchmark of a cohort."""
