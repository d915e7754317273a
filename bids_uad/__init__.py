"""bids_uad: unsupervised anomaly detection in brain MRI, as a BIDS App.

Research software, not for clinical use.
"""

from __future__ import annotations

__version__ = "0.1.0"
