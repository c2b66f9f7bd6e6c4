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


def within(estimate, exact, errors, sigmas=5.0, slack=1e-4):
    """Whether an estimate is where its own standard error says."""
    assert estimate.shape == exact.shape
    assert ((estimate - exact).abs() <= sigmas * errors + slack * (1 + exact.abs())).all(), (estimate, exact, errors)


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


CENTRES, SPREADS, ODDS = torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 1.0]), torch.tensor([0.3, 0.7])


def mixture_model(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(ODDS))
        z = pyro.sample("z", dist.Normal(CENTRES[y], SPREADS[y]))
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
