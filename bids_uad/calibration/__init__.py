"""What is fixed before any test scan is seen: score histograms and thresholds."""
