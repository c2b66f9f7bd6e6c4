"""How well clusters agree with labels that were not used to find them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pyro_ilvae.diagnostics._engine import printing
from pyro_ilvae.diagnostics._engine.assignments import integers, numbers, probabilities

__all__ = ["ClusterAgreement", "cluster_agreement"]


class ClusterAgreement(NamedTuple):
    """Four numbers for the agreement of clusters with labels, each at most 1, and the matching behind the accuracy."""

    accuracy: float  #: the fraction of data whose cluster is matched to their label, in [0, 1]
    adjusted_rand: float  #: the adjusted Rand index, at most 1 and 0 on average for clusters at random
    normalized_mutual_information: float  #: the mutual information over the mean of the two entropies, in [0, 1]
    purity: float  #: the fraction of data whose label is the most frequent one of their cluster, in (0, 1]
    matching: dict[int, int]  #: the label of each matched cluster

    def __repr__(self) -> str:
        return printing.described(
            self,
            f"accuracy {printing.number(self.accuracy)}",
            f"adjusted Rand index {printing.number(self.adjusted_rand)}",
            f"normalized mutual information {printing.number(self.normalized_mutual_information)}",
            f"purity {printing.number(self.purity)}",
            f"{len(self.matching)} clusters matched",
        )


def cluster_agreement(
    labels: Tensor | npt.ArrayLike,
    predicted: Tensor | npt.ArrayLike,
) -> ClusterAgreement:
    r"""The agreement of clusters with labels, whatever numbers the clusters bear.

    .. math:: \text{accuracy} = \max_{m\ \text{one-to-one}} \frac1N \sum_n 1[\text{label}_n = m(\text{cluster}_n)],
        \qquad \text{purity} = \frac1N \sum_c \max_l n_{cl},

    with :math:`n_{cl}` the number of data of cluster c with label l.

    The Hungarian algorithm matches each cluster to at most one label and each label to at most one cluster. A label
    that is spread over several clusters counts with one of them, and a cluster without a label counts as wrong.
    Purity [2], the measure of the public code of LIDVAE [3], gives each cluster its most frequent label instead, so
    that several clusters may share a label. It is at least the accuracy and grows with the number of clusters, to 1 for
    as many clusters as data: compare it for equal numbers of clusters.

    Args:
        labels: integers of shape (N,).
        predicted: integers of shape (N,), or probabilities of shape (N, C), whose largest entry counts.

    Returns:
        Accuracy, adjusted Rand index [1], mutual information over the arithmetic mean of the entropies, purity, and
        the matching from cluster to label, without pairs that have no datum in common.

    Raises:
        ValueError: for no data, different lengths, other shapes, numbers that are not integers, and probabilities that
            are not finite and non-negative or do not sum to 1.
        ImportError: without scikit-learn, which computes the two indices.

    References:
        | [1] Hubert & Arabie 1985, Comparing partitions, Journal of Classification 2
        | [2] Manning, Raghavan & Schütze 2008, Introduction to Information Retrieval, section 16.3
        | [3] Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537

    Example:
        >>> import torch
        >>> labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 0, 1])
        >>> agreement = cluster_agreement(labels, predicted)
        >>> agreement.accuracy, agreement.purity, agreement.matching
        (0.75, 1.0, {0: 1, 2: 0})
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    try:
        from sklearn.metrics import (  # type: ignore[import-untyped]
            adjusted_rand_score,
            normalized_mutual_info_score,
        )
    except ImportError as error:
        raise ImportError("cluster_agreement needs scikit-learn: pip install scikit-learn") from error
    truth, found = integers("labels", labels), _clusters(predicted)
    if len(truth) != len(found):
        raise ValueError(f"Expected labels and predicted of one length, got {len(truth)} and {len(found)}")
    if numbers("predicted", predicted).dim() == 2:
        probabilities("predicted", predicted, "(N,) or (N, C)", dim=2)

    label_values, rows = np.unique(truth.numpy(force=True), return_inverse=True)
    cluster_values, columns = np.unique(found.numpy(force=True), return_inverse=True)
    table = np.zeros((len(label_values), len(cluster_values)), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    matched = [(row, column) for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True)]
    return ClusterAgreement(
        accuracy=sum(int(table[pair]) for pair in matched) / len(truth),
        adjusted_rand=float(adjusted_rand_score(rows, columns)),
        normalized_mutual_information=float(normalized_mutual_info_score(rows, columns)),
        purity=int(table.max(0).sum()) / len(truth),
        matching={
            int(cluster_values[column]): int(label_values[row])
            for row, column in sorted(matched, key=lambda pair: pair[1])
            if table[row, column]
        },
    )


def _clusters(predicted: Tensor | npt.ArrayLike) -> Tensor:
    """The cluster of each datum, of shape (N,)."""
    scores = numbers("predicted", predicted)
    if scores.dim() != 2:
        return integers("predicted", predicted, shape="(N,) or (N, C)")
    if scores.shape[1] == 0 or not (scores.isfinite() & (scores >= 0)).all():
        got = "C = 0" if scores.shape[1] == 0 else "negative, infinite or NaN ones"
        raise ValueError(f"Expected predicted of shape (N, C) to hold probabilities, got {got}")
    return integers("predicted", scores.argmax(1), shape="(N,) or (N, C)")
