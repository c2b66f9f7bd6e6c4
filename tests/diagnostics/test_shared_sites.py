"""The diagnostics on models with sites that all data share, against closed forms."""

import pytest
import torch
from helpers.estimates import assert_errors_are_right, assert_within, compared
from helpers.latent_structures import exact_shared_guide, shared_guide, shared_log_marginal, shared_model
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import evidence, kl_divergence, kl_per_dimension


def test_evidence_of_all_data_together():
    x = torch.randn(6)
    bounds = evidence(shared_model, exact_shared_guide, x, num_samples=5)
    assert bounds.elbo.shape == (1,)
    torch.testing.assert_close(bounds.log_likelihood, shared_log_marginal(x)[None])
    torch.testing.assert_close(bounds.elbo, shared_log_marginal(x)[None])
    rough = evidence(shared_model, shared_guide, x, num_samples=50000, samples_per_pass=5000)
    assert_within(rough.log_likelihood, shared_log_marginal(x)[None], rough.log_likelihood_standard_errors)


@pytest.mark.slow
def test_kl_of_shared_and_local_sites():
    x = torch.randn(6)
    shared = exact_kl(Normal(0.4, 0.6), Normal(0.0, 1.0))[None]
    a = kl_divergence(shared_model, shared_guide, x, site="a")
    assert a.estimator == "analytic"
    assert_within(*compared(a, shared))
    torch.testing.assert_close(kl_per_dimension(shared_model, shared_guide, x, site="a").values, shared)
    local = exact_kl(Normal(0.5 * x + (0.3 - 1) * 0.4, 0.6), Normal(0.0, 1.0)) + 0.5 * 0.49 * 0.36
    assert_within(*compared(kl_divergence(shared_model, shared_guide, x, site="z", num_samples=2000), local))
    assert_within(*compared(kl_per_dimension(shared_model, shared_guide, x, site="z", batch_size=4), local))
    total = kl_divergence(shared_model, shared_guide, x, num_samples=5000)
    assert_within(*compared(total, shared + local.sum()))
    with pytest.raises(ValueError, match="batch_size=None"):
        kl_divergence(shared_model, shared_guide, x, batch_size=3)
    assert_errors_are_right(
        lambda seed: tuple(kl_divergence(shared_model, shared_guide, x, num_samples=40, seed=seed)[::2]), 120, 0.3
    )
