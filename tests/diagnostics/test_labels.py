"""Labels and assignments as users have them: numbers far apart, columns of data frames, and what is neither."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae.diagnostics import cluster_agreement, coinciding_components, component_usage, match_components

NAMES = {"contiguous": [0, 1, 2], "gaps": [3, 7, 9], "far": [5, 70_000, 99_999], "descending": [900, 40, 1]}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12), st.sampled_from(list(NAMES)))
def test_matches_do_not_depend_on_the_names_of_components(pairs, names):
    reference, other = (np.array(labels) for labels in zip(*pairs, strict=True))
    renamed = np.array(NAMES[names])[reference]
    match = match_components(renamed, other)
    best = max(
        np.mean([r == order[o] for r, o in pairs]) for order in itertools.permutations(range(3))
    )  # one term for each order
    assert match.agreement == pytest.approx(best)
    size = max(renamed.max(), other.max()) + 1
    assert len(match.permutation) == size
    assert torch.equal(match.permutation.sort().values, torch.arange(size))  # each component once
    assert np.mean(match.permutation.numpy(force=True)[renamed] == other) == pytest.approx(best)


def test_the_gaps_between_labels_are_matched_in_order():
    assert match_components([3, 3, 7, 9], [7, 7, 9, 3]).permutation.tolist() == [0, 1, 2, 7, 4, 5, 6, 9, 8, 3]
    agreement = cluster_agreement([3, 3, 7, 9], [70_000, 70_000, -2, 10**12])
    assert agreement == (1.0, 1.0, 1.0, 1.0, {-2: 7, 70_000: 3, 10**12: 9})


LABELS = {
    "tensor": torch.tensor,
    "every second": lambda values: torch.tensor([v for value in values for v in (value, 0)])[::2],
    "uint8": lambda values: torch.tensor(values, dtype=torch.uint8),
    "floats": lambda values: torch.tensor(values, dtype=torch.float32),
    "list": list,
    "tuple": tuple,
    "list of tensors": lambda values: [torch.tensor(value) for value in values],
    "list of gradients": lambda values: [torch.tensor(float(value), requires_grad=True) for value in values],
    "array": np.array,
    "backwards": lambda values: np.array(values[::-1])[::-1],
    "big endian": lambda values: np.array(values, dtype=">i4"),
    "unsigned": lambda values: np.array(values, dtype=np.uint64),
    "objects": lambda values: np.array(values, dtype=object),
    "column": pd.Series,
    "nullable column": lambda values: pd.Series(values, dtype="Int64"),
    "category": lambda values: pd.Series(values, dtype="category"),
    "column of a frame": lambda values: pd.DataFrame({"a": values, "b": "text"})["a"],
}


@pytest.mark.parametrize("convert", LABELS.values(), ids=LABELS)
def test_kinds_of_labels(convert):
    reference, other = [0, 0, 1, 2, 2], [2, 2, 0, 1, 0]
    expected, found = match_components(reference, other), match_components(convert(reference), convert(other))
    assert (found.permutation.tolist(), found.agreement) == (expected.permutation.tolist(), expected.agreement)
    assert cluster_agreement(convert(reference), convert(other)) == cluster_agreement(reference, other)


@pytest.mark.parametrize("convert", [np.array, list, pd.DataFrame, lambda rows: pd.DataFrame(rows).astype(object)])
def test_kinds_of_probabilities(convert):
    rows = [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.125, 0.125, 0.75], [0.0, 0.75, 0.25]]
    exact = torch.tensor(rows, dtype=torch.float64)
    assert component_usage(convert(rows)).kl == component_usage(exact).kl
    assert match_components(convert(rows), exact).agreement == match_components(exact, exact).agreement
    assert cluster_agreement([0, 1, 2, 1], convert(rows)).accuracy == 1
    assert torch.equal(coinciding_components(convert(rows), np.ones((4, 3))).overlap.diagonal(), exact.new_ones(4))


NO_LABELS = {
    "strings": (["a", "b"], "got <U1"),
    "one string": ("ab", "got <U2"),
    "nothing": (None, "got None"),
    "missing": ([1, None], "got a list of other objects"),
    "mapping": ({0: 1, 1: 0}, "got a dict of other objects"),
    "class": (torch.Tensor, "got the class Tensor"),
    "ragged": ([[0, 1], [0]], "got a list that is none"),
    "complex": (np.array([1j, 1]), "got complex128"),
    "dates": (np.array(["2024-01-01", "2024-01-02"], dtype="datetime64[D]"), "got datetime64"),
    "beyond int64": (np.array([2**63 + 1, 0], dtype=np.uint64), r"below 2\*\*63, got 9223372036854775809"),
    "beyond floats": ([1e30, 0], "got 1e\\+30"),
    "NaN": ([math.nan, 0], "got nan"),
    "fractions": ([0.5, 0], "got 0.5"),
}


@pytest.mark.parametrize(("value", "message"), NO_LABELS.values(), ids=NO_LABELS)
def test_what_are_no_labels(value, message):
    right = [0, 1]
    for name, call in {
        "reference": lambda: match_components(value, right),
        "other": lambda: match_components(right, value),
        "labels": lambda: cluster_agreement(value, right),
        "predicted": lambda: cluster_agreement(right, value),
    }.items():
        with pytest.raises(ValueError, match=f"Expected {name} to be .*{message}"):
            call()


@pytest.mark.parametrize(
    "kind", ["strings", "one string", "nothing", "missing", "mapping", "class", "ragged", "complex"]
)
def test_what_are_no_numbers(kind):
    value, message = NO_LABELS[kind]
    for name, call in {
        "probs": lambda: component_usage(value),
        "weights": lambda: component_usage([[0.5, 0.5]], value),
        "loc": lambda: coinciding_components(value, [[1.0]]),
        "scale": lambda: coinciding_components([[1.0]], value),
    }.items():
        if (name, kind) != ("weights", "nothing"):  # None weights are uniform ones
            with pytest.raises(ValueError, match=f"Expected {name} to be numbers, {message}"):
                call()


@pytest.mark.parametrize(("rows", "message"), [
    ([[0.0, 0.0], [0.0, 1.0]], "sum to 1 over components, got a sum of 0.0"),
    ([[2.0, 1.0], [0.0, 1.0]], "sum to 1 over components, got a sum of 3.0"),
    ([[-1.0, 2.0], [0.0, 1.0]], "probabilities, got negative"),
    ([[math.nan, 1.0], [0.0, 1.0]], "probabilities, got negative, infinite or NaN"),
])  # fmt: skip
def test_rows_of_clusters_are_probabilities(rows, message):
    with pytest.raises(ValueError, match=f"Expected predicted .*{message}"):
        cluster_agreement([0, 1], rows)


def test_labels_that_are_no_labels_of_components():
    for reference, other, name in ([0, 10**9], [0, 1], "reference"), ([0, 1], [0, 2**40], "other"):
        with pytest.raises(ValueError, match=f"Expected {name} to be labels below 10000000, got"):
            match_components(reference, other)
    many = torch.arange(10_001)
    with pytest.raises(ValueError, match=r"Expected labels to be .* with at most 10000 different values, got 10001"):
        cluster_agreement(many, many % 3)
    with pytest.raises(ValueError, match=r"Expected other to be .* with at most 10000 different values, got 10001"):
        match_components(many % 3, many)
