"""How well clusters agree with labels that were not used to find them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor


class ClusterAgreement(NamedTuple):
    """Agreement of clusters with labels, three numbers of which 1 is the best, and the matching behind the first."""

    accuracy: float  #: the fraction of data whose cluster is matched to their label, in [0, 1]
    adjusted_rand: float  #: the adjusted Rand index, at most 1 and 0 on average for clusters at random
    normalized_mutual_information: float  #: the mutual information over the mean of the two entropies, in [0, 1]
    matching: dict[int, int]  #: the label of each matched cluster


def cluster_agreement(
    labels: Tensor | npt.ArrayLike,
    predicted: Tensor | npt.ArrayLike,
) -> ClusterAgreement:
    r"""The agreement of clusters with labels, whatever numbers the clusters bear.

    .. math:: \text{accuracy} = \max_{m\ \text{one-to-one}} \frac1N \sum_n 1[\text{label}_n = m(\text{cluster}_n)].

    Each cluster is matched to one label at most and each label to one cluster at most, by the Hungarian algorithm: a
    label that is spread over several clusters counts with one of them, and a cluster without a label counts as wrong.
    (Giving each cluster its most frequent label would be purity, which grows to 1 with the number of clusters.)

    Args:
        labels: integers of shape (N,).
        predicted: integers of shape (N,), or probabilities of shape (N, C), of which the largest counts.

    Returns:
        Accuracy, adjusted Rand index [1], mutual information over the arithmetic mean of the entropies, and the
        matching, from cluster to label. Pairs without a datum in common are left out of it.

    Raises:
        ValueError: for no data, different lengths, other shapes, numbers that are not integers, and probabilities that
            are not finite and non-negative.
        ImportError: without scikit-learn, which computes the two indices.

    References:
        [1] Hubert & Arabie 1985, Comparing partitions, Journal of Classification 2

    Example:
        >>> labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 0, 1])
        >>> agreement = cluster_agreement(labels, predicted)
        >>> agreement.accuracy, agreement.matching
        (0.75, {0: 1, 2: 0})
    """
    try:
        from sklearn.metrics import (  # type: ignore[import-untyped]
            adjusted_rand_score,
            normalized_mutual_info_score,
        )
    except ImportError as error:
        raise ImportError("cluster_agreement needs scikit-learn: pip install scikit-learn") from error
    truth = _integers("labels", _array(labels))
    clusters = _array(predicted)
    if clusters.ndim == 2:
        probabilities = clusters.astype(np.float64)
        if clusters.shape[1] == 0 or not (np.isfinite(probabilities) & (probabilities >= 0)).all():
            raise ValueError(
                "Expected predicted of shape (N, C) to hold probabilities, got "
                + ("C = 0" if clusters.shape[1] == 0 else "negative, infinite or NaN ones")
            )
        clusters = probabilities.argmax(1)
    found = _integers("predicted", clusters)
    if len(truth) != len(found):
        raise ValueError(f"Expected labels and predicted of one length, got {len(truth)} and {len(found)}")

    label_values, rows = np.unique(truth, return_inverse=True)
    cluster_values, columns = np.unique(found, return_inverse=True)
    table = np.zeros((len(label_values), len(cluster_values)), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    matched = [(row, column) for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True)]
    return ClusterAgreement(
        accuracy=sum(int(table[pair]) for pair in matched) / len(truth),
        adjusted_rand=float(adjusted_rand_score(rows, columns)),
        normalized_mutual_information=float(normalized_mutual_info_score(rows, columns)),
        matching={
            int(cluster_values[column]): int(label_values[row])
            for row, column in sorted(matched, key=lambda pair: pair[1])
            if table[row, column]
        },
    )


def _array(value: Tensor | npt.ArrayLike) -> npt.NDArray[np.generic]:
    return value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)


def _integers(name: str, value: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """The array as integers of shape (N,), N >= 1."""
    if value.ndim != 1 or len(value) == 0:
        shapes = "(N,) or (N, C)" if name == "predicted" else "(N,)"
        raise ValueError(f"Expected {name} of shape {shapes} with N >= 1, got {value.shape}")
    if value.dtype.kind not in "biuf":
        raise ValueError(f"Expected {name} to be integers, got {value.dtype}")
    numbers = value.astype(np.float64)
    others = numbers[~(np.isfinite(numbers) & (numbers == np.floor(numbers)))]
    if len(others):
        raise ValueError(f"Expected {name} to be integers, got {others[0]}")
    return value.astype(np.int64)
