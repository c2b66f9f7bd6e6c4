"""Normal posteriors that the data name themselves, whose mutual information is known by quadrature."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import Normal

from pyro_ilvae.diagnostics import mutual_information

GRID = torch.linspace(-30.0, 30.0, 8_001, dtype=torch.float64)
STANDARD = Normal(0.0, 1.0)
N = 40
SMALL = torch.tensor([[-2.0, 0.3], [-0.5, 0.6], [0.0, 1.0], [0.3, 0.2], [1.0, 0.5], [2.5, 0.1]])


def quadrature(locs, scales, log_prior=STANDARD.log_prob):
    """Mutual information, KL of the mixture from the prior, and mean KL, for Normal posteriors of a scalar."""
    locs, scales = locs.detach().double(), scales.detach().double()
    log_q = Normal(locs, scales).log_prob(GRID[:, None])
    log_mixture = log_q.logsumexp(1) - math.log(len(locs))
    log_p = log_prior(GRID)
    information = torch.trapezoid(log_q.exp() * (log_q - log_mixture[:, None]), GRID, dim=0).mean()
    aggregate = torch.trapezoid(log_mixture.exp() * (log_mixture - log_p), GRID)
    mean = torch.trapezoid(log_q.exp() * (log_q - log_p[:, None]), GRID, dim=0).mean()
    return float(information), float(aggregate), float(mean)


def scalar_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[..., 0]), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[..., 0])


def scalar_guide(x):
    """A datum is the mean and the standard deviation of its posterior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], x[:, 1]))


def estimate(x, **options):
    return mutual_information(scalar_model, scalar_guide, x, **options)


def gaussian_data(n=N, scale=0.7):
    """The exact posteriors of z ~ N(0, 1), x ~ N(z, variance) at draws from that model."""
    variance = scale**2 / (1 - scale**2)
    draws = torch.randn(n) * math.sqrt(1 + variance)
    return torch.stack([draws / (1 + variance), torch.full((n,), scale)], -1)


def vector_model(x):
    with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1] // 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=z.detach())


def vector_guide(x):
    with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(*x.chunk(2, 1)).to_event(1))
