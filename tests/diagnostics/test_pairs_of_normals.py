"""Normal posteriors at the draws of all others, by products of matrices, have the densities of the distribution."""

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae.diagnostics._engine.data_posteriors import DataPosterior

SHAPES = {  # batch shape, event dimensions, and where the data are
    "numbers": ((7,), 0, -1),
    "vectors": ((7, 3), 1, -1),
    "inner plate": ((7, 4), 0, -2),
    "outer plate": ((4, 7, 2), 1, -1),
    "vectors in an inner plate": ((7, 4, 2), 1, -2),
}


def posterior(shape, event_dim, dim, dtype, distance=1.0, kind=dist.Normal):
    loc = distance * torch.randn(shape, dtype=dtype)
    scale = 0.05 + torch.rand(shape, dtype=dtype)
    return DataPosterior(kind(loc, scale).to_event(event_dim), dim)


def by_distribution(own, rows):
    return own.by_datum(own.fn.log_prob(own.at_each_datum(rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
@given(seed=st.integers(0, 10**6), exponent=st.floats(-2, 5))
def test_products_are_densities_of_all_pairs(name, dtype, seed, exponent):
    torch.manual_seed(seed)
    own = posterior(*SHAPES[name], dtype, distance=10.0**exponent)
    rows = own.rows(own.fn.sample((5,))).flatten(0, 1)
    log_prob = own.log_prob(rows)
    assert log_prob.dtype == dtype
    exact = by_distribution(DataPosterior(_double(own.fn), own.dim), rows.double())
    # Densities of draws that are their own are small numbers, and of others large ones.
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=2e-5)


def _double(fn):
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    return dist.Normal(base.loc.double(), base.scale.double()).to_event(fn.event_dim)


def test_what_is_not_quite_a_normal_keeps_its_own_density():
    class Shifted(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) + 1.0

    for kind in (dist.Laplace, Shifted):
        own = posterior((7, 3), 1, -1, torch.float32, kind=kind)
        rows = own.rows(own.fn.sample((5,))).flatten(0, 1)
        torch.testing.assert_close(own.log_prob(rows), by_distribution(own, rows))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_values_beyond_all_scales_have_the_density_of_the_distribution(value):
    own = posterior((7, 3), 1, -1, torch.float32)
    rows = own.rows(own.fn.sample((2,))).flatten(0, 1)
    rows[0, 0] = value
    own.fn.base_dist._validate_args = False
    torch.testing.assert_close(own.log_prob(rows), by_distribution(own, rows), equal_nan=True)


@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-155])
def test_passes_are_as_large_as_what_they_compute(smallest):
    """One tiny scale leaves no room for products, and each pair then takes all its numbers."""
    scale = torch.ones(50, 20, dtype=torch.float64)
    scale[3, 4] = smallest
    own = DataPosterior(dist.Normal(torch.randn(50, 20, dtype=torch.float64), scale).to_event(1), -1)
    rows = own.rows(own.fn.sample((500,))).flatten(0, 1)
    part = next(own.passes(rows, None))
    numbers = (part.stop - part.start) * 50 * (1 if smallest == 1.0 else 20)
    assert numbers <= 300_000
    torch.testing.assert_close(own.log_prob(rows[:9]), by_distribution(own, rows[:9]))
