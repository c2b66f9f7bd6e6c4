"""Likelihoods with Normal noise for constants in nats: a scale for each entry of a datum, and scales with priors."""

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample, pyro_method

from pyro_ilvae import likelihoods


class NormalOfEntries(PyroModule):
    """Normal noise with a scale for each entry, and no more than a likelihood of a user needs."""

    def __init__(self, scales):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.as_tensor(scales).log())

    @property
    def noise_scale(self):
        return self.log_scale.exp()

    def forward(self, eta, x=None):
        return dist.Normal(eta, self.noise_scale)

    def natural_parameters(self, mean):
        return mean

    @pyro_method
    def information_product(self, eta, tangent):
        return tangent / self.noise_scale.square()


def drawn(form="vectorized", spread=0.5):
    """Normal noise whose scale has a prior, for draws one at a time or also side by side."""
    likelihood = likelihoods.Normal(0.5)
    del likelihood.log_scale
    prior = dist.Normal(-1.0, spread)
    likelihood.log_scale = PyroSample(prior.expand([1]).to_event(1) if form == "vectorized" else prior)
    return likelihood
