"""Models for the tests of Fisher divergences whose posteriors are known, and what is known of them."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

N, NOISE = 6, 0.7
SQUARE = torch.diag(torch.tensor([1.5, 2.0, 3.0])) @ torch.linalg.qr(torch.arange(9.0).reshape(3, 3).sin()).Q
X = torch.linspace(-2.0, 2.0, 3 * N).reshape(N, 3).sin() * 2


class Linear(nn.Module):
    """A linear decoder, whose constant is the smallest singular value of its weight."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)
        self.latent_dim, self.event_shape = weight.shape[1], torch.Size(weight.shape[:1])
        self.inverse_lipschitz = float(torch.linalg.matrix_norm(weight, -2))

    def forward(self, z):
        return z @ self.weight.mT


class LinearGaussian(nn.Module):
    """x = W z + noise with z ~ N(0, I), its exact posterior, and what follows from it."""

    def __init__(self, weight, widen=1.0, shift=0.0):
        super().__init__()
        self.decoder = Linear(weight)
        self.precision = torch.eye(weight.shape[1]) + weight.mT @ weight / NOISE**2
        self.covariance = torch.linalg.inv(self.precision)
        self.widen, self.shift = widen, shift

    def mean(self, x):
        return x @ self.decoder.weight @ self.covariance / NOISE**2

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.decoder.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), NOISE).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = self.mean(x) + self.shift
            pyro.sample("z", dist.MultivariateNormal(loc, self.widen**2 * self.covariance))

    def divergence(self, x):
        """E ||W^T s||^2 and E ||s||^2 with s = (x - W z) / noise^2."""
        weight = self.decoder.weight
        residual = x - self.mean(x) @ weight.mT
        spread = weight @ self.covariance @ weight.mT
        divergence = (residual @ weight).square().sum(-1) + (weight.mT @ spread @ weight).trace()
        return divergence / NOISE**4, (residual.square().sum(-1) + spread.trace()) / NOISE**4


def normal_pair(q, p):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", p)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


def scalar_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.exp(), 1.0), obs=x)


def scalar_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 4, 1.0))


CENTERS, SPREADS, ODDS = torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.3, 0.7])


def mixture_model(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(ODDS))
        z = pyro.sample("z", dist.Normal(CENTERS[y], SPREADS[y]))
        pyro.sample("x", dist.Normal(z * (1.0 + y), 1.0), obs=x)


def chain_model(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(a, 0.5).expand_by([]))
        pyro.sample("x", dist.Normal(a * z, 1.0), obs=x)


def shared_model(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_posterior(x):
    """Mean and variance of a given all data; each x has the variance 2 given a."""
    precision = 1 + len(x) / 2
    return x.sum() / 2 / precision, 1 / precision


def shared_guide(x):
    loc, variance = shared_posterior(x)
    a = pyro.sample("a", dist.Normal(loc, variance**0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((a + x) / 2, 0.5**0.5))


TALL = torch.tensor([[2.0, 0.0], [0.3, 1.0], [0.0, 0.5]])
LINE = torch.linspace(-1.0, 1.0, 4)


def dirichlet_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def dirichlet_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Dirichlet(2 * torch.ones(3)))


def auto(build, model):
    guide = build(model)
    guide(torch.ones(4))
    return guide


def grid_divergence(log_joint, log_prior, low=-12.0, high=12.0, points=20001):
    """F, the posterior mean and the KL divergence of p(z | x) from p(z) on a grid of a scalar z."""
    z = torch.linspace(low, high, points, dtype=torch.float64, requires_grad=True)
    log_likelihood = log_joint(z) - log_prior(z)
    score = torch.autograd.grad(log_likelihood.sum(), z)[0]
    with torch.no_grad():
        density = log_joint(z).exp()
        density = density / torch.trapezoid(density, z)
        prior = log_prior(z)
        kl = torch.trapezoid(torch.xlogy(density, density) - density * prior, z)
        return [float(value) for value in (torch.trapezoid(density * score**2, z), torch.trapezoid(density * z, z), kl)]


def nested_model(x):
    with pyro.plate("data", len(x), dim=-3), pyro.plate("part", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("pixel", x.shape[-1], dim=-1):
            pyro.sample("x", dist.Normal(z.sum(-1), NOISE), obs=x)


def nested_guide(x):
    gain = x.shape[-1] / NOISE**2
    with pyro.plate("data", len(x), dim=-3), pyro.plate("part", 2, dim=-2):
        loc = (gain / (1 + 2 * gain) * x.mean(-1, keepdim=True)).unsqueeze(-1).expand(-1, -1, -1, 2)
        precision = torch.eye(2) + gain
        pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))


def nested_exact(x):
    # Each part sees z_1 + z_2 = t only, with t ~ N(0, 2), and both coordinates have the same score.
    gain = x.shape[-1] / NOISE**2
    loc, variance = 2 * gain * x.mean(-1) / (1 + 2 * gain), 2 / (1 + 2 * gain)
    return (2 * gain**2 * ((x.mean(-1) - loc) ** 2 + variance)).sum(-1)


def mixture_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.StudentT(6.0, x / 2, 1.0))


def mixture_densities(datum):
    """log p(x, z, y) and log p(z, y), each of shape (..., 2), at z."""

    def log_prior(z):
        return dist.Normal(CENTERS.double(), SPREADS.double()).log_prob(z[:, None]) + ODDS.double().log()

    def log_joint(z):
        return log_prior(z) + dist.Normal(z[:, None] * torch.tensor([1.0, 2.0]), 1.0).log_prob(datum.double())

    return log_joint, log_prior


def shared_exact(x):
    loc, variance = shared_posterior(x)
    return ((x - loc) / 2) ** 2 + variance / 4 + 0.5
