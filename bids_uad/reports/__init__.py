"""Reports of the participant and group level, and the methods text."""
