"""The mutual information of data and latent variable by quadrature, and decoders with coordinates to compare with."""

import math
from typing import NamedTuple

import torch


class Information(NamedTuple):
    value: float  #: in nats
    error: float  #: its standard error: x is drawn, z is summed out


@torch.no_grad()
def information(decoder, sigma, prior, *, num_data=1500, reach=6.0, nodes=161):
    """I(x; z) = E log p(x | z) - E log p(x), with p(x) a sum over a grid of z.

    ``sigma`` is a number or has the shape of a datum, and ``prior`` has its mass within ``reach`` of the origin.
    """
    latent_dim = prior.event_shape[0]
    axis = torch.linspace(-reach, reach, nodes, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)
    like = next(decoder.parameters())
    flat_scale = torch.as_tensor(sigma, dtype=torch.float64).flatten()

    def images(z):
        return decoder(z.to(like)).double().flatten(1) / flat_scale

    weights = prior.log_prob(grid.to(like)).double() + latent_dim * (axis[1] - axis[0]).log()
    assert abs(float(weights.exp().sum()) - 1) < 1e-3, "the grid has to hold the prior"
    z = prior.sample((num_data,)).double()
    noise = torch.randn_like(images(z))
    targets, values = images(grid), []
    for x, own in zip((images(z) + noise).split(100), noise.split(100), strict=True):
        joint = weights - torch.cdist(x, targets, compute_mode="use_mm_for_euclid_dist").square() / 2
        values.append(-own.square().sum(1) / 2 - joint.logsumexp(1))
    found = torch.cat(values)
    return Information(float(found.mean()), float(found.std()) / math.sqrt(num_data))


@torch.no_grad()
def information_on_the_line(decoder, sigma):
    """I(x; z) = h(x) - h(x | z) for one number each and z from N(0, 1), by quadrature over both."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weights = torch.distributions.Normal(0.0, 1.0).log_prob(z).softmax(0)
    images = decoder(z[:, None].to(next(decoder.parameters()))).double()[:, 0]
    x = torch.linspace(float(images.min()) - 9 * sigma, float(images.max()) + 9 * sigma, 4001, dtype=torch.float64)
    density = torch.distributions.Normal(images, sigma).log_prob(x[:, None]).exp() @ weights
    entropy = torch.special.entr(density).sum() * (x[1] - x[0])
    return float(entropy) - 0.5 * math.log(2 * math.pi * math.e * sigma**2)


@torch.no_grad()
def information_of_coordinate(decoder, sigma, prior, j, *, num_data=1500):
    """I(z_j; x | z_-j), with p(x | z_-j) a sum over a grid of z_j."""
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    z = prior.sample((num_data,)).double()
    noise = torch.randn(num_data, decoder(z[:1]).numel(), dtype=torch.float64)
    line = z[:, None].expand(-1, len(axis), -1).clone()
    line[..., j] = axis
    weights = prior.log_prob(line).log_softmax(1)
    errors = (decoder(z).flatten(1)[:, None] - decoder(line).flatten(2)) / sigma + noise[:, None]
    joint = weights - errors.square().sum(-1) / 2
    found = -noise.square().sum(1) / 2 - joint.logsumexp(1)
    return Information(float(found.mean()), float(found.std()) / math.sqrt(num_data))


class Frame(torch.nn.Module):
    """The linear map f(z) = Q A z, whose coordinates are A z."""

    def __init__(self, matrix, features, *, symmetric=False):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)
        self.frame = torch.linalg.qr(torch.randn(features, len(matrix), dtype=matrix.dtype)).Q
        self.latent_dim, self.event_shape = len(matrix), torch.Size([features])
        self.inverse_lipschitz = float(torch.linalg.svdvals(matrix)[-1])
        self.coordinate_constant = self.inverse_lipschitz if symmetric else None

    def forward(self, z):
        return z @ self.matrix.mT @ self.frame.mT

    def coordinates(self, y):
        return y @ self.frame


class Whitened(torch.nn.Module):
    """S f for a decoder f with coordinates P and scales S of the features: its coordinates are s P S^-1.

    s is the geometric mean of the scales.
    """

    def __init__(self, decoder, scale):
        super().__init__()
        self.decoder, self.scale, self.unit = decoder, scale, scale.log().mean().exp()
        self.latent_dim, self.event_shape = decoder.latent_dim, decoder.event_shape
        self.channel_constant = float(decoder.inverse_lipschitz * self.unit)
        self.coordinate_constant = self.channel_constant
        self.inverse_lipschitz = float(decoder.inverse_lipschitz * scale.min())

    def forward(self, z):
        return self.scale * self.decoder(z)

    def coordinates(self, y):
        return self.decoder.coordinates(self.unit * y / self.scale)
