"""The KL divergence of a site and of all sites together, against closed forms."""

import pyro.distributions as dist
import torch
from helpers.factor_models import LOADING, SCALE, L, N, exact_guide, flow_guide, linear_model, sum_model
from pyro import poutine
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import kl_divergence, kl_per_dimension


def test_kl_of_a_site_without_factors_is_that_of_its_marginals_and_in_total():
    x = torch.randn(N, 3)
    posterior = poutine.trace(exact_guide).get_trace(x).nodes["z"]["fn"]
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    marginals = kl_per_dimension(linear_model, exact_guide, x)
    expected = exact_kl(Normal(posterior.mean, posterior.stddev), Normal(0.0, 1.0))
    torch.testing.assert_close(marginals.values, expected)
    total = kl_divergence(linear_model, exact_guide, x, num_samples=2000)
    exact = exact_kl(posterior, prior)
    assert ((total.values - exact).abs() < 5 * total.standard_errors).all()
    assert (exact > marginals.values.sum(-1)).all()  # the dependence is lost in the marginals


def test_kl_of_a_flow():
    x = torch.randn(N)
    kl = kl_divergence(sum_model, flow_guide, x, num_samples=3000, seed=1)
    assert kl.estimator == "sampled"
    exact = exact_kl(
        dist.MultivariateNormal((x[:, None] * LOADING) @ L.mT, L @ torch.diag(SCALE**2) @ L.mT),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    )
    assert ((kl.values - exact).abs() < 5 * kl.standard_errors).all()
    state = torch.get_rng_state()
    again = kl_divergence(sum_model, flow_guide, x, num_samples=3000, seed=1)
    assert torch.equal(kl.values, again.values)
    assert torch.equal(state, torch.get_rng_state())
