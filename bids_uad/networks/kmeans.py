"""k-means on the line."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans_1d(values: Tensor, clusters: int, iterations: int = 100) -> Tensor:
    """Centres of a one-dimensional k-means, started at evenly spaced quantiles.

    Parameters
    ----------
    values : Tensor, shape (N,)
    clusters : int

    Returns
    -------
    Tensor, shape (clusters,)
        Ascending. Deterministic.
    """
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    at = (torch.arange(clusters, device=values.device) + 0.5) / clusters * (len(ordered) - 1)
    centres = ordered[at.long()]
    for _ in range(iterations):
        # Clusters on a line are intervals, so sorting once makes every round a binary search.
        cuts = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        bounds = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(ordered))])
        sizes = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / sizes.clamp_min(1)
        updated = torch.where(sizes > 0, means, centres)
        if torch.equal(updated, centres):
            break
        centres = updated
    return centres.to(values.dtype)
