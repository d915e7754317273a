"""Arguments in, exit code out; no science."""
