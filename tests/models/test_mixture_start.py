"""Where the components of a mixture start: in the units of z that L implies, and spread as the data are."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import DECODERS, EVENT, INVERSE_LIPSCHITZ_DECODERS, LATENT
from helpers.models import FORMS, X, mixture_with
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.nn import PyroParam, PyroSample
from torch import nn

from pyro_ilvae import InverseLipschitzDecoder, MixtureVAE, MLPDecoder, MLPEncoder, Nats, likelihoods

MANY = 5000  # components, so that a root mean square over them and K = 3 dimensions is within 3 percent
COMPONENTS = ("component_loc", "component_log_scale")


def mixture_of(decoder, likelihood=None, num_components=MANY, **options):
    encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,))
    return MixtureVAE(decoder, encoder, likelihood or likelihoods.Normal(0.5), num_components, **options)


def data(scale, num_data=400):
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    return scale * torch.randn(num_data, *EVENT, generator=generator) + 7.0


def rms(values):
    return values.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
@pytest.mark.parametrize("constant", [0.0, 0.5, 4.0, 25.0])
def test_a_new_component_is_about_one_unit_of_data_wide(name, constant):
    mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS[name](constant))
    reach = 1 / max(1.0, constant)
    assert rms(mixture.component_loc) == pytest.approx(reach, rel=0.03)
    torch.testing.assert_close(mixture.component_log_scale.exp().data, torch.full((MANY, LATENT), reach))


def test_the_constant_may_be_in_nats_or_absent():
    likelihood = likelihoods.Normal(20.0, "learned")
    decoder = InverseLipschitzDecoder(latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=Nats(0.5, likelihood))
    mixture = mixture_of(decoder, likelihood)
    assert decoder.inverse_lipschitz > 20
    assert rms(mixture.component_log_scale.exp()) == pytest.approx(1 / decoder.inverse_lipschitz, rel=1e-5)
    assert rms(mixture_of(DECODERS["plain"]()).component_log_scale) == 0
    bare = mixture_of(nn.Linear(LATENT, 8), latent_dim=LATENT, event_shape=8)
    assert rms(bare.component_log_scale) == 0


def test_the_new_start_draws_as_one_of_unit_scale_does():
    torch.manual_seed(5)
    expected = torch.randn(4, LATENT)
    decoder = INVERSE_LIPSCHITZ_DECODERS["projected-mlp"](4.0)
    torch.manual_seed(5)
    encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,))
    torch.manual_seed(5)
    mixture = MixtureVAE(decoder, encoder, likelihoods.Normal(0.5), 4)
    torch.testing.assert_close(mixture.component_loc.data, expected / 4)


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
@pytest.mark.parametrize("constant", [8.0, 25.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_decoded_components_are_spread_as_the_data(name, constant, scale, dtype):
    """Where z from N(0, I) would be spread wider than the data."""
    x = data(scale).to(dtype)
    mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS[name](constant), likelihoods.Normal(scale)).to(dtype)
    mixture.initialize(x, seed=1)
    assert {parameter.dtype for parameter in mixture.parameters()} == {dtype}
    decoder = mixture.decoder
    spread = rms(decoder.coordinates(x - x.mean(0)))
    decoded = decoder.coordinates(decoder(mixture.component_loc))
    # A map whose slope is not the same everywhere spreads them a bit more or less than its mean slope would.
    assert rms(decoded - decoded.mean(0)) == pytest.approx(spread, rel=0.15)
    scales = mixture.component_log_scale.exp()
    assert rms(scales) == pytest.approx(rms(mixture.component_loc), rel=1e-5)
    assert mixture.component_loc.mean(0).abs().max() < 1e-5 * rms(scales)
    assert rms(scales - scales.mean()) < 1e-6


@pytest.mark.parametrize("name", DECODERS)
def test_components_are_no_wider_than_a_unit_of_z(name):
    """Where z from N(0, I) is spread less than the data: a decoder's start says little about where its slope ends."""
    decoder = DECODERS[name]() if name.startswith("plain") else DECODERS[name](0.0)
    mixture = mixture_of(decoder)
    mixture.initialize(data(100.0), seed=1)
    assert rms(mixture.component_loc) == pytest.approx(1.0, rel=0.03)
    assert rms(mixture.component_log_scale) == 0


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_a_linear_decoder_has_the_spread_in_closed_form(scale):
    """f(z) = b + u W z, with orthonormal columns W, has the noise unit as its slope, here 0.5."""
    decoder = MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(4,), linear_path=True)
    mixture = mixture_of(decoder)
    x = data(scale)
    mixture.initialize(x, seed=0)
    values = torch.linalg.svdvals((x - x.mean(0)).flatten(1).double())[:LATENT]
    expected = min(1.0, (values.square().mean() / len(x)).sqrt().item() / 0.5)
    # The slope is an average over 1,000 draws of 3 numbers.
    assert rms(mixture.component_log_scale.exp()) == pytest.approx(expected, rel=5 * (2 * 3000) ** -0.5)


@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        (likelihoods.Bernoulli(), torch.arange(80).reshape(10, *EVENT) % 3 == 0),
        (likelihoods.Poisson(), torch.arange(80).reshape(10, *EVENT) % 7),
        (likelihoods.NegativeBinomial(), torch.arange(80).reshape(10, *EVENT) % 7),
        (likelihoods.ZeroInflatedPoisson(), torch.arange(80).reshape(10, *EVENT) % 7),
        (likelihoods.ZeroInflatedNegativeBinomial(), torch.arange(80).reshape(10, *EVENT) % 7),
    ],
    ids=["Bernoulli", "Poisson", "NegativeBinomial", "ZeroInflatedPoisson", "ZeroInflatedNegativeBinomial"],
)
def test_other_likelihoods_have_their_spread_in_natural_parameters(likelihood, x):
    """A tenth of L is ten times the reach, once L is what z can be told apart by."""
    reaches = []
    for constant in (100.0, 1000.0):
        mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS["projected-identity"](constant), likelihood, 2)
        mixture.initialize(x.to(torch.get_default_device()), seed=0)
        reaches.append(rms(mixture.component_log_scale.exp()))
    assert 0 < reaches[0] < 1
    assert reaches[0] == pytest.approx(10 * reaches[1], rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_fixes_the_start_and_nothing_else(form):
    mixture = mixture_with(form, weights="learned")
    other = copy.deepcopy(mixture)
    state = torch.get_rng_state()
    mixture.initialize(X, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    other.initialize(iter(X.split(5)), seed=7)  # an iterator is read once
    for name, value in mixture.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), value, msg=name)
    before = mixture.component_loc.clone()
    mixture.initialize(X, seed=8)
    assert not torch.equal(mixture.component_loc, before)
    assert torch.equal(mixture.component_logits, torch.zeros(3))


@pytest.mark.parametrize("form", FORMS)
def test_a_started_model_trains_and_is_saved(form):
    mixture = mixture_with(form, "composition-random")
    mixture.initialize(X, seed=0)
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO())
    assert torch.tensor([svi.step(X) for _ in range(3)]).isfinite().all()
    loaded = mixture_with(form, "composition-random")
    loaded.load_state_dict(mixture.state_dict())
    assert torch.equal(loaded.component_loc, mixture.component_loc)


def test_fixed_scales_stay_and_locations_keep_their_distance():
    """Components of scale 1 would lie on top of each other if their locations drew near as L grows."""
    mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS["projected-mlp"](25.0), scales="fixed")
    for start in (lambda: None, lambda: mixture.initialize(X, seed=0)):
        start()
        assert rms(mixture.component_log_scale) == 0
        assert rms(mixture.component_loc) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("prior", COMPONENTS)
def test_components_with_a_prior_stay(prior):
    mixture = mixture_with("summed-out")
    mixture.decoder.inverse_lipschitz = 25.0
    setattr(mixture, prior, PyroSample(dist.Normal(0.0, 1.0).expand([3, LATENT]).to_event(2)))
    (other,) = set(COMPONENTS) - {prior}
    before = getattr(mixture, other).detach().clone()
    mixture.initialize(X, seed=0)
    assert set(mixture._pyro_samples) == {prior}
    assert not torch.equal(getattr(mixture, other), before)


@pytest.mark.parametrize("name", ["projected-mlp", "projected-identity"])
def test_equal_data_leave_finite_components(name):
    mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS[name](25.0))
    mixture.initialize(torch.ones(5, *EVENT), seed=0)
    assert mixture.component_log_scale.isfinite().all()


class OwnDecoder(nn.Module):
    """A decoder of a user, with a start of its own."""

    latent_dim, event_shape, inverse_lipschitz = LATENT, torch.Size(EVENT), 4.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(LATENT, 8)

    def forward(self, z):
        return self.linear(z).reshape(*z.shape[:-1], *EVENT)

    def initialize(self, x, likelihood, *, seed=None):
        self.seen = sum(len(batch) for batch in x), likelihood, seed


def test_a_decoder_of_another_class_starts_by_its_own_method():
    mixture = mixture_of(OwnDecoder())
    with torch.no_grad():
        mixture.component_loc.fill_(9.0)
    mixture.initialize(X, seed=2)
    assert mixture.decoder.seen == (len(X), mixture.likelihood, 2)
    assert rms(mixture.component_loc) == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_few_components_start_apart(seed):
    mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS["projected-mlp"](25.0), num_components=2)
    mixture.initialize(X, seed=seed)
    first, second = mixture.component_loc.detach()
    torch.testing.assert_close(first, -second)
    reach = rms(mixture.component_log_scale.exp())
    assert (first - second).norm().item() == pytest.approx(2 * LATENT**0.5 * reach, rel=1e-4)


def test_one_component_starts():
    mixture = mixture_of(INVERSE_LIPSCHITZ_DECODERS["projected-mlp"](25.0), num_components=1)
    mixture.initialize(X, seed=0)
    assert mixture.component_loc.isfinite().all()
    assert 0 < rms(mixture.component_loc) < 1


def test_refuses_a_decoder_without_a_start():
    mixture = mixture_of(nn.Linear(LATENT, 8), latent_dim=LATENT, event_shape=8)
    with pytest.raises(TypeError, match="Expected decoder with a method initialize, got Linear"):
        mixture.initialize(torch.randn(5, 8))
    with pytest.raises(ValueError, match="Expected data at site 'x' of shape"):
        mixture_of(DECODERS["plain"]()).initialize(X[0])


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
def test_constrained_components_start_as_others_do(name):
    decoder = INVERSE_LIPSCHITZ_DECODERS[name](25.0)
    free, constrained, narrow = (mixture_of(copy.deepcopy(decoder), num_components=4) for _ in range(3))
    interval = dist.constraints.interval(-9.0, 9.0)
    constrained.component_log_scale = PyroParam(torch.zeros(4, LATENT), constraint=interval)
    for mixture in (free, constrained):
        mixture.initialize(data(1.0), seed=0)
    assert free.component_log_scale.max() < -1
    for part in COMPONENTS:
        torch.testing.assert_close(getattr(constrained, part), getattr(free, part), rtol=1e-4, atol=1e-4)
    narrow.component_log_scale = PyroParam(torch.ones(4, LATENT), constraint=dist.constraints.positive)
    with pytest.raises(ValueError, match="Expected component_log_scale with a constraint that holds at its start"):
        narrow.initialize(data(1.0), seed=0)
