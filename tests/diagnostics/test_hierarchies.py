"""The diagnostics on models with several latent sites, against closed forms."""

import pytest
import torch
from helpers.estimates import assert_errors_are_right, assert_within, compared
from helpers.latent_structures import chain_guide, chain_joint_kl, chain_model, exact_chain_guide, reversed_chain_guide
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import active_units, evidence, kl_divergence, kl_per_dimension


@pytest.mark.parametrize("guide", [chain_guide, reversed_chain_guide])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_joint_kl_of_a_hierarchy(guide, batch_size):
    x = torch.randn(7)
    kl = kl_divergence(chain_model, guide, x, num_samples=3000, batch_size=batch_size)
    assert_within(*compared(kl, chain_joint_kl(guide, x)))
    parts = [kl_divergence(chain_model, guide, x, site=site, num_samples=3000) for site in ("z1", "z2")]
    errors = sum(part.standard_errors for part in parts)
    assert_within(parts[0].values + parts[1].values, chain_joint_kl(guide, x), errors)


def test_kl_of_one_site_of_a_hierarchy():
    x = torch.randn(7)
    gap = (0.5 - 0.4 * 0.3) * x
    expected = exact_kl(Normal(gap, 0.5), Normal(torch.zeros(7), 0.6)) + 0.5 * (0.4 * 0.9 / 0.6) ** 2
    for measure in (kl_divergence, kl_per_dimension):
        kl = measure(chain_model, chain_guide, x, site="z1", num_samples=2000)
        assert_within(*compared(kl, expected))
        top = measure(chain_model, chain_guide, x, site="z2", num_samples=3)
        assert top.estimator == "analytic"
        torch.testing.assert_close(top.values, exact_kl(Normal(0.3 * x, 0.9), Normal(0.0, 1.0)))
    units = active_units(chain_model, chain_guide, x, site="z1", num_samples=5000)
    assert abs(units.variances - 0.62**2 * x.var()) < 0.05


def test_kl_of_a_site_that_the_guide_draws_in_another_order():
    # Its prior depends on a site that the guide draws after it: no formula for the mean of the log ratio.
    x = torch.randn(7)
    kl = kl_divergence(chain_model, reversed_chain_guide, x, site="z1", num_samples=3000)
    assert kl.estimator == "sampled"
    joint = MultivariateNormal(torch.zeros(2), torch.tensor([[0.25, 0.1], [0.1, 0.4**2 * 0.25 + 0.49]]))
    # E log q(z1) - E log p(z1 | z2), with z1 - 0.8 z2 of this mean and variance.
    weights = torch.tensor([1.0, -0.8])
    mean = x * (0.5 - 0.8 * 0.4)
    variance = weights @ joint.covariance_matrix @ weights
    expected = -Normal(0.0, 0.5).entropy() + 0.5 * (mean**2 + variance) / 0.36 + torch.tensor(0.6).log() + 0.9189385
    assert_within(*compared(kl, expected))


@pytest.mark.slow
@pytest.mark.parametrize("guide", [chain_guide, reversed_chain_guide])
def test_standard_errors_of_divergences(guide):
    x = torch.randn(6)

    def call(seed, site):
        kl = kl_divergence(chain_model, guide, x, site=site, num_samples=50, seed=seed)
        return kl.values, kl.standard_errors

    for site in (None, "z1"):
        assert_errors_are_right(lambda seed, site=site: call(seed, site))


def test_evidence_of_a_hierarchy():
    x = torch.randn(7)
    exact = Normal(0.0, 1.25**0.5).log_prob(x)
    torch.testing.assert_close(evidence(chain_model, exact_chain_guide, x, num_samples=3).log_likelihood, exact)
    for guide in (chain_guide, reversed_chain_guide):
        bounds = evidence(chain_model, guide, x, num_samples=20000)
        assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
        expected = -chain_joint_kl(guide, x) + _expected_log_likelihood(guide, x)
        assert_within(bounds.elbo, expected, bounds.elbo_standard_errors)


def _expected_log_likelihood(guide, x):
    loc, variance = ((0.5 + 0.12) * x, 0.25 + 0.16 * 0.81) if guide is chain_guide else (0.5 * x, torch.tensor(0.25))
    return Normal(loc, 0.5).log_prob(x) - 0.5 * variance / 0.25
