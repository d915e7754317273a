"""The participant level: from raw images to anomaly maps, one unit of work per image."""
