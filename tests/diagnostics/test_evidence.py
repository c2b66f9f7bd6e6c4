"""The evidence and its bounds, against the exact log likelihood; bits per dimension and perplexity."""

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from helpers.factor_models import (
    NOISE,
    N,
    W,
    exact_guide,
    global_guide,
    global_model,
    linear_model,
    prior_guide,
    sum_model,
)
from helpers.latent_structures import scalar_guide, scalar_model
from pyro.infer import Trace_ELBO
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import bits_per_dimension, evidence, perplexity


@pytest.mark.parametrize("data_size", [None, 1000])
@pytest.mark.parametrize(("batch_size", "samples_per_pass"), [(None, 100), (7, 3)])
def test_evidence_is_exact_at_the_exact_posterior(data_size, batch_size, samples_per_pass):
    x = torch.randn(N, 3)
    covariance = W.mT @ W + NOISE**2 * torch.eye(3)
    marginal = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    bounds = evidence(
        lambda batch: linear_model(batch, data_size),
        lambda batch: exact_guide(batch, data_size),
        x,
        num_samples=10,
        batch_size=batch_size,
        samples_per_pass=samples_per_pass,
    )
    torch.testing.assert_close(bounds.log_likelihood, marginal, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bounds.elbo, marginal, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_standard_errors_of_the_evidence():
    x = torch.randn(8, 3)
    repeats = [evidence(linear_model, prior_guide, x, num_samples=400) for _ in range(200)]
    for value, error in (("elbo", "elbo_standard_errors"), ("log_likelihood", "log_likelihood_standard_errors")):
        spread = torch.stack([getattr(bounds, value) for bounds in repeats]).std(0)
        stated = torch.stack([getattr(bounds, error) for bounds in repeats]).mean(0)
        # The delta method is for many effective draws.
        enough = torch.stack([bounds.effective_sample_sizes for bounds in repeats]).mean(0) > 20
        assert enough.any()
        assert ((spread / stated)[enough] > 0.7).all()
        assert ((spread / stated)[enough] < 1.4).all()
    sizes = evidence(linear_model, exact_guide, x, num_samples=50).effective_sample_sizes
    torch.testing.assert_close(sizes, torch.full((8,), 50.0), rtol=1e-3, atol=0)
    assert evidence(linear_model, exact_guide, x, num_samples=1).elbo_standard_errors.isnan().all()


def test_units_of_the_evidence():
    log_likelihood = torch.tensor([-5.0, -7.0])
    torch.testing.assert_close(bits_per_dimension(log_likelihood, 4), log_likelihood / -4 / math.log(2))
    # Tokens count alike, also where one sequence is longer.
    assert float(perplexity(log_likelihood, torch.tensor([1, 5]))) == pytest.approx(math.exp(2.0))
    with pytest.raises(ValueError, match="num_tokens of the shape"):
        perplexity(log_likelihood, torch.tensor([3]))


def test_bounds_are_ordered_and_tighten():
    x = torch.randn(N, 3)
    covariance = W.mT @ W + NOISE**2 * torch.eye(3)
    marginal = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).mean()
    few = evidence(linear_model, prior_guide, x, num_samples=5)
    many = evidence(linear_model, prior_guide, x, num_samples=5000)
    assert many.elbo.mean() < few.log_likelihood.mean() < many.log_likelihood.mean() < marginal + 0.05
    # Averaging before the log-sum-exp, a mistake that is seen in the wild, would give the ELBO here.
    torch.testing.assert_close(many.log_likelihood.mean(), marginal, atol=0.05, rtol=0)
    elbo = -Trace_ELBO(num_particles=5000, vectorize_particles=True).loss(linear_model, prior_guide, x) / N
    assert float(many.elbo.mean()) == pytest.approx(elbo, abs=0.2)


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evidence(global_model, global_guide, X, batch_size=2), r"batch_size=None where data share .*\['a'"),
        (lambda: evidence(sum_model, lambda x: None, X), "latent site of the model in the guide, .* got none for 'z'"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_likelihood_is_not_the_mean_of_logarithms():
    x = torch.linspace(-2, 2, 5)
    bounds = evidence(scalar_model, scalar_guide, x, num_samples=20000)
    exact = Normal(0.0, 2**0.5).log_prob(x)
    elbo = exact - exact_kl(Normal(0.4 * x, 0.8), Normal(0.5 * x, 0.5**0.5))
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    assert_within(bounds.elbo, elbo, bounds.elbo_standard_errors)
    assert (exact - elbo > 5 * bounds.log_likelihood_standard_errors).all()
