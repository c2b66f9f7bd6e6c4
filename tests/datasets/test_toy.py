"""The toy mixture: the laws of its draws, and the best accuracy that a classifier can have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import datasets

CENTERS = [((0, 0), (10, 10)), ((0, 0), (3, 0), (0, 5)), ((-1.5, 2.0),), ((1, 2, 3), (3, 2, 1)), ((0.0,), (1.0,))]


@pytest.mark.parametrize("centers", CENTERS)
@pytest.mark.parametrize("scale", [0.3, 7.5])
def test_mixture_has_the_moments_of_its_components(centers, scale):
    count = 20_000
    x, labels = datasets.gaussian_mixture(count, scale, centers, seed=3)
    means = torch.tensor(centers, dtype=torch.float32)
    assert (x.shape, x.dtype) == ((count, means.shape[1]), torch.float32)
    assert (labels.shape, labels.dtype) == ((count,), torch.int64)
    share = 1 / len(means)
    noise = (x - means[labels]) / scale
    for label in range(len(means)):
        members = noise[labels == label].double()
        assert abs(len(members) / count - share) <= 5 * math.sqrt(share * (1 - share) / count)
        size = len(members)
        assert (members.mean(0).abs() < 5 / math.sqrt(size)).all()
        product = members.T @ members / size
        assert ((product - torch.eye(len(product))).abs() < 5 * math.sqrt(2 / size)).all()
        assert ((members**4).mean(0) - 3).abs().max() < 5 * math.sqrt(96 / size)  # Gaussian


def test_labels_are_independent_draws_and_not_exact_halves():
    counts = torch.stack([datasets.gaussian_mixture(100, 1.0, seed=seed).labels.sum() for seed in range(400)]).double()
    assert abs(counts.mean() - 50) < 5 * math.sqrt(25 / 400)
    assert abs(counts.var() - 25) < 5 * 25 * math.sqrt(2 / 400)


@given(st.integers(0, 2**31), st.integers(1, 20))
def test_mixture_depends_on_its_seed_only(seed, count):
    state = torch.get_rng_state()
    first = datasets.gaussian_mixture(count, 2.0, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(3)
    second, other = (datasets.gaussian_mixture(count, 2.0, seed=s) for s in (seed, seed + 1))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.x, other.x)


def test_mixture_is_single_precision_whatever_the_default():
    expected = datasets.gaussian_mixture(10, 2.0)
    torch.set_default_dtype(torch.float64)
    try:
        found = datasets.gaussian_mixture(10, np.float64(2.0), torch.tensor([[0, 0], [10, 10]]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("scale", [1.0, 4.0, 7.5, 30.0])
@pytest.mark.parametrize("centers", [centers for centers in CENTERS if len(centers) == 2])
def test_accuracy_is_that_of_the_nearest_center(scale, centers):
    x, labels = datasets.gaussian_mixture(50_000, scale, centers, seed=7)
    nearest = torch.cdist(x, torch.tensor(centers, dtype=torch.float32)).argmin(1)
    accuracy = datasets.gaussian_mixture_accuracy(scale, centers)
    error = math.sqrt(accuracy * (1 - accuracy) / len(x))
    assert abs((nearest == labels).double().mean().item() - accuracy) <= 5 * error + 1e-12
    assert 0.5 < accuracy <= 1


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-5, 5), st.floats(0, 2 * math.pi))
def test_accuracy_knows_only_the_distance_over_the_scale(scale, factor, shift, angle):
    centers = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    expected = datasets.gaussian_mixture_accuracy(scale, centers)
    moved = factor * (centers.flip(0) @ turn.T + shift)
    assert datasets.gaussian_mixture_accuracy(factor * scale, moved) == pytest.approx(expected)
    assert datasets.gaussian_mixture_accuracy(2 * scale, centers) < expected or expected == 1
    assert datasets.gaussian_mixture_accuracy(scale, torch.zeros(2, 3)) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", value) for value in (0, -1.0, math.nan, math.inf)]
    + [("centers", value) for value in ((), ((),), (0, 1), (((0.0, 1.0),),), ((math.nan, 0.0), (1.0, 1.0)))],
)
def test_what_mixture_and_accuracy_refuse(name, value):
    for function, arguments in ((datasets.gaussian_mixture, {"num_data": 3}), (datasets.gaussian_mixture_accuracy, {})):
        with pytest.raises(ValueError, match=rf"Expected {name} .*, got"):
            function(**{**arguments, "scale": 1.0, name: value})


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_numbers_of_data_that_are_refused(count):
    with pytest.raises(ValueError, match="Expected num_data to be an int >= 1"):
        datasets.gaussian_mixture(count, 1.0)


@pytest.mark.parametrize("count", [1, 3])
def test_accuracy_is_for_two_centers(count):
    with pytest.raises(ValueError, match=rf"Expected centers of shape \(2, D\), got \({count}, 2\)"):
        datasets.gaussian_mixture_accuracy(1.0, torch.randn(count, 2))
