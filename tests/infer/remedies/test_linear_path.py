"""A linear path beside any decoder: its value, its start, and the decoders and models that take it."""

import copy
import pickle

import pyro
import pytest
import torch
from helpers.decoders import EVENT, LATENT
from helpers.models import TOKENS, X, sequence_encoder, vae_with
from helpers.sequence_decoders import VOCAB
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

from pyro_ilvae import (
    GraphSVI,
    JointOptim,
    MLPDecoder,
    ProjectedDecoder,
    RecurrentHistory,
    SequenceDecoder,
    SequentialVAE,
    likelihoods,
    mlp,
)
from pyro_ilvae.infer.remedies import LinearPath

SIZES = {"latent_dim": LATENT, "event_shape": EVENT, "hidden_features": (16,)}


def network():
    own = nn.Sequential(
        nn.Linear(LATENT, 9), nn.Tanh(), nn.Linear(9, torch.Size(EVENT).numel()), nn.Unflatten(-1, EVENT)
    )
    own.latent_dim, own.event_shape = LATENT, EVENT
    return own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_the_value_by_hand(dtype, context_dim):
    inner = MLPDecoder(**SIZES, context_dim=context_dim).to(dtype)
    decoder = LinearPath(inner)
    z = torch.randn(4, 5, LATENT, dtype=dtype)
    context = [] if context_dim is None else [torch.randn(5, 2, dtype=dtype)]
    weight = decoder.linear_path.weight
    expected = inner(z, *context) + (z @ weight.mT).reshape(4, 5, *EVENT)
    torch.testing.assert_close(decoder(z, *context), expected)
    torch.testing.assert_close(weight.mT @ weight, torch.eye(LATENT, dtype=dtype))
    assert decoder.conditional == (context_dim is not None)
    if context_dim is not None:
        torch.testing.assert_close(decoder.given(context[0][0])(z[0, 0]), expected[0, 0])


def test_zeros_are_the_decoder_itself():
    for inner in (MLPDecoder(**SIZES), network()):
        z = torch.randn(6, LATENT)
        assert torch.equal(LinearPath(inner, start="zeros")(z), inner(z))


@pytest.mark.parametrize("context_dim", [None, 2])
@pytest.mark.parametrize("likelihood", [likelihoods.Normal(0.5), likelihoods.Poisson()])
def test_it_starts_as_a_plain_decoder_with_a_linear_path(context_dim, likelihood):
    x = torch.poisson(torch.rand(30, *EVENT) * 3)
    pyro.set_rng_seed(0)
    plain = MLPDecoder(**SIZES, context_dim=context_dim, linear_path=True)
    inner = MLPDecoder(**SIZES, context_dim=context_dim)
    names = dict(inner.named_parameters())
    inner.load_state_dict({name: value for name, value in plain.state_dict().items() if name in names})
    decoder = LinearPath(inner)
    decoder.linear_path.load_state_dict(plain.linear_path.state_dict())
    z = torch.randn(6, LATENT)
    context = [] if context_dim is None else [torch.randn(6, 2)]
    torch.testing.assert_close(decoder(z, *context), plain(z, *context))
    for own in (plain, decoder):
        own.initialize(x, likelihood, seed=3)
    torch.testing.assert_close(decoder(z, *context), plain(z, *context))


def test_it_starts_in_models_with_contexts():
    context = torch.arange(len(X)) % 2
    values = []
    for linear_path in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        inner = MLPDecoder(**SIZES, context_dim=2, linear_path=linear_path)
        decoder = inner if linear_path else LinearPath(inner)
        vae = vae_with(decoder=decoder, likelihood=likelihoods.Normal(0.5))
        vae.initialize(X, context, seed=3)
        path = decoder.linear_path.weight.detach()
        values.append((path, vae.sample_prior(200, context=0, mean=True, seed=0).mean(0)))
    torch.testing.assert_close(values[0][0], values[1][0])
    own_mean = X[context == 0].mean(0)
    for _, mean in values:
        assert (mean - own_mean).abs().max() < 2


def test_the_start_of_a_users_network_gives_the_data_their_mean():
    own = nn.Sequential(nn.Linear(LATENT, 9), nn.Tanh(), nn.Linear(9, 7))
    own.latent_dim, own.event_shape = LATENT, (7,)
    decoder = LinearPath(own)
    x = torch.randn(50, 7) + 3
    decoder.initialize(x, likelihoods.Normal(0.5), seed=0)
    torch.testing.assert_close(decoder(torch.zeros(1, LATENT))[0], x.mean(0))
    u = decoder.linear_path.weight.norm(dim=0)
    torch.testing.assert_close(u, torch.full_like(u, 0.5))
    network_of_user = network()
    before = copy.deepcopy(network_of_user.state_dict())
    LinearPath(network_of_user).initialize(X, likelihoods.Normal(0.5))
    assert all(torch.equal(value, before[name]) for name, value in network_of_user.state_dict().items())


def test_what_is_refused():
    projected = ProjectedDecoder(mlp(LATENT, (4,), 8), latent_dim=LATENT, event_shape=8, inverse_lipschitz=1.0)
    with pytest.raises(ValueError, match="without an inverse Lipschitz constant, got a ProjectedDecoder"):
        LinearPath(projected)
    with pytest.raises(ValueError, match="attribute latent_dim"):
        LinearPath(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="start"):
        LinearPath(network(), start="typo")
    with pytest.raises(TypeError, match="decoder"):
        LinearPath(vae_with().encoder)


def test_graph_steps_and_copies():
    steps = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        vae = vae_with(decoder=LinearPath(network()))
        more = {} if kind is SVI else {"compile": False}
        svi = kind(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.02}), TraceMeanField_ELBO(), **more)
        losses = torch.tensor([float(svi.step(X)) for _ in range(6)])
        steps.append([losses, *(value.detach() for value in vae.parameters())])
        assert kind is SVI or svi.runs == "graph"
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)
    z = torch.randn(4, LATENT)
    other = LinearPath(network())
    other.load_state_dict(vae.decoder.state_dict())
    for same in (other, copy.deepcopy(vae.decoder), pickle.loads(pickle.dumps(vae.decoder))):
        assert torch.equal(same(z), vae.decoder(z))


def test_a_decoder_of_sequences_takes_it():
    history = RecurrentHistory(VOCAB, embedding_features=4, hidden_features=5)
    inner = MLPDecoder(latent_dim=LATENT, event_shape=VOCAB, context_dim=5, hidden_features=(6,))
    decoder = SequenceDecoder(history, LinearPath(inner))
    vae = SequentialVAE(decoder, sequence_encoder(), end_token=0, max_length=5)
    vae.initialize(TOKENS)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    before = decoder.decoder.linear_path.weight.detach().clone()
    svi.step(TOKENS)
    assert not torch.equal(decoder.decoder.linear_path.weight, before)
