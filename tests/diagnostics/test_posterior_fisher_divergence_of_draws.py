"""The relative Fisher divergence of the true posterior from the prior, from draws of MCMC."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import within
from helpers.fisher_models import (
    LINE,
    NOISE,
    TALL,
    LinearGaussian,
    X,
    grid_divergence,
    mixture_densities,
    mixture_model,
    nested_exact,
    nested_guide,
    nested_model,
    scalar_guide,
    scalar_model,
    shared_exact,
    shared_model,
    shared_posterior,
)
from pyro import poutine
from pyro.infer import MCMC, NUTS

from pyro_ilvae.diagnostics import posterior_fisher_divergence
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence_of_draws import posterior_fisher_divergence_of_draws


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: posterior_fisher_divergence_of_draws(scalar_model, {"z": torch.zeros(5, 3)}, LINE),
            ValueError,
            r"'z' of shape \(5, 4\), got \(5, 3\)",
        ),
        (
            lambda: posterior_fisher_divergence_of_draws(scalar_model, {"z": torch.zeros(5, 4, 1)}, LINE),
            ValueError,
            r"'z' of shape \(5, 4\)",
        ),
        (
            lambda: posterior_fisher_divergence_of_draws(scalar_model, {"z": torch.full((5, 4), math.nan)}, LINE),
            ValueError,
            "draws of site 'z' to be finite",
        ),
        (lambda: posterior_fisher_divergence_of_draws(scalar_model, {}, LINE), ValueError, "draws of one number >= 1"),
        (
            lambda: posterior_fisher_divergence_of_draws(
                scalar_model, {"z": torch.zeros(5, 4), "y": torch.zeros(5, 4)}, LINE
            ),
            ValueError,
            "got 'y'",
        ),
        (
            lambda: posterior_fisher_divergence_of_draws(scalar_model, {"z": torch.zeros(5, 4)}, LINE, num_chains=2),
            ValueError,
            "num_chains to divide",
        ),
        (
            lambda: posterior_fisher_divergence_of_draws(shared_model, {"a": torch.zeros(5)}, LINE),
            ValueError,
            "none for 'z'",
        ),
        (
            lambda: posterior_fisher_divergence_of_draws(
                shared_model, {"a": torch.zeros(5), "z": torch.zeros(5, 4)}, LINE, sites=["a"]
            ),
            ValueError,
            "site 'a' in a plate",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_draws_of_the_exact_posterior():
    linear = LinearGaussian(TALL)
    draws = dist.MultivariateNormal(linear.mean(X), linear.covariance).sample((500,))
    result = posterior_fisher_divergence_of_draws(linear.model, {"z": draws}, X, batch_size=4, samples_per_pass=33)
    within(result.values, linear.divergence(X)[0], result.standard_errors)
    scores = (X - draws @ TALL.mT) @ TALL / NOISE**2
    squares = scores.square().sum(-1)
    torch.testing.assert_close(result.values, squares.mean(0), rtol=1e-4, atol=1e-4)
    plain = squares.std(0) / 500**0.5
    assert ((result.standard_errors / plain - 1).abs() < 0.4).all()


def test_standard_errors_know_of_autocorrelation():
    correlation, steps, copies = 0.9, 1000, 60
    noise = torch.randn(steps, copies)
    chain = [torch.randn(copies)]
    for step in noise[1:]:
        chain.append(correlation * chain[-1] + (1 - correlation**2) ** 0.5 * step)
    x = torch.ones(copies)
    draws = x / 2 + 0.5**0.5 * torch.stack(chain)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = posterior_fisher_divergence_of_draws(model, {"z": draws}, x)
    within(result.values.mean(), torch.tensor(0.75), result.values.std() / copies**0.5)
    spread = result.values.std()
    assert 0.7 * spread < result.standard_errors.square().mean().sqrt() < 1.4 * spread
    # As if independent, the error would be less than half of that.
    assert (result.effective_sample_sizes < steps / 4).all()
    halves = posterior_fisher_divergence_of_draws(model, {"z": draws}, x, num_chains=2)
    torch.testing.assert_close(halves.values, result.values)
    assert not torch.equal(halves.effective_sample_sizes, result.effective_sample_sizes)


def test_draws_with_shared_sites_and_nested_plates():
    x = torch.randn(5)
    loc, variance = shared_posterior(x)
    a = loc + variance**0.5 * torch.randn(800)
    z = (a[:, None] + x) / 2 + 0.5**0.5 * torch.randn(800, 5)
    for batch_size in (None, 2):
        result = posterior_fisher_divergence_of_draws(shared_model, {"a": a, "z": z}, x, batch_size=batch_size)
        within(result.values, shared_exact(x), result.standard_errors)

    x = torch.randn(5, 2, 4)
    guide_trace = poutine.trace(nested_guide).get_trace(x)
    draws = guide_trace.nodes["z"]["fn"].sample((400,))
    result = posterior_fisher_divergence_of_draws(nested_model, {"z": draws}, x, batch_size=2, plate="data")
    within(result.values, nested_exact(x), result.standard_errors)


def test_draws_without_the_discrete_site():
    x = torch.tensor([0.3])
    log_joint, log_prior = mixture_densities(x[0])
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = log_joint(grid).logsumexp(-1).exp()
    draws = grid[torch.multinomial(density, 2000, replacement=True)].float()[:, None]
    result = posterior_fisher_divergence_of_draws(mixture_model, {"z": draws}, x)
    exact, *_ = grid_divergence(lambda z: log_joint(z).logsumexp(-1), lambda z: log_prior(z).logsumexp(-1))
    within(result.values, torch.tensor([exact]), result.standard_errors)


@pytest.mark.slow
def test_draws_of_nuts_agree_with_the_guide():
    x = torch.tensor([0.5, 2.0])
    mcmc = MCMC(NUTS(scalar_model), num_samples=100, warmup_steps=40, disable_progbar=True)
    mcmc.run(x)
    draws = posterior_fisher_divergence_of_draws(scalar_model, mcmc.get_samples(), x)
    weighted = posterior_fisher_divergence(scalar_model, scalar_guide, x, num_samples=2000, seed=0)
    within(draws.values, weighted.values, (draws.standard_errors**2 + weighted.standard_errors**2).sqrt())


def test_few_draws_and_one_datum():
    result = posterior_fisher_divergence_of_draws(scalar_model, {"z": torch.zeros(1, 1)}, torch.ones(1))
    assert result.values.tolist() == [0.0]
    assert result.standard_errors.isnan().all()
    still = posterior_fisher_divergence_of_draws(scalar_model, {"z": torch.zeros(10, 1)}, torch.zeros(1))
    assert still.standard_errors.tolist() == [0.0]


def test_the_random_state_stays_as_it_was():
    draws, state = {"z": torch.randn(6, 4)}, torch.get_rng_state()
    first = posterior_fisher_divergence_of_draws(scalar_model, draws, LINE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    torch.testing.assert_close(posterior_fisher_divergence_of_draws(scalar_model, draws, LINE), first)
