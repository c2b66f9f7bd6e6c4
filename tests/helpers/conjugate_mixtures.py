"""Mixtures whose guide is the posterior: Normal noise around a latent variable of two dimensions."""

import math

import torch

from pyro_ilvae import MixtureVAE, likelihoods


class Datum(torch.nn.Module):
    """What Normal noise around z says about z: the datum, and the scale of the noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x):
        return x, torch.full_like(x, self.noise)


def conjugate(noise=0.5, prior_scale=1.0, num_components=3, encoder=None, dtype=torch.float32, **options):
    """x = z + noise, whose guide is the posterior."""
    encoder = encoder or Datum(noise)
    options = {"latent_dim": 2, "event_shape": 2, "weights": "learned"} | options
    mixture = MixtureVAE(
        torch.nn.Identity(), encoder, num_components=num_components, likelihood=likelihoods.Normal(noise), **options
    )
    torch.nn.init.normal_(mixture.component_logits)
    torch.nn.init.normal_(mixture.component_log_scale, std=0.1)
    with torch.no_grad():
        mixture.to(dtype).component_log_scale.add_(math.log(prior_scale))
        mixture.likelihood.log_scale.fill_(math.log(noise))
    return mixture
