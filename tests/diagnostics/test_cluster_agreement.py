"""Agreement of clusters with labels: one-to-one or by purity, whatever the clusters are called."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae.diagnostics.cluster_agreement import cluster_agreement


@st.composite
def partitions(draw, most=4):
    size = draw(st.integers(1, 30))
    labels = draw(st.lists(st.integers(0, most - 1), min_size=size, max_size=size))
    return labels, draw(st.lists(st.integers(0, most - 1), min_size=size, max_size=size))


@given(partitions())
def test_accuracy_is_the_best_over_all_matchings(pair):
    labels, predicted = np.array(pair[0]), np.array(pair[1])
    best = max((labels == np.array(renamed)[predicted]).mean() for renamed in itertools.permutations(range(4)))
    agreement = cluster_agreement(labels, predicted)
    assert agreement.accuracy == pytest.approx(best)
    renamed = np.array([agreement.matching.get(cluster, -1) for cluster in predicted])
    assert (renamed == labels).mean() == pytest.approx(best)
    assert len(set(agreement.matching.values())) == len(agreement.matching)


@given(partitions(), st.permutations(range(4)), st.permutations(range(4)))
def test_names_of_clusters_and_labels_do_not_matter(pair, label_names, cluster_names):
    labels, predicted = pair
    agreement = cluster_agreement(labels, predicted)
    renamed = cluster_agreement([10 * label_names[i] for i in labels], [cluster_names[i] - 7 for i in predicted])
    assert renamed[:4] == pytest.approx(agreement[:4])


@given(partitions())
def test_ranges_and_symmetry(pair):
    labels, predicted = pair
    agreement, reverse = cluster_agreement(labels, predicted), cluster_agreement(predicted, labels)
    assert 0 < agreement.accuracy <= 1
    assert agreement.adjusted_rand <= 1 + 1e-12
    assert -1e-12 <= agreement.normalized_mutual_information <= 1 + 1e-12
    assert agreement[:3] == pytest.approx(reverse[:3])


@given(partitions())
def test_indices_against_pairs_of_data_and_entropies(pair):
    labels, predicted = np.array(pair[0]), np.array(pair[1])
    agreement = cluster_agreement(labels, predicted)
    together = [values[:, None] == values for values in (labels, predicted)]
    upper = np.triu_indices(len(labels), 1)
    same_label, same_cluster = (matrix[upper] for matrix in together)
    if len(same_label) and not (same_label == same_cluster).all():
        chance = same_label.mean() * same_cluster.mean()
        index = ((same_label & same_cluster).mean() - chance) / (
            0.5 * (same_label.mean() + same_cluster.mean()) - chance
        )
        assert agreement.adjusted_rand == pytest.approx(index, abs=1e-9)

    def entropy(*values):
        p = np.unique(np.stack(values), axis=1, return_counts=True)[1] / len(labels)
        return -(p * np.log(p)).sum()

    mean_entropy = 0.5 * (entropy(labels) + entropy(predicted))
    if mean_entropy > 0:
        information = entropy(labels) + entropy(predicted) - entropy(labels, predicted)
        assert agreement.normalized_mutual_information == pytest.approx(information / mean_entropy, abs=1e-9)


@given(partitions())
def test_purity_gives_each_cluster_its_most_frequent_label(pair):
    labels, predicted = np.array(pair[0]), np.array(pair[1])
    agreement = cluster_agreement(labels, predicted)
    right = sum(np.bincount(labels[predicted == cluster]).max() for cluster in np.unique(predicted))
    assert agreement.purity == right / len(labels)
    most_frequent = np.bincount(labels).max() / len(labels)
    assert max(agreement.accuracy, most_frequent) <= agreement.purity <= 1


@given(partitions())
def test_purity_never_falls_when_clusters_are_split(pair):
    labels, predicted = np.array(pair[0]), np.array(pair[1])
    halves = 2 * predicted + np.arange(len(labels)) % 2
    assert cluster_agreement(labels, halves).purity >= cluster_agreement(labels, predicted).purity
    assert cluster_agreement(labels, 0 * predicted).purity == np.bincount(labels).max() / len(labels)
    assert cluster_agreement(labels, labels).purity == cluster_agreement(labels, np.arange(len(labels))).purity == 1


def test_more_clusters_than_labels_are_rewarded_by_purity_alone():
    labels = np.repeat([0, 1], 50)
    agreement = cluster_agreement(labels, np.arange(100))
    assert agreement.purity == 1
    assert agreement.accuracy == 0.02
    assert agreement.adjusted_rand == pytest.approx(0)
    split = cluster_agreement(labels, np.repeat([0, 1, 2, 3], 25))
    assert split.accuracy == 0.5
    assert split.purity == 1
    assert len(split.matching) == 2


def test_fewer_clusters_than_labels():
    agreement = cluster_agreement([0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5])
    assert agreement == (0.5, 0.0, 0.0, 0.5, {5: 0})


def test_greedy_matching_is_not_enough():
    # Cluster 0 meets label 0 most often, but the optimum gives label 0 to cluster 1.
    labels, predicted = [0] * 5 + [1] * 4 + [0] * 4, [0] * 5 + [0] * 4 + [1] * 4
    agreement = cluster_agreement(labels, predicted)
    assert agreement.accuracy == pytest.approx(8 / 13)
    assert agreement.matching == {0: 1, 1: 0}


def test_clusters_and_labels_without_a_common_datum_are_not_matched():
    agreement = cluster_agreement([0] * 6 + [1], [0] * 5 + [1] + [0])
    assert agreement.accuracy == pytest.approx(5 / 7)
    assert agreement.matching == {0: 0}


def test_clusters_at_random_have_an_adjusted_index_of_zero():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    draws = [cluster_agreement(labels, generator.integers(0, 4, 60)).adjusted_rand for _ in range(100)]
    assert abs(np.mean(draws)) < 5 * np.std(draws) / np.sqrt(len(draws))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_count_by_their_largest(dtype):
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0]], dtype=dtype)
    labels = torch.tensor([1, 1, 0, 0])
    assert cluster_agreement(labels, probabilities) == cluster_agreement(labels, [1, 1, 0, 2])


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda values: torch.tensor(values).float()])
def test_kinds_of_integers(convert):
    agreement = cluster_agreement(convert([3, 3, -1]), convert([0, 0, 1]))
    assert agreement == (1.0, 1.0, 1.0, 1.0, {0: 3, 1: -1})
    assert all(type(number) is int for number in [*agreement.matching, *agreement.matching.values()])


@pytest.mark.parametrize("predicted", [[7], [[0.2, 0.8]]])
def test_one_datum(predicted):
    assert cluster_agreement([4], predicted)[:4] == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [
        ([0, 1], [0, 1, 1], "of one length, got 2 and 3"),
        ([0, 1], torch.ones(3, 2), "of one length, got 2 and 3"),
        ([0.5, 1], [0, 1], "labels to be integers, got 0.5"),
        ([0, 1], [0.0, 0.25], "predicted to be integers, got 0.25"),
        ([0, 1], [0, np.nan], "predicted to be integers, got nan"),
        (["a", "b"], [0, 1], "labels to be integers, got <U1"),
        ([], [], r"labels of shape \(N,\) with N >= 1, got \(0,\)"),
        ([[0], [1]], [0, 1], r"labels of shape \(N,\) with N >= 1, got \(2, 1\)"),
        ([0, 1], torch.zeros(2, 1, 1), r"predicted of shape \(N,\) or \(N, C\)"),
        ([0, 1], [[0.5, np.nan], [1, 0]], "probabilities, got negative, infinite or NaN ones"),
        ([0, 1], [[0.5, -0.5], [1, 0]], "probabilities, got negative"),
        ([0, 1], torch.zeros(2, 0), "probabilities, got C = 0"),
    ],
)
def test_refuses(labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        cluster_agreement(labels, predicted)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="cluster_agreement needs scikit-learn: pip install scikit-learn"):
        cluster_agreement([0, 1], [0, 1])
