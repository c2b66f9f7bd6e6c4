"""Models and guides by the structure of their latent sites, with what is known of them in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence


def data_plate(x, dim=-1, full_size=None):
    return pyro.plate("data", full_size or len(x), subsample=torch.arange(len(x)), dim=dim)


# One site: z -> x.


def scalar_model(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scalar_guide(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(0.4 * x, 0.8))


# A chain: z2 -> z1 -> x, all scalars.


def chain_model(x):
    with data_plate(x, full_size=10 * len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.6))
        pyro.sample("x", dist.Normal(z1, 0.5), obs=x)


def chain_guide(x):
    with data_plate(x, full_size=10 * len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.3 * x, 0.9))
        pyro.sample("z1", dist.Normal(0.5 * x + 0.4 * z2, 0.5))


def reversed_chain_guide(x):
    with data_plate(x, full_size=10 * len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.5 * x, 0.5))
        pyro.sample("z2", dist.Normal(0.2 * x + 0.4 * z1, 0.7))


def exact_chain_guide(x):
    # z1 | x, then z2 | z1: the other order than that of the model.
    with data_plate(x, full_size=10 * len(x)):
        z1 = pyro.sample("z1", dist.Normal(x / 1.25, (0.25 / 1.25) ** 0.5))
        pyro.sample("z2", dist.Normal(0.8 * z1, 0.6))


def linear_gaussian(first_loc, first_scale, slope, offset, second_scale):
    """The joint Gaussian of u ~ N(first) and v | u ~ N(offset + slope u, second_scale), in the order (u, v)."""
    covariance = torch.tensor(
        [
            [first_scale**2, slope * first_scale**2],
            [slope * first_scale**2, slope**2 * first_scale**2 + second_scale**2],
        ]
    )
    return MultivariateNormal(torch.stack([first_loc, offset + slope * first_loc], -1), covariance)


def chain_joint_kl(guide, x):
    zero = torch.zeros_like(x)
    prior = linear_gaussian(zero, 1.0, 0.8, zero, 0.6)  # (z2, z1)
    if guide is chain_guide:
        return kl_divergence(linear_gaussian(0.3 * x, 0.9, 0.4, 0.5 * x, 0.5), prior)
    posterior = linear_gaussian(0.5 * x, 0.5, 0.4, 0.2 * x, 0.7)  # (z1, z2)
    flipped = MultivariateNormal(posterior.mean.flip(-1), posterior.covariance_matrix.flip(-1, -2))
    return kl_divergence(flipped, prior)


# An effect of all data and one of each: a -> z_n -> x_n.

NOISE = 0.7


def shared_model(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def shared_guide(x):
    a = pyro.sample("a", dist.Normal(0.4, 0.6))
    with data_plate(x):
        pyro.sample("z", dist.Normal(0.5 * x + 0.3 * a, 0.6))


def exact_shared_guide(x):
    variance = 1 + NOISE**2
    precision = 1 + len(x) / variance
    a = pyro.sample("a", dist.Normal(x.sum() / variance / precision, precision**-0.5))
    with data_plate(x):
        pyro.sample("z", dist.Normal((a * NOISE**2 + x) / variance, NOISE / variance**0.5))


def shared_log_marginal(x):
    return MultivariateNormal(torch.zeros(len(x)), torch.ones(()) + (1 + NOISE**2) * torch.eye(len(x))).log_prob(x)


# Plates in plates: z_n -> w_nm -> x_nm, with w and x of two entries.


def nested(data_dim, full_size=None):
    """Model and guide with the plate over the data at ``data_dim`` and another beside it."""

    def plates(x):
        return data_plate(x, data_dim, full_size), pyro.plate("inner", x.shape[1], dim=-3 - data_dim)

    def placed(x):
        return x if data_dim == -2 else x.transpose(0, 1)

    def column(values):
        return values[:, None] if data_dim == -2 else values

    def model(x):
        data, inner = plates(x)
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with inner:
                w = pyro.sample("w", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(w, 0.5).to_event(1), obs=placed(x))

    def guide(x):
        data, inner = plates(x)
        with data:
            z = pyro.sample("z", dist.Normal(column(x.mean((1, 2))), 0.4))
            with inner:
                pyro.sample("w", dist.Normal(0.7 * placed(x) + 0.1 * z[..., None], 0.3).to_event(1))

    return model, guide


def nested_log_marginal(x):
    size = x[0].numel()
    return MultivariateNormal(torch.zeros(size), torch.ones(()) + 1.25 * torch.eye(size)).log_prob(x.flatten(1))


def nested_kl(x):
    """The divergences of z, of shape (N,), and of each entry of w given z in the mean, (N, M, 2)."""
    loc = x.mean((1, 2))
    # The means differ by 0.7 x + (0.1 - 1) z.
    gap = (0.7 * x - 0.9 * loc[:, None, None]).square() + 0.81 * 0.16
    w = 0.5 * (0.09 + gap - 1) - math.log(0.3)
    return kl_divergence(Normal(loc, 0.4), Normal(0.0, 1.0)), w


# Mixtures of two Gaussians.

WEIGHTS = torch.tensor([0.3, 0.7])
CENTERS = torch.tensor([-1.0, 2.0])


def mixture_model(x):
    with data_plate(x, full_size=10 * len(x)):
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(CENTERS[y], 0.7), obs=x)


def responsibilities(x, scale=0.7):
    return (WEIGHTS.log() + Normal(CENTERS, scale).log_prob(x[..., None])).softmax(-1)


def exact_mixture_guide(x):
    with data_plate(x, full_size=10 * len(x)):
        pyro.sample("y", dist.Categorical(responsibilities(x)))


def rough_mixture_guide(x):
    with data_plate(x, full_size=10 * len(x)):
        pyro.sample("y", dist.Categorical(logits=torch.stack([-x, 0.5 * x], -1)))


def empty_guide(x):
    pass


def mixture_log_marginal(x, scale=0.7):
    return (WEIGHTS.log() + Normal(CENTERS, scale).log_prob(x[..., None])).logsumexp(-1)


def gmvae_model(x):
    with data_plate(x):
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(CENTERS[y], 0.8))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def gmvae_guide(x):
    with data_plate(x):
        y = pyro.sample("y", dist.Categorical(responsibilities(x, 1.2)))
        pyro.sample("z", dist.Normal(0.6 * x + 0.3 * CENTERS[y], 0.6))


def gmvae_guide_without_y(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(0.7 * x, 0.8))
