"""The diagnostics of models with networks: the package's VAE, and weights with a prior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from helpers.latent_structures import data_plate
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae import VAE, MLPEncoder, ProjectedDecoder, likelihoods, mlp
from pyro_ilvae.diagnostics import evidence, kl_per_dimension


def test_vae_of_the_package():
    x = torch.rand(23, 6)
    vae = VAE(
        ProjectedDecoder(mlp(2, (8,), 6), latent_dim=2, event_shape=6, inverse_lipschitz=0.7),
        MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(8,)),
        likelihoods.Normal(1.0),
        data_size=1000,
    )
    loc, scale = vae.encode(x)
    kl = kl_per_dimension(vae.model, vae.guide, x, batch_size=10)
    torch.testing.assert_close(kl.values, exact_kl(Normal(loc, scale), Normal(0.0, 1.0)), rtol=1e-4, atol=1e-5)
    bounds = evidence(vae.model, vae.guide, x, batch_size=10, num_samples=5000)
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 241)] * 2)
    with torch.no_grad():
        log_lik = Normal(vae.decoder(grid), 1.0).log_prob(x[:, None]).sum(-1)
    log_joint = log_lik + Normal(0.0, 1.0).log_prob(grid).sum(-1)
    assert_within(
        bounds.log_likelihood, log_joint.logsumexp(-1) + 2 * math.log(0.05), bounds.log_likelihood_standard_errors, 1e-3
    )


@pytest.mark.slow
def test_random_weights():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](1, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y):
            mean = self.linear(x[:, None]).squeeze(-1)
            with data_plate(x):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def guide(x, y):
        pyro.sample("linear.weight", dist.Normal(torch.full((1, 1), 0.3), 0.6).to_event(2))
        pyro.sample("linear.bias", dist.Normal(torch.zeros(1), 0.9).to_event(1))

    x, y = torch.randn(2, 6)
    model = Regression()
    covariance = x[:, None] * x + 1 + 0.25 * torch.eye(6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(y)[None]
    bounds = evidence(model, guide, (x, y), num_samples=1000)
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    kl = kl_per_dimension(model, guide, (x, y), site="linear.weight")
    torch.testing.assert_close(kl.values, exact_kl(Normal(0.3, 0.6), Normal(0.0, 1.0)).reshape(1, 1, 1))
