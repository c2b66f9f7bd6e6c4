"""The diagnostics on guides with flows and on multivariate Normals, against closed forms and quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_errors_are_right, assert_within
from helpers.latent_structures import data_plate
from pyro.distributions import transforms
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import UnavailableError, active_units, evidence, kl_divergence, kl_per_dimension

L = torch.tensor([[1.0, 0.0], [0.8, 0.6]])


def vector_model(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def flow_guide(*parts):
    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(0.5 * x, 0.6).to_event(1), list(parts)))

    return guide


@pytest.mark.slow
@pytest.mark.parametrize("event_dim", [0, 1])
def test_affine_flow(event_dim):
    x = torch.randn(5, 2)
    offset, scale = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
    guide = flow_guide(transforms.AffineTransform(offset, scale, event_dim=event_dim))
    each = exact_kl(Normal(offset + 0.5 * scale * x, 0.6 * scale), Normal(0.0, 1.0))
    kl = kl_divergence(vector_model, guide, x, num_samples=3000)
    assert kl.estimator == "sampled"
    assert_within(kl.values, each.sum(-1), kl.standard_errors)
    per_dimension = kl_per_dimension(vector_model, guide, x, num_samples=3000)
    assert_within(per_dimension.values, each, per_dimension.standard_errors)
    units = active_units(vector_model, guide, x, num_samples=40000)
    torch.testing.assert_close(units.variances, (0.5 * scale * x).var(0), atol=0.01, rtol=0.02)
    assert_errors_are_right(lambda seed: tuple(kl_divergence(vector_model, guide, x, num_samples=40, seed=seed)[::2]))


def test_flow_that_joins_dimensions():
    x = torch.randn(5, 2)
    guide = flow_guide(transforms.LowerCholeskyAffine(torch.zeros(2), L))
    q = MultivariateNormal(0.5 * x @ L.mT, 0.36 * L @ L.mT)
    kl = kl_divergence(vector_model, guide, x, num_samples=4000, batch_size=2)
    assert_within(kl.values, exact_kl(q, MultivariateNormal(torch.zeros(2), torch.eye(2))), kl.standard_errors)
    with pytest.raises(UnavailableError, match="site 'z' to factorize"):
        kl_per_dimension(vector_model, guide, x)


def test_spline_flow():
    x = torch.randn(3, 2)
    spline = transforms.Spline(2, count_bins=4, bound=3.0)
    kl = kl_per_dimension(vector_model, flow_guide(spline), x, num_samples=3000)
    u = torch.linspace(-6, 6, 20001)[:, None, None]
    log_base = Normal(0.5 * x, 0.6).log_prob(u)
    with torch.no_grad():
        z = spline(u.expand(-1, 3, 2))
        log_ratio = log_base - spline.log_abs_det_jacobian(u.expand(-1, 3, 2), z) - Normal(0.0, 1.0).log_prob(z)
    exact = torch.trapezoid(log_base.exp() * log_ratio, u, dim=0)
    assert_within(kl.values, exact, kl.standard_errors, rtol=1e-3)
    total = kl_divergence(vector_model, flow_guide(spline), x, num_samples=3000)
    assert_within(total.values, exact.sum(-1), total.standard_errors, rtol=1e-3)


def test_coupling_flow_and_its_evidence():
    x = torch.randn(3, 2)
    flow = transforms.affine_coupling(2, hidden_dims=[8])
    guide = flow_guide(flow)
    kl = kl_divergence(vector_model, guide, x, num_samples=3000)
    z = dist.TransformedDistribution(dist.Normal(0.5 * x, 0.6).to_event(1), [flow])
    with torch.no_grad():
        draws = z.sample((20000,))
        log_ratio = z.log_prob(draws) - Normal(0.0, 1.0).log_prob(draws).sum(-1)
    assert_within(kl.values, log_ratio.mean(0), 1.1 * kl.standard_errors)
    bounds = evidence(vector_model, guide, x, num_samples=20000)
    exact = Normal(0.0, 1.49**0.5).log_prob(x).sum(-1)
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)


def test_active_units_of_draws_do_not_count_their_noise():
    # A posterior that is the prior for all data: the means of 100 draws alone vary by 1 / 100.
    x = torch.randn(2000, 2)

    def guide(x):
        with data_plate(x):
            base = dist.Normal(torch.zeros_like(x), 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [transforms.AffineTransform(0.0, 2.0, event_dim=1)]))

    units = active_units(vector_model, guide, x, batch_size=500)
    assert units.num_active == 0
    assert (units.variances.abs() < 5 * units.standard_errors).all()


def test_multivariate_normal_guide():
    x = torch.randn(5, 2)
    covariance = torch.tensor([[1.0, 0.7], [0.7, 0.8]])

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(0.5 * x, covariance))

    def model(x):
        with data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))

    q = MultivariateNormal(0.5 * x, covariance)
    exact = exact_kl(q, MultivariateNormal(torch.zeros(2), torch.eye(2)))
    sampled, analytic = (kl_divergence(m, guide, x, num_samples=3000) for m in (vector_model, model))
    assert (sampled.estimator, analytic.estimator) == ("sampled", "analytic")
    assert_within(sampled.values, exact, sampled.standard_errors)
    torch.testing.assert_close(analytic.values, exact)
    for prior_model in (vector_model, model):
        marginals = kl_per_dimension(prior_model, guide, x)
        assert marginals.estimator == "analytic"
        torch.testing.assert_close(marginals.values, exact_kl(Normal(q.mean, q.stddev), Normal(0.0, 1.0)))
