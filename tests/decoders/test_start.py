"""The start from data: where a decoder begins, from what form of the data, and what it leaves alone."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.decoders import perturb
from helpers.noise import NormalOfEntries
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from pyro_ilvae import (
    InverseLipschitzDecoder,
    MLPDecoder,
    Nats,
    ProjectedDecoder,
    likelihoods,
    mlp,
    principal_frame,
)

LATENT, EVENT = 3, (4, 3)
FEATURES = 12
SIZES = {"latent_dim": LATENT, "event_shape": EVENT}
DECODERS = {
    "plain": lambda **options: MLPDecoder(**SIZES | {"hidden_features": (8,)} | options),
    "plain-linear": lambda **options: MLPDecoder(**SIZES | {"hidden_features": (8,), "linear_path": True} | options),
    "projected": lambda **options: ProjectedDecoder(
        options.pop("backbone", None) or mlp(LATENT, (8,), FEATURES), **SIZES | {"map_features": (8,)} | options
    ),
    "composition": lambda **options: InverseLipschitzDecoder(**SIZES | {"map_features": (8,)} | options),
}
FRAMED = ["projected", "composition"]
DISPERSIONS = torch.linspace(0.5, 5.0, FEATURES).reshape(EVENT)


def factors(num_data=200, seed=0):
    """Numbers that vary in three directions, the most in the first, and a little in the others."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(FEATURES, LATENT, generator=generator)).Q
    z = torch.randn(num_data, LATENT, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    noise = 0.1 * torch.randn(num_data, FEATURES, generator=generator)
    return (z @ directions.T + noise).reshape(num_data, *EVENT)


def of_kind(name, num_data=200):
    """A likelihood and data of it; some entries are at the limit of their range in all data."""
    logits = factors(num_data)
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    binary = (uniform < logits.sigmoid()).float()
    binary[:, 0, 0] = 0.0
    counts = torch.poisson(logits.clamp(max=3).exp(), generator=torch.Generator().manual_seed(2))
    counts[:, 0, 0] = 0.0
    return {
        "normal": lambda: (likelihoods.Normal(0.3), logits + 5),
        "bernoulli": lambda: (likelihoods.Bernoulli(), binary),
        "continuous-bernoulli": lambda: (likelihoods.ContinuousBernoulli(), logits.sigmoid()),
        "poisson": lambda: (likelihoods.Poisson(), counts),
        "negative-binomial": lambda: (likelihoods.NegativeBinomial(3.0), counts),
        "negative-binomial-of-entries": lambda: (likelihoods.NegativeBinomial(DISPERSIONS), counts),
        "zero-inflated-poisson": lambda: (likelihoods.ZeroInflatedPoisson(0.3), counts * (uniform > 0.3)),
        "zero-inflated-negative-binomial": lambda: (
            likelihoods.ZeroInflatedNegativeBinomial(DISPERSIONS, 0.3),
            counts * (uniform > 0.3),
        ),
        "categorical": lambda: (likelihoods.Categorical(EVENT[-1]), logits.argmax(-1)),
    }[name]()


COUNTS = [
    "poisson",
    "negative-binomial",
    "negative-binomial-of-entries",
    "zero-inflated-poisson",
    "zero-inflated-negative-binomial",
]
LIKELIHOODS = ["normal", "bernoulli", "continuous-bernoulli", *COUNTS, "categorical"]


def smoothed_mean(name, x):
    """The mean of the data with one datum more, in the middle of its range."""
    n = len(x)
    if name == "normal":
        return x.double().mean(0)
    if name == "categorical":
        return (torch.nn.functional.one_hot(x, EVENT[-1]).double().sum(0) + 1 / EVENT[-1]) / (n + 1)
    return (x.double().sum(0) + 0.5) / (n + 1)


def mean_over_prior(decoder, *context, count=100_000):
    with torch.no_grad():
        return decoder(torch.randn(count, LATENT, dtype=decoder(torch.zeros(LATENT), *context).dtype), *context).mean(0)


# Where it starts.


@pytest.mark.parametrize("likelihood_name", LIKELIHOODS)
@pytest.mark.parametrize("name", DECODERS)
def test_mean_over_the_prior_is_the_mean_of_the_data(name, likelihood_name):
    likelihood, x = of_kind(likelihood_name)
    decoder = DECODERS[name]()
    decoder.initialize(x, likelihood, seed=0)
    expected = likelihood.natural_parameters(smoothed_mean(likelihood_name, x)).detach().float()
    assert expected.isfinite().all()
    torch.testing.assert_close(mean_over_prior(decoder), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("likelihood_name", LIKELIHOODS)
@pytest.mark.parametrize("name", [*FRAMED, "plain-linear"])
def test_directions_are_the_principal_ones(name, likelihood_name):
    likelihood, x = of_kind(likelihood_name)
    decoder = DECODERS[name]()
    decoder.initialize(x, likelihood, seed=0)
    matrix = decoder.linear_path.weight if name == "plain-linear" else decoder.frame.matrix
    flat = (torch.nn.functional.one_hot(x, EVENT[-1]) if likelihood_name == "categorical" else x).flatten(1)
    flat = flat.double()
    noise = torch.ones(FEATURES).double()
    if likelihood_name in COUNTS:
        # Of data in units of their noise, taken to log rates: I(b)^-1 times the score, if I and noise are of one datum.
        b = likelihood.natural_parameters(smoothed_mean(likelihood_name, x).float()).detach()
        noise = likelihood(b).variance.flatten().double().sqrt()
    expected = np.linalg.svd(((flat - flat.mean(0)) / noise.detach()).numpy())[2][:LATENT].T
    if likelihood_name in COUNTS:
        information = likelihood.smallest_information(b).flatten().detach().double().sqrt()
        expected = np.linalg.qr(expected / information[:, None].numpy())[0]
    matrix = torch.nn.functional.normalize(matrix.detach().double(), dim=0)
    overlap = np.abs(matrix.numpy().T @ expected)
    np.testing.assert_allclose(overlap, np.eye(LATENT), atol=1e-3)


@pytest.mark.parametrize("name", FRAMED)
def test_a_frame_that_was_given_stays(name):
    likelihood, x = of_kind("normal")
    given_frame = torch.linalg.qr(torch.randn(FEATURES, LATENT)).Q
    for frame in (given_frame, "identity"):
        decoder = DECODERS[name](frame=frame)
        before = decoder.coordinates(x)
        decoder.initialize(x, likelihood, seed=0)
        assert torch.equal(decoder.coordinates(x), before)
        torch.testing.assert_close(mean_over_prior(decoder), x.mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize("likelihood_name", LIKELIHOODS)
@pytest.mark.parametrize("name", FRAMED)
@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_constant_and_inequality_after_a_start(name, likelihood_name, constant):
    likelihood, x = of_kind(likelihood_name)
    decoder = DECODERS[name](inverse_lipschitz=constant)
    decoder.initialize(x, likelihood, seed=0)
    decoder = perturb(decoder.double(), 0.5)
    assert decoder.inverse_lipschitz == pytest.approx(constant)
    z, other = torch.randn(2, 100, LATENT, dtype=torch.float64)
    ratio = (decoder(z) - decoder(other)).flatten(1).norm(dim=1) / (z - other).norm(dim=1)
    assert (ratio >= constant * (1 - 1e-9)).all()


@pytest.mark.parametrize("likelihood_name", LIKELIHOODS)
def test_the_map_starts_at_the_size_of_the_noise(likelihood_name):
    likelihood, x = of_kind(likelihood_name)
    decoder = DECODERS["projected"](inverse_lipschitz=0.0)
    decoder.initialize(x, likelihood, seed=0)
    with torch.no_grad():
        spread = decoder.map(torch.randn(2000, LATENT)).std(0).square().mean().sqrt()
    q = decoder.frame.matrix
    b = likelihood.natural_parameters(smoothed_mean(likelihood_name, x)).detach().float()
    information = likelihood.information_product(b, q.T.reshape(LATENT, *EVENT)).flatten(1)
    unit = float((torch.trace(information @ q).detach() / LATENT) ** -0.5)
    # Where the data vary by less than the noise, their own variation is the size.
    assert 0.05 * unit < spread < 1.5 * unit


@pytest.mark.parametrize("likelihood_name", [name for name in LIKELIHOODS if name != "normal"])
@pytest.mark.parametrize("name", FRAMED)
def test_the_unit_of_reference_nats_becomes_that_of_the_data(name, likelihood_name):
    likelihood, x = of_kind(likelihood_name)
    decoder = DECODERS[name](inverse_lipschitz=Nats(0.5, likelihood))
    decoder.initialize(x, likelihood, seed=0)
    b = likelihood.natural_parameters(smoothed_mean(likelihood_name, x)).detach().float()
    eye = torch.eye(FEATURES).reshape(FEATURES, *EVENT)
    information = likelihood.information_product(b, eye).reshape(FEATURES, FEATURES).detach()
    unit = math.sqrt(float(information.trace() / (information @ information).trace()))
    exact = likelihood_name != "categorical"  # otherwise by 64 probes
    assert decoder.inverse_lipschitz == pytest.approx(math.sqrt(math.expm1(1.0)) * unit, rel=1e-4 if exact else 0.1)
    assert decoder.nats == 0.5


def test_nats_of_normal_noise_stay():
    likelihood, x = of_kind("normal")
    decoder = DECODERS["composition"](inverse_lipschitz=Nats(0.5, likelihood))
    before = decoder.inverse_lipschitz
    decoder.initialize(x, likelihood)
    assert decoder.inverse_lipschitz == before
    with pytest.raises(ValueError, match="Expected likelihood to be a Normal, as in inverse_lipschitz, got Bernoulli"):
        decoder.initialize((x > 5).float(), likelihoods.Bernoulli())


def test_with_a_scale_for_each_entry_the_frame_is_that_of_the_scaled_data():
    scales = torch.logspace(-2, 2, FEATURES).reshape(EVENT)
    x = factors() * scales + 7
    likelihood = NormalOfEntries(scales)
    for name in FRAMED:
        decoder = DECODERS[name](inverse_lipschitz=Nats(0.5, likelihood))
        decoder.initialize(x, likelihood, seed=0)
        overlap = decoder.frame.matrix.T @ principal_frame(factors(), LATENT)
        torch.testing.assert_close(overlap.abs(), torch.eye(LATENT), rtol=0, atol=1e-3)
        distance = (mean_over_prior(decoder) - x.mean(0)) / scales
        assert distance.abs().max() < 0.1
    # Where the data vary by less than the noise, the map starts at half their variation, in units of the scales.
    decoder = DECODERS["projected"](inverse_lipschitz=Nats(0.0, likelihood))
    decoder.initialize(0.01 * factors() * scales, likelihood, seed=0)
    with torch.no_grad():
        spread = decoder.map(torch.randn(2000, LATENT)).std(0).square().mean().sqrt()
    variation = (0.01 * factors()).flatten(1) @ principal_frame(factors(), LATENT)
    assert float(spread) == pytest.approx(0.5 * float(variation.var(0).mean().sqrt()), rel=0.3)


# From what.


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("likelihood_name", ["normal", "bernoulli", "categorical"])
def test_batches_in_every_form_give_the_same_start(name, likelihood_name):
    likelihood, x = of_kind(likelihood_name)
    forms = {
        "whole": x,
        "list": list(x.split(7)),
        "generator": (batch for batch in x.split(64)),
        "loader": DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=30),
        "tuples": [(batch, None) for batch in x.split(50)],
        "with an empty batch": [x[:0], x, x[:0]],
        "array": x.numpy(),
    }
    decoder = DECODERS[name]()
    states = {}
    for form, data in forms.items():
        other = copy.deepcopy(decoder)
        other.initialize(data, likelihood, seed=0)
        states[form] = other.state_dict()
    for state in states.values():
        for key, value in state.items():
            torch.testing.assert_close(value, states["whole"][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_data_of_other_dtypes(name, dtype):
    likelihood, x = of_kind("bernoulli")
    decoder = DECODERS[name]()
    other = copy.deepcopy(decoder)
    decoder.initialize(x, likelihood, seed=0)
    other.initialize(x.to(dtype), likelihood, seed=0)
    for key, value in decoder.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_in_double_precision(name):
    likelihood, x = of_kind("normal")
    decoder = DECODERS[name]().double()
    decoder.initialize(x, likelihood, seed=0)
    assert all(value.dtype == torch.float64 for value in decoder.parameters())
    torch.testing.assert_close(mean_over_prior(decoder).float(), x.mean(0), rtol=0, atol=0.1)


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3, 4), (7, 2)])
def test_events_of_all_shapes(shape):
    features = math.prod(shape)
    k = min(2, features)
    x = torch.randn(50, *shape) + 3
    for decoder in (
        MLPDecoder(latent_dim=2, event_shape=shape, hidden_features=(4,), linear_path=True),
        ProjectedDecoder(mlp(k, (4,), features), latent_dim=k, event_shape=shape),
        InverseLipschitzDecoder(latent_dim=k, event_shape=shape, map_features=(4,)),
    ):
        decoder.initialize(x, likelihoods.Normal(), seed=0)
        with torch.no_grad():
            mean = decoder(torch.randn(20_000, decoder.latent_dim)).mean(0)
        torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=0.15)


def test_one_category_for_each_datum():
    x = torch.tensor([0, 0, 0, 1, 1, 2] * 20)
    decoder = ProjectedDecoder(mlp(2, (4,), 4), latent_dim=2, event_shape=4, frame="centered")
    for data in (x, [x[:50], x[50:]], DataLoader(TensorDataset(x), batch_size=16)):
        other = copy.deepcopy(decoder)
        other.initialize(data, likelihoods.Categorical(4), seed=0)
        with torch.no_grad():
            mean = other(torch.randn(50_000, 2)).mean(0)
        expected = likelihoods.Categorical(4).natural_parameters(torch.tensor([60.25, 40.25, 20.25, 0.25]) / 121)
        torch.testing.assert_close(mean - mean.mean(), expected, rtol=0, atol=0.1)


# Few data, and data that vary little.


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("likelihood_name", LIKELIHOODS)
@pytest.mark.parametrize("form", ["one datum", "two data", "constant"])
def test_data_with_few_directions(name, likelihood_name, form):
    likelihood, x = of_kind(likelihood_name)
    x = {"one datum": x[:1], "two data": x[:2], "constant": x[:1].repeat(1000, *[1] * (x.dim() - 1))}[form]
    frame = {"frame": "centered"} if likelihood_name == "categorical" and name in FRAMED else {}
    decoder = DECODERS[name](**frame)
    decoder.initialize(x, likelihood, seed=0)
    expected = likelihood.natural_parameters(smoothed_mean(likelihood_name, x)).detach().float()
    torch.testing.assert_close(
        mean_over_prior(decoder), expected, rtol=0, atol=0.15 + 0.02 * float(expected.abs().max())
    )
    assert all(value.isfinite().all() for value in decoder.parameters())
    if name in FRAMED:
        q = decoder.frame.matrix.double()
        torch.testing.assert_close(q.T @ q, torch.eye(LATENT).double(), rtol=0, atol=1e-5)
        if frame:
            assert q.reshape(*EVENT, LATENT).sum(1).abs().max() < 1e-5
    if name == "plain-linear":
        found = decoder.linear_path.weight.square().sum(0)
        rank = torch.linalg.matrix_rank((x - x[0]).flatten(1).float())
        assert (found > 0).tolist() == (torch.arange(LATENT) < rank).tolist()


def test_the_unit_of_constant_data_is_not_one():
    likelihood = likelihoods.Poisson()
    decoder = DECODERS["projected"](inverse_lipschitz=Nats(0.5, likelihood))
    decoder.initialize(torch.full((50, *EVENT), 100.0), likelihood, seed=0)
    assert decoder._nats.unit == pytest.approx(0.1, rel=0.01)


def test_a_constant_that_is_not_a_sum_of_powers_of_two_does_not_vary():
    decoder = DECODERS["plain-linear"]()
    decoder.initialize(torch.full((997, *EVENT), 0.1, dtype=torch.float64), likelihoods.Normal())
    assert (decoder.linear_path.weight == 0).all()
    with pytest.raises(ValueError, match="varies in at least 1 directions, got 0"):
        principal_frame(torch.full((997, 5), 0.1, dtype=torch.float64), 1)
    # A variation of a float's last digit is one.
    x = torch.full((1000, 5), 0.1)
    x[::2, 3] += 1e-8
    assert principal_frame(x, 1)[3] == 1


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_a_centered_frame_for_data_that_are_not_categories(seed, rank):
    """Whose largest variation may be the shift of all categories, which a centered frame leaves out."""
    torch.manual_seed(seed)
    x = 10 * torch.randn(100, 1) + torch.randn(100, rank) @ torch.randn(rank, FEATURES)
    decoder = DECODERS["projected"](frame="centered")
    decoder.initialize(x.reshape(100, *EVENT), likelihoods.Normal(0.1), seed=0)
    q = decoder.frame.matrix.double()
    assert q.reshape(*EVENT, LATENT).sum(1).abs().max() < 1e-5
    torch.testing.assert_close(q.T @ q, torch.eye(LATENT).double(), rtol=0, atol=1e-5)
    sets = x.reshape(100, *EVENT) - x.reshape(100, *EVENT).mean(-1, keepdim=True)
    variance = (sets - sets.mean(0)).flatten(1) @ decoder.frame.matrix
    best = torch.linalg.svdvals((sets - sets.mean(0)).flatten(1))[:LATENT]
    torch.testing.assert_close(variance.norm(dim=0), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("likelihood_name", ["normal", "bernoulli"])
def test_as_many_latent_as_data_dimensions(likelihood_name):
    likelihood, x = of_kind(likelihood_name)
    for decoder in (
        ProjectedDecoder(mlp(FEATURES, (4,), FEATURES), latent_dim=FEATURES, event_shape=EVENT),
        InverseLipschitzDecoder(latent_dim=FEATURES, event_shape=EVENT, map_features=(8,)),
        MLPDecoder(latent_dim=FEATURES + 2, event_shape=EVENT, hidden_features=(8,), linear_path=True),
    ):
        decoder.initialize(x, likelihood, seed=0)
        with torch.no_grad():
            mean = decoder(torch.randn(20_000, decoder.latent_dim)).mean(0)
        expected = likelihood.natural_parameters(smoothed_mean(likelihood_name, x)).detach().float()
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.2)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_normalized_last_layer_is_left_alone(norm):
    layers = [torch.nn.Linear(LATENT, 8), torch.nn.Softplus()]
    for module in (torch.nn.utils, torch.nn.utils.parametrizations):
        last = getattr(module, norm)(torch.nn.Linear(8, FEATURES))
        decoder = DECODERS["projected"](backbone=torch.nn.Sequential(*layers, last))
        decoder.initialize(factors(), likelihoods.Normal(0.3), seed=0)
        assert decoder(torch.randn(5, LATENT)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int64, torch.float16])
def test_counts_of_any_dtype(dtype):
    likelihood, x = of_kind("poisson")
    starts = []
    for data in (x, x.to(dtype), x.to(dtype).numpy()):
        decoder = DECODERS["plain-linear"]()
        for parameter in decoder.parameters():
            torch.nn.init.zeros_(parameter)
        decoder.initialize(data, likelihood, seed=0)
        starts.append(decoder(torch.ones(1, LATENT)))
    for start in starts[1:]:
        torch.testing.assert_close(start, starts[0])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("shape", [(FEATURES + 1,), EVENT[::-1]])
def test_refuses_scales_of_another_shape_than_the_data(name, shape):
    with pytest.raises(ValueError, match="Expected scale of the shape of a datum"):
        DECODERS[name]().initialize(factors(), likelihoods.Normal(torch.ones(shape)))
