"""The start from data with covariates: directions beyond them, their effects, and what goes with them."""

import pytest
import torch
from helpers.decoders import EVENT, LATENT

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    MixtureVAE,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    likelihoods,
)

N, C = 10, 6
SIZES = {"latent_dim": LATENT, "event_shape": EVENT}
X = torch.randn(N, *EVENT, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(N, C, generator=torch.Generator().manual_seed(1))


def encoder(**options):
    return MLPEncoder(**SIZES, hidden_features=(8,), **{"context_dim": C} | options)


def plain(**options):
    return MLPDecoder(**SIZES, hidden_features=(8,), **{"context_dim": C} | options)


def vae(decoder=None, own_encoder=None):
    decoder = decoder or ProjectedDecoder(plain(), **SIZES, context_dim=C, map_features=(8,))
    return VAE(decoder, own_encoder or encoder(), likelihoods.Normal(0.5, "learned"))


def refused(call, message):
    with pytest.raises((ValueError, TypeError), match=f"Expected.*{message}"):
        call()


def test_start_from_data_leaves_to_the_context_what_it_explains():
    """Without the context the leading direction is the one of the labels, with it the one of z."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 2)).Q.T
    labels, z = torch.randint(0, 2, (2000,)), torch.randn(2000)
    x = 5 * labels[:, None] * directions[0] + z[:, None] * directions[1] + 0.1 * torch.randn(2000, 8)
    sizes = {"latent_dim": 1, "event_shape": 8, "context_dim": 2}
    decoder = ProjectedDecoder(MLPDecoder(**sizes), **sizes)
    model = VAE(decoder, MLPEncoder(**sizes, hidden_features=(8,)), likelihoods.Normal(0.1))
    model.initialize(x, labels)
    column = decoder.frame.embed(torch.ones(1)).detach()
    assert abs(column @ directions[1]) > 0.99
    assert abs(column @ directions[0]) < 0.1


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("name", ["Normal", "Poisson", "Bernoulli"])
def test_start_from_data_is_at_the_mean_of_each_label_in_the_directions_of_z(name, embedded):
    torch.manual_seed(0)
    likelihood, labels = getattr(likelihoods, name)(), torch.randint(0, 3, (6000,))
    direction = torch.ones(8) / 8**0.5
    eta = torch.randn(3, 8)[labels] + 1.5 * torch.randn(6000, 1) * direction
    x = likelihood(eta).sample()
    sizes = {"latent_dim": 1, "event_shape": 8, "context_dim": 3}
    decoder = ProjectedDecoder(MLPDecoder(**sizes), **sizes)
    network = torch.nn.Embedding(3, 3) if embedded else None
    model = VAE(decoder, MLPEncoder(**sizes), likelihood, context_network=network)
    model.initialize(x, labels, seed=0)
    contexts = torch.eye(3) if network is None else network.weight
    with torch.no_grad():
        start = torch.stack([decoder(torch.randn(4000, 1), context).mean(0) for context in contexts])
        means = torch.stack([likelihood.natural_parameters(x[labels == label].mean(0)) for label in range(3)])
        expected = decoder.coordinates(means - means.mean(0))
        error = decoder.coordinates(start - start.mean(0)) - expected
    assert expected.abs().max() > 0.3  # the labels do differ in this direction
    assert error.abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("build", ["plain", "plain-linear", "projected", "composition"])
def test_start_from_data_is_at_their_mean_over_contexts(build):
    torch.manual_seed(0)
    context = 20 + 3 * torch.randn(3000, 2)  # far from 0, where no datum is
    x = context @ torch.randn(2, 8) + 0.3 * torch.randn(3000, 8)
    sizes = {"latent_dim": 2, "event_shape": 8, "context_dim": 2}
    decoder = {
        "plain": lambda: MLPDecoder(**sizes),
        "plain-linear": lambda: MLPDecoder(**sizes, linear_path=True),
        "projected": lambda: ProjectedDecoder(MLPDecoder(**sizes), **sizes),
        "composition": lambda: InverseLipschitzDecoder(**sizes, map_features=(16,)),
    }[build]()
    model = VAE(decoder, MLPEncoder(**sizes), likelihoods.Normal(0.3))
    model.initialize(x, context, seed=0)
    with torch.no_grad():
        start = decoder(torch.randn(4000, 2), context.mean(0)).mean(0)
    torch.testing.assert_close(start, x.mean(0), rtol=0, atol=0.3)
    assert (x.mean(0)).abs().max() > 10


def test_components_start_in_the_units_of_the_mean_context():
    """A plain decoder moves by another amount per unit of z at a context that no datum has."""
    torch.manual_seed(0)
    x, context = 0.1 * torch.randn(500, *EVENT), 50 + torch.randn(500, C)
    model = MixtureVAE(plain(), encoder(), likelihoods.Normal(0.5), 3)
    model.initialize(x, context, seed=0)
    start = model.decoder._start_of(x, model.likelihood, 0)
    z = torch.randn(20_000, LATENT)
    with torch.no_grad():
        moved = model.decoder(z, context.mean(0)).flatten(1).var(0).sum() / LATENT
    expected = start.extent / max(start.extent, moved.sqrt().item())
    assert model.component_log_scale.exp().mean().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["Bernoulli", "Categorical"])
def test_start_with_offsets_that_go_with_the_labels(name, seed):
    torch.manual_seed(seed)
    labels, event_shape = torch.arange(60) % 3, (4, 3) if name == "Categorical" else (4,)
    likelihood = likelihoods.Categorical(3) if name == "Categorical" else likelihoods.Bernoulli()
    offset = (labels.reshape(-1, *(1,) * len(event_shape)) + 2 * torch.randn(60, *event_shape)).float()
    x = likelihood(offset).sample()
    sizes = {"latent_dim": 2, "event_shape": event_shape, "context_dim": 3}
    encoder = MLPEncoder(event_shape=4, latent_dim=2, context_dim=3, takes_mask=True)
    model = VAE(ProjectedDecoder(MLPDecoder(**sizes), **sizes), encoder, likelihood)
    mask = torch.ones(60, 4, dtype=torch.bool)
    mask[:, 2] = False  # a feature that no datum has
    for arguments in ({"offset": offset}, {"mask": mask}, {"offset": offset, "mask": mask}):
        model.initialize(x, labels, **arguments)
        assert all(parameter.isfinite().all() for parameter in model.decoder.parameters())


@pytest.mark.parametrize("name", ["offset", "mask"])
def test_batches_of_a_start_have_the_same_arguments(name):
    model = vae(own_encoder=encoder(takes_mask=True))
    value = torch.zeros(5) if name == "offset" else torch.rand(5, *EVENT) > 0.3
    first, second = {"x": X[:5], "context": CONTEXT[:5]}, {"x": X[5:], "context": CONTEXT[5:]}
    for batches in ([first | {name: value}, second], [first, second | {name: value}]):
        refused(lambda batches=batches: model.initialize(batches), f"{name} in each batch of x or in none")
    without = vae(plain(context_dim=None), encoder(context_dim=None, takes_mask=True))
    batches = [{"x": X[:5]}, {"x": X[5:], name: value}]
    refused(lambda: without.initialize(batches), f"{name} in each batch of x or in none")
    refused(lambda: without.encode([{"x": X, "offest": value}]), "each batch to have x and other arguments among")
