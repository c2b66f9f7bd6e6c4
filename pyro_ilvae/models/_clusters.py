"""Clusters of encoded data, from which the components of a mixture can start."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

_SMALLEST_SCALE = 1e-3


class Clusters(NamedTuple):
    """The cluster of each datum (N,), and of each cluster its location and scale (C, K) and its share of data (C,)."""

    members: Tensor
    loc: Tensor
    scale: Tensor
    share: Tensor


def find_clusters(loc: Tensor, variance: Tensor, number: int, restarts: int, seed: int | None) -> Clusters:
    """Clusters of locations (N, K) by k-means, with variances to add to or, if negative, to take from their spread."""
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("initialize_components needs scikit-learn: pip install scikit-learn") from error
    different = len(loc.unique(dim=0))
    if different < number:
        raise ValueError(f"Expected at least num_components = {number} different encoded data, got {different}")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    codes = loc.double().numpy(force=True)
    found = KMeans(number, n_init=restarts, random_state=seed).fit_predict(codes)
    members = torch.from_numpy(found).long().to(loc.device)
    indicator = nn.functional.one_hot(members, number).to(loc.dtype)
    sizes = indicator.sum(0)
    if sizes.min() == 0:  # where codes differ by rounding alone
        raise ValueError(f"Expected {number} clusters of encoded data, got {int((sizes > 0).sum())}")
    centers = indicator.T @ loc / sizes[:, None]
    spread = indicator.T @ (loc - centers[members]).square() / sizes[:, None]
    total = (spread + indicator.T @ variance / sizes[:, None]).maximum(0.1 * spread)
    # A cluster of equal locations has no spread, and a scale of 0 has no density.
    return Clusters(members, centers, total.sqrt().clamp(min=_SMALLEST_SCALE), sizes / len(loc))
