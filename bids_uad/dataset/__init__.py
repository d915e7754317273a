"""BIDS datasets: inputs of a run, metadata of raw datasets, and names and descriptions of outputs."""
