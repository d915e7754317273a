"""Reports that a person reads: one page per subject, one for the group, and the methods text."""
