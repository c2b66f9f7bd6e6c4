"""Clusters of encoded data, at which the components of a mixture can start."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks

_SMALLEST_SCALE = 1e-3


class Clusters(NamedTuple):
    """Clusters of N data."""

    members: Tensor  #: the cluster of each datum, of shape (N,)
    loc: Tensor  #: the location of each cluster, of shape (C, K)
    scale: Tensor  #: the scale of each cluster, of shape (C, K)
    share: Tensor  #: the fraction of the data in each cluster, of shape (C,)

    def numbered_as(self, labels: Tensor) -> "Clusters":
        """The same clusters, numbered so that most data with a label, of shape (N,) or -1, are in the cluster of it."""
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

        known, number = labels >= 0, len(self.loc)
        together = torch.zeros(number, number, device=labels.device)
        together.index_put_((labels[known], self.members[known]), torch.ones(()).to(together), accumulate=True)
        _, order = linear_sum_assignment(together.numpy(force=True), maximize=True)
        order = torch.from_numpy(order).to(labels.device)
        return Clusters(order.argsort()[self.members], self.loc[order], self.scale[order], self.share[order])


def find_clusters(loc: Tensor, variance: Tensor, number: int, restarts: int, seed: int | None) -> Clusters:
    """Clusters of locations (N, K) by k-means. ``variance`` (N, K), which may be negative, is added to their spread."""
    _checks.seed(seed)
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("initialize_components needs scikit-learn: pip install scikit-learn") from error
    different = len(loc.unique(dim=0))
    if different < number:
        raise ValueError(f"Expected at least num_components = {number} different encoded data, got {different}")
    # scikit-learn takes seeds of 32 bits.
    random_state = int(torch.randint(2**31, ())) if seed is None else int(seed) % 2**32
    codes = loc.double().numpy(force=True)
    found = KMeans(number, n_init=restarts, random_state=random_state).fit_predict(codes)
    members = torch.from_numpy(found).long().to(loc.device)
    indicator = nn.functional.one_hot(members, number).to(loc.dtype)
    sizes = indicator.sum(0)
    if sizes.min() == 0:  # k-means leaves clusters empty if codes differ by rounding errors only
        raise ValueError(f"Expected {number} clusters of encoded data, got {int((sizes > 0).sum())}")
    centers = indicator.T @ loc / sizes[:, None]
    spread = indicator.T @ (loc - centers[members]).square() / sizes[:, None]
    total = (spread + indicator.T @ variance / sizes[:, None]).maximum(0.1 * spread)
    # A cluster of equal locations has no spread, and a Normal with scale 0 has no density.
    return Clusters(members, centers, total.sqrt().clamp(min=_SMALLEST_SCALE), sizes / len(loc))
