"""The four analysis levels: participant, group, train, calibrate."""
