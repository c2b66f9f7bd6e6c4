"""The diagnostics on models with plates in plates, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within, compared
from helpers.latent_structures import data_plate, nested, nested_kl, nested_log_marginal
from torch.distributions import MultivariateNormal

from pyro_ilvae.diagnostics import active_units, evidence, kl_divergence, kl_per_dimension


@pytest.mark.slow
@pytest.mark.parametrize("data_dim", [-1, -2])
@pytest.mark.parametrize("full_size", [None, 1000])
def test_nested_plates(data_dim, full_size):
    x = torch.randn(5, 3, 2)
    model, guide = nested(data_dim, full_size)
    z, w = nested_kl(x)
    for batch_size in (None, 2):
        options = {"num_samples": 400, "batch_size": batch_size}
        assert_within(*compared(kl_per_dimension(model, guide, x, site="z", **options), z))
        assert_within(*compared(kl_per_dimension(model, guide, x, site="w", **options), w))
        assert_within(*compared(kl_divergence(model, guide, x, site="w", **options), w.sum((1, 2))))
        assert_within(*compared(kl_divergence(model, guide, x, **options), z + w.sum((1, 2))))
    means = 0.7 * x + 0.1 * x.mean((1, 2), keepdim=True)
    units = active_units(model, guide, x, site="w", num_samples=4000)
    assert units.variances.shape == (3, 2)
    torch.testing.assert_close(units.variances, means.var(0), atol=0.01, rtol=0.01)
    torch.testing.assert_close(
        active_units(model, guide, x, site="z").variances, x.mean((1, 2)).var(0), atol=0.03, rtol=0
    )


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_evidence_in_nested_plates(data_dim):
    x = torch.randn(7, 3, 2)
    model, _ = nested(data_dim)

    def exact_guide(x):
        precision = 1 + x[0].numel() / 1.25
        loc = x.sum((1, 2)) / 1.25 / precision
        with data_plate(x, data_dim):
            z = pyro.sample("z", dist.Normal(loc if data_dim == -1 else loc[:, None], precision**-0.5))
            with pyro.plate("inner", 3, dim=-3 - data_dim):
                placed = x.transpose(0, 1) if data_dim == -1 else x
                pyro.sample("w", dist.Normal((0.25 * z[..., None] + placed) / 1.25, 0.2**0.5).to_event(1))

    for batch_size in (None, 4):  # the last batch is as small as the inner plate
        bounds = evidence(model, exact_guide, x, num_samples=7, batch_size=batch_size)
        torch.testing.assert_close(bounds.log_likelihood, nested_log_marginal(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bounds.elbo, nested_log_marginal(x), atol=1e-4, rtol=1e-4)


def test_two_plates_of_one_size_need_a_name():
    x = torch.randn(3, 3, 2)
    model, guide = nested(-2)
    with pytest.raises(ValueError, match=r"one plate over the 3 data, got \['data', 'inner'\].*plate="):
        kl_divergence(model, guide, x)
    z, w = nested_kl(x)
    assert_within(*compared(kl_divergence(model, guide, x, site="z", plate="data"), z))
    assert_within(*compared(kl_per_dimension(model, guide, x, site="w", plate="data", num_samples=1000), w))
    assert evidence(model, guide, x, plate="data").elbo.shape == (3,)
    with pytest.raises(ValueError, match=r"plate to be one of \['data', 'inner'\], got 'other'"):
        evidence(model, guide, x, plate="other")
    with pytest.raises(ValueError, match="plate 'inner' to hold the data, got size 3 for 2 data"):
        evidence(model, guide, x[:2], plate="inner")


def test_a_model_that_subsamples_itself_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="2 of the 6 data"):
        evidence(model, guide, torch.randn(6))


def test_dimensions_outside_plates_are_refused():
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2, len(x)), 1.0))

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"site 'z' .*in plates.*\(2, 4\)"):
        kl_divergence(model, guide, torch.randn(4))


def test_sequential_plates():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for m in pyro.plate("steps", 3):
                w = pyro.sample(f"w{m}", dist.Normal(z, 1.0))
                pyro.sample(f"x{m}", dist.Normal(w, 0.5), obs=x[:, m])

    def guide(x):
        precision = 1 + 3 / 1.25
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.sum(1) / 1.25 / precision, precision**-0.5))
            for m in pyro.plate("steps", 3):
                pyro.sample(f"w{m}", dist.Normal((0.25 * z + x[:, m]) / 1.25, 0.2**0.5))

    x = torch.randn(5, 3)
    exact = MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 1.25 * torch.eye(3)).log_prob(x)
    torch.testing.assert_close(evidence(model, guide, x, num_samples=4).elbo, exact)
    gap = (x[:, 1] - x.sum(1) / 1.25 / 3.4) / 1.25
    expected = 0.5 * (0.2 + gap**2 + 1 / 3.4 / 1.25**2 - 1 - torch.tensor(0.2).log())
    assert_within(*compared(kl_divergence(model, guide, x, site="w1", num_samples=3000), expected))
