"""Likelihoods: their distributions, their supports and what data they refuse."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods

ETA = torch.linspace(-2, 2, 8)
EXPECTED = {
    "normal": (likelihoods.Normal(0.3), dist.Normal(ETA, 0.3)),
    "bernoulli": (likelihoods.Bernoulli(), dist.Bernoulli(probs=torch.sigmoid(ETA))),
    "continuous_bernoulli": (likelihoods.ContinuousBernoulli(), dist.ContinuousBernoulli(torch.sigmoid(ETA))),
    "poisson": (likelihoods.Poisson(), dist.Poisson(ETA.exp())),
    "negative_binomial": (likelihoods.NegativeBinomial(3.0), dist.NegativeBinomial(3.0, torch.sigmoid(ETA))),
    "categorical": (likelihoods.Categorical(4), dist.Categorical(ETA.reshape(2, 4).softmax(-1))),
}
BAD = {
    "normal": ([float("nan")], "1 NaN or infinite values"),
    "bernoulli": ([0.5], "from 0.5 to 0.5; binarise the data or use ContinuousBernoulli"),
    "continuous_bernoulli": ([-3.0, 255.0], "2 values outside it, from -3 to 255; divide intensities"),
    "poisson": ([-1.0, 1.5], "2 values outside it, from -1 to 1.5"),
    "negative_binomial": ([-2.0], "from -2 to -2"),
    "categorical": ([4.0, -1.0], "from -1 to 4"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_is_the_stated_distribution(name):
    likelihood, expected = EXPECTED[name]
    distribution = likelihood(ETA.reshape(expected.batch_shape + (4,) * (name == "categorical")))
    x = expected.sample()
    torch.testing.assert_close(distribution.log_prob(x), expected.log_prob(x), rtol=1e-4, atol=1e-5)
    mean = likelihoods.expectation(distribution)
    torch.testing.assert_close(mean, expected.probs if name == "categorical" else expected.mean)


@pytest.mark.parametrize("name", EXPECTED)
def test_accepts_its_own_draws_and_names_the_site_of_others(name):
    likelihood, expected = EXPECTED[name]
    likelihoods.check_support(likelihood, expected.sample((20,)), "x")
    values, message = BAD[name]
    with pytest.raises(ValueError, match=f"data at site 'pixels'.*{message}"):
        likelihoods.check_support(likelihood, torch.tensor(values), "pixels")
    with pytest.raises(ValueError, match="Expected finite data at site 'x'"):
        likelihoods.check_support(likelihood, torch.tensor([0.0, float("inf")]), "x")


def fit_noise(estimate, steps=300, batch_size=20):
    """Normal noise of scale 0.5 around a constant, which the decoder's bias can fit."""
    x = 0.5 * torch.randn(200, 4)
    likelihood = likelihoods.Normal(2.0, estimate)
    vae = VAE(MLPDecoder(1, 4, (4,)), MLPEncoder(4, 1, (4,)), likelihood, data_size=len(x))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for step in range(steps):
        svi.step(x[(step * batch_size) % 200 :][:batch_size])
    return vae, svi, x


@pytest.mark.parametrize("estimate", ["learned", "optimal"])
def test_scale_finds_the_noise(estimate):
    vae, _, _ = fit_noise(estimate)
    assert 0.35 < vae.likelihood.scale.item() < 0.65


def test_fixed_scale_stays():
    vae, _, _ = fit_noise("fixed", steps=5)
    assert math.isclose(vae.likelihood.scale.item(), 2.0, rel_tol=1e-6)


def test_optimal_scale_is_the_root_mean_square_error_of_the_batch():
    likelihood = likelihoods.Normal(1.0, "optimal")
    eta, x = torch.randn(2, 10, 4)
    distribution = likelihood(eta, x)
    torch.testing.assert_close(distribution.scale[0, 0], (x - eta).square().mean().sqrt())
    torch.testing.assert_close(likelihood.scale, (x - eta).square().mean().sqrt())


def test_optimal_scale_is_not_moved_by_evaluation():
    vae, svi, x = fit_noise("optimal", steps=20)
    before = vae.likelihood.log_scale.clone()
    svi.evaluate_loss(x)
    vae.reconstruct(x)
    vae.eval()
    vae.likelihood(torch.zeros(3, 4), x[:3])
    assert torch.equal(vae.likelihood.log_scale, before)


def test_optimal_scale_is_a_running_average_without_a_graph():
    likelihood = likelihoods.Normal(1.0, "optimal")
    logs = []
    for scale in (1.0, 3.0):
        eta = torch.zeros(1000, requires_grad=True)
        x = scale * torch.randn(1000)
        likelihood(eta, x)
        logs.append(x.square().mean().log() / 2)
    torch.testing.assert_close(likelihood.log_scale, logs[0] + 0.05 * (logs[1] - logs[0]))
    assert not likelihood.log_scale.requires_grad


def test_optimal_scale_survives_a_step_that_is_refused():
    likelihood = likelihoods.Normal(1.0, "optimal")
    likelihood(torch.zeros(4), torch.ones(4))
    before = likelihood.scale.item()
    with pyro.validation_enabled(False):
        likelihood(torch.full((4,), float("nan")), torch.ones(4))
    assert likelihood.scale.item() == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: likelihoods.Normal(0.0), "scale to be a finite number > 0"),
        (lambda: likelihoods.Normal(1.0, "free"), "'fixed', 'learned' or 'optimal', got 'free'"),
        (lambda: likelihoods.NegativeBinomial(-1.0), "total_count to be a finite number > 0"),
        (lambda: likelihoods.NegativeBinomial(1.0, "optimal"), "'fixed' or 'learned'"),
        (lambda: likelihoods.Categorical(0), "num_categories"),
        (lambda: likelihoods.Categorical(3)(torch.zeros(2, 4)), r"Expected eta of shape \(..., 3\)"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
