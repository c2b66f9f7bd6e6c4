"""Models whose data are linear in a normal z: probabilistic PCA, a sum of three dimensions, an effect of all data."""

import pyro
import pyro.distributions as dist
import torch
from helpers.latent_structures import NOISE
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

W = torch.tensor([[2.0, 0.0, 0.3], [0.0, 1.0, 0.5]])  # K = 2 to D = 3
LOADING = torch.tensor([1.5, -0.5, 0.0])
SCALE = torch.tensor([0.3, 0.8, 1.0])
N = 60
L = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.3, 1.0]])


def linear_model(x, data_size=None):
    """Probabilistic PCA: x = W^T z + noise, for which everything is Gaussian."""
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)


def exact_guide(x, data_size=None):
    precision = torch.eye(2) + W @ W.mT / NOISE**2
    loc = torch.linalg.solve(precision, W @ x.mT / NOISE**2).mT
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))


def prior_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def sum_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def mean_field_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] * LOADING, SCALE).to_event(1))


def expected_kl(x):
    return exact_kl(Normal(x[:, None] * LOADING, SCALE.expand(len(x), 3)), Normal(0.0, 1.0))


def flow_guide(x):
    with pyro.plate("data", len(x)):
        base = dist.Normal(x[:, None] * LOADING, SCALE).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.LowerCholeskyAffine(torch.zeros(3), L)]))


def global_model(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x):
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
