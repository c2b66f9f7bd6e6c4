"""The fraction of data, and the dimensions, at the prior."""

import pytest
import torch

from pyro_ilvae.diagnostics import collapsed_dimensions, collapsed_fraction


def test_collapsed_fraction_is_the_distribution_function():
    kl = torch.rand(500) * 3
    curve = collapsed_fraction(kl)
    torch.testing.assert_close(curve.epsilons, kl.sort().values)
    torch.testing.assert_close(curve.fractions, torch.arange(1, 501) / 500)
    per_dimension = collapsed_fraction(torch.rand(500, 2) * torch.tensor([1.0, 0.0]), [0.0, 0.5])
    assert per_dimension.fractions[:, 1].tolist() == [1.0, 1.0]
    assert abs(per_dimension.fractions[1, 0] - 0.5) < 5 * per_dimension.standard_errors[1, 0]


def test_collapsed_dimensions():
    kl = torch.tensor([[0.0, 0.02]] * 99 + [[1.0, 0.0]])
    assert collapsed_dimensions(kl, epsilon=0.01, delta=0.01).tolist() == [True, False]
    assert collapsed_dimensions(kl, epsilon=0.01, delta=0.005).tolist() == [False, False]


@pytest.mark.parametrize("delta", [0.29, 0.07, 0.57])
def test_delta_is_a_number_of_data(delta):
    above = round(delta * 100)
    kl = torch.zeros(100, 2)
    kl[:above, 0] = 1.0
    kl[: above + 1, 1] = 1.0
    assert collapsed_dimensions(kl, delta=delta).tolist() == [True, False]
