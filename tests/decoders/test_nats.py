"""Constants in nats: L follows the noise at every step, in every way in which a decoder is called."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, ConvBackbone, perturb
from helpers.noise import NormalOfEntries
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.func import functional_call, vmap

from pyro_ilvae import (
    VAE,
    BrenierMap,
    BrenierTransform,
    InverseLipschitzDecoder,
    InverseLipschitzScheduler,
    JointOptim,
    MLPDecoder,
    MLPEncoder,
    Nats,
    NatsScheduler,
    ProjectedDecoder,
    likelihoods,
    schedules,
)

FEATURES = 8


def ratio(kappa):
    return math.sqrt(math.expm1(2 * kappa))


def sigma_of(likelihood):
    return float(likelihood.scale.detach())


def projected(constant, **options):
    options = {"latent_dim": LATENT, "event_shape": EVENT, "map_features": (12, 8)} | options
    context_dim = options.get("context_dim")
    backbone = MLPDecoder(
        latent_dim=options["latent_dim"], event_shape=EVENT, hidden_features=(8,), context_dim=context_dim
    )
    return ProjectedDecoder(backbone, inverse_lipschitz=constant, **options)


def composition(constant, **options):
    options = {"latent_dim": LATENT, "event_shape": EVENT, "map_features": (12, 8)} | options
    return InverseLipschitzDecoder(inverse_lipschitz=constant, **options)


KINDS = {
    "projected": projected,
    "projected-square": lambda constant, **options: projected(constant, **{"latent_dim": FEATURES} | options),
    "projected-conv": lambda constant: ProjectedDecoder(
        ConvBackbone(), latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=constant
    ),
    "composition": composition,
    "composition-square": lambda constant: composition(constant, latent_dim=FEATURES, frame="identity"),
}
MAP = {"map": lambda constant: BrenierMap(LATENT, constant, (12, 8), gain=2.5)}


def learned(scale=0.3):
    return likelihoods.Normal(scale, estimate="learned")


def vae_with(kind="projected", kappa=0.5, likelihood=None):
    likelihood = likelihood or learned()
    decoder = KINDS[kind](Nats(kappa, likelihood))
    encoder = MLPEncoder(event_shape=EVENT, latent_dim=decoder.latent_dim, hidden_features=(8,))
    return VAE(decoder, encoder, likelihood)


def smallest_ratio(decoder, z, other, *context):
    with torch.no_grad():
        difference = (decoder(z, *context) - decoder(other, *context)).flatten(-2).norm(dim=-1)
    return float((difference / (z - other).norm(dim=-1)).min())


# The constant.


@given(st.floats(0, 40), st.floats(1e-3, 1e3))
def test_formula(kappa, sigma):
    likelihood = likelihoods.Normal(sigma)
    exact = sigma_of(likelihood) * math.sqrt(math.expm1(2 * kappa))
    if exact > 1e18:
        with pytest.raises(ValueError, match=r"inverse_lipschitz <= 1e\+18"):
            BrenierMap(2, Nats(kappa, likelihood))
        return
    brenier = BrenierMap(2, Nats(kappa, likelihood))
    assert brenier.inverse_lipschitz == pytest.approx(exact, rel=1e-5, abs=1e-30)
    assert brenier.nats == kappa


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.floats(-3, 3), st.sampled_from([1e-3, 1.0, 1e3])
)
def test_inequality_after_parameters_and_noise_have_moved(kind, seed, kappa, log_scale, distance):
    torch.manual_seed(seed)
    likelihood = learned()
    decoder = perturb(KINDS[kind](Nats(kappa, likelihood)).double(), 1.0)
    with torch.no_grad():
        likelihood.log_scale.fill_(log_scale)
    constant = math.exp(log_scale) * ratio(kappa)
    assert decoder.inverse_lipschitz == pytest.approx(constant, rel=1e-5)
    z, step = torch.randn(2, 50, decoder.latent_dim, dtype=torch.float64)
    assert smallest_ratio(decoder, z, z + distance * step) >= constant * (1 - 1e-5)
    coordinates = decoder.coordinates(decoder(z)) - decoder.coordinates(decoder(z + distance * step))
    assert coordinates.shape == (50, decoder.latent_dim)
    assert (coordinates.norm(dim=-1) >= constant * distance * step.norm(dim=-1) * (1 - 1e-5)).all()
    assert decoder.channel_constant == decoder.inverse_lipschitz


@pytest.mark.parametrize("kind", ["projected", "composition"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inequality_with_a_context_and_more_batch_dimensions(kind, dtype):
    likelihood = learned(2.0).to(dtype)
    decoder = perturb(KINDS[kind](Nats(0.7, likelihood), context_dim=4).to(dtype), 0.5)
    constant = sigma_of(likelihood) * ratio(0.7)
    z, other = torch.randn(2, 3, 1, 20, LATENT, dtype=dtype)
    context = torch.randn(5, 1, 4, dtype=dtype)
    assert smallest_ratio(decoder, z, other, context) >= constant * (1 - 1e-4)
    assert decoder(z, context).shape == (3, 5, 20, *EVENT)
    # Of a composition with a context all coordinates are needed, and one more dimension of z for each number of it.
    coordinates = decoder.coordinates(decoder(z, context)) - decoder.coordinates(decoder(other, context))
    assert (coordinates.norm(dim=-1) >= constant * (z - other).norm(dim=-1) * (1 - 1e-4)).all()


@pytest.mark.parametrize("kind", [*KINDS, *MAP])
def test_half_precision_rounds_the_constant_that_is_used(kind):
    likelihood = learned().bfloat16()
    decoder = (KINDS | MAP)[kind](Nats(0.5, likelihood)).bfloat16()
    z = torch.randn(5, getattr(decoder, "latent_dim", LATENT)).bfloat16()
    assert decoder(z).dtype == torch.bfloat16
    assert decoder.inverse_lipschitz == pytest.approx(0.3 * ratio(0.5), rel=0.02)


# The gradient through L.


@pytest.mark.parametrize("kind", [*KINDS, *MAP])
def test_gradient_with_respect_to_the_noise(kind):
    likelihood = learned().double()
    decoder = perturb((KINDS | MAP)[kind](Nats(0.5, likelihood)).double(), 0.5)
    z = torch.randn(6, getattr(decoder, "latent_dim", LATENT), dtype=torch.float64)
    weights = torch.randn_like(decoder(z))
    (gradient,) = torch.autograd.grad((decoder(z).sin() * weights).sum(), likelihood.log_scale)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            likelihood.log_scale += step
            values.append((decoder(z).sin() * weights).sum())
    torch.testing.assert_close(gradient, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    assert gradient.abs() > 1e-4


def test_gradient_is_that_of_the_construction_written_out():
    likelihood = learned().double()
    decoder = perturb(projected(Nats(0.5, likelihood)).double(), 0.5)
    z = torch.randn(6, LATENT, dtype=torch.float64)
    log_scale = likelihood.log_scale.detach().clone().requires_grad_()
    q = decoder.frame.matrix
    constant = log_scale.exp() * ratio(0.5)
    inside = constant * z + math.sqrt(FEATURES) * decoder.map.icnn.gradient(z)
    outside = decoder.backbone(z).flatten(1) + z @ decoder.linear_path.weight.T
    expected = decoder.bias + inside @ q.T + outside - outside @ q @ q.T
    torch.testing.assert_close(decoder(z).flatten(1), expected)
    theirs = torch.autograd.grad(expected.square().sum(), log_scale)
    ours = torch.autograd.grad(decoder(z).square().sum(), likelihood.log_scale)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["projected", "composition"])
@pytest.mark.parametrize("optimizer", ["joint", "pyro"])
def test_the_constant_follows_every_step_of_svi(kind, optimizer):
    vae, x = vae_with(kind), 3 * torch.randn(20, *EVENT)
    optim = JointOptim(torch.optim.Adam, {"lr": 0.1}) if optimizer == "joint" else pyro.optim.Adam({"lr": 0.1})
    svi = SVI(vae.model, vae.guide, optim, TraceMeanField_ELBO())
    scales = [sigma_of(vae.likelihood)]
    for _ in range(4):
        svi.step(x)
        scales.append(sigma_of(vae.likelihood))
        assert vae.decoder.inverse_lipschitz == pytest.approx(scales[-1] * ratio(0.5), rel=1e-5)
        z, other = torch.randn(2, 100, LATENT)
        assert smallest_ratio(vae.decoder, z, other) >= scales[-1] * ratio(0.5) * (1 - 1e-3)
    assert len(set(scales)) == 5
    # The scale has one name, that of the model.
    names = [name for name in pyro.get_param_store() if "log_scale" in name]
    assert names == ["likelihood.log_scale"]


def test_the_constant_follows_a_torch_optimizer(local_params):
    vae, x = vae_with(), 3 * torch.randn(20, *EVENT)
    optim, elbo = torch.optim.Adam(vae.parameters(), lr=0.1), TraceMeanField_ELBO()
    for _ in range(3):
        optim.zero_grad()
        elbo.differentiable_loss(vae.model, vae.guide, x).backward()
        assert vae.likelihood.log_scale.grad.abs() > 0
        optim.step()
        assert vae.decoder.inverse_lipschitz == pytest.approx(sigma_of(vae.likelihood) * ratio(0.5), rel=1e-5)


def test_an_optimal_scale_is_followed_in_its_running_average():
    likelihood = likelihoods.Normal(1.0, estimate="optimal")
    vae, x = vae_with(likelihood=likelihood), 3 * torch.randn(20, *EVENT)
    svi = SVI(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.1}), TraceMeanField_ELBO())
    for _ in range(3):
        svi.step(x)
        assert vae.decoder.inverse_lipschitz == pytest.approx(sigma_of(likelihood) * ratio(0.5), rel=1e-5)
    assert sigma_of(likelihood) != 1.0
    before = vae.decoder.inverse_lipschitz
    svi.evaluate_loss(x)
    assert vae.decoder.inverse_lipschitz == before


# In other hands.


def test_functional_call_and_vmap_see_the_noise_they_are_given():
    vae, z = vae_with().double(), torch.randn(6, LATENT, dtype=torch.float64)
    vae.decoder(z)

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = vae

        def forward(self, z):
            return self.vae.decoder(z)

    log_scales = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    decode = Decode()
    name = "vae.likelihood.log_scale"
    together = vmap(lambda value: functional_call(decode, {name: value}, (z,)))(log_scales)
    for value, eta in zip(log_scales, together, strict=True):
        with torch.no_grad():
            vae.likelihood.log_scale.copy_(value)
        torch.testing.assert_close(vae.decoder(z), eta)


@pytest.mark.parametrize("kind", ["projected", "composition"])
def test_without_gradients(kind):
    decoder, z = perturb(KINDS[kind](Nats(0.5, learned()))), torch.randn(6, LATENT)
    expected = decoder(z).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(decoder(z), expected)


@pytest.mark.parametrize("kind", ["projected", "composition"])
def test_copies_take_the_likelihood_with_them(kind):
    vae = perturb(vae_with(kind), 0.3)
    z = torch.randn(5, LATENT)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        torch.testing.assert_close(other.decoder(z), vae.decoder(z))
        with torch.no_grad():
            other.likelihood.log_scale += 1.0
        assert other.decoder.inverse_lipschitz == pytest.approx(vae.decoder.inverse_lipschitz * math.e, rel=1e-5)


@pytest.mark.parametrize("kind", ["projected", "composition"])
def test_conversions_keep_kappa_and_follow_the_converted_noise(kind):
    vae = vae_with(kind)
    constant = vae.decoder.inverse_lipschitz
    vae.double()
    assert vae.decoder.inverse_lipschitz == pytest.approx(constant, rel=1e-6)
    assert vae.decoder(torch.randn(2, LATENT, dtype=torch.float64)).dtype == torch.float64
    vae.to("cpu", torch.float32)
    assert vae.decoder(torch.randn(2, LATENT)).dtype == torch.float32
    assert vae.decoder.nats == 0.5


# State.


@pytest.mark.parametrize("kind", ["projected", "composition"])
def test_state_of_a_whole_model(kind):
    vae = perturb(vae_with(kind, kappa=0.7), 0.3)
    other = vae_with(kind, kappa=0.1, likelihood=learned(5.0))
    other.load_state_dict(vae.state_dict())
    assert (other.decoder.nats, other.decoder.inverse_lipschitz) == (0.7, vae.decoder.inverse_lipschitz)
    z = torch.randn(5, LATENT)
    assert torch.equal(other.decoder(z), vae.decoder(z))
    # And it follows its own noise from here.
    with torch.no_grad():
        other.likelihood.log_scale += 1.0
    assert other.decoder.inverse_lipschitz == pytest.approx(vae.decoder.inverse_lipschitz * math.e, rel=1e-5)


@pytest.mark.parametrize("kind", ["projected", "composition"])
def test_state_in_nats_and_state_that_is_a_number(kind):
    in_nats, number = KINDS[kind](Nats(0.5, learned())), KINDS[kind](2.0)
    with pytest.raises(ValueError, match=r"_extra_state.*build the decoder with inverse_lipschitz=Nats\(0.5"):
        number.load_state_dict(in_nats.state_dict())
    number = KINDS[kind](2.0)
    reference = KINDS[kind](Nats(0.5, likelihoods.Bernoulli()))
    with pytest.raises(ValueError, match="the likelihood one with Normal noise"):
        reference.load_state_dict(in_nats.state_dict())
    with pytest.raises(ValueError, match="the likelihood one without Normal noise"):
        in_nats.load_state_dict(reference.state_dict())
    in_nats.load_state_dict(number.state_dict())
    assert (in_nats.nats, in_nats.inverse_lipschitz) == (None, pytest.approx(2.0))


@pytest.mark.parametrize(
    "state", [[1.0, 50.0, math.nan, 1.0], [1.0, 0.5, math.nan, 0.0], [1.0, 0.5], [-1.0, 0.5, 1, 1]]
)
def test_refuses_state_that_is_none(state):
    brenier = BrenierMap(2, Nats(0.5, learned()))
    with pytest.raises(ValueError, match="_extra_state"):
        brenier.load_state_dict(brenier.state_dict() | {"_extra_state": torch.tensor(state)})


# Setting.


@pytest.mark.parametrize("kind", [*KINDS, *MAP])
def test_number_and_nats_can_be_set_at_any_time(kind):
    likelihood = learned()
    decoder = (KINDS | MAP)[kind](2.0)
    assert decoder.nats is None
    with pytest.raises(ValueError, match="Expected inverse_lipschitz in nats to set nats"):
        decoder.nats = 0.5
    for value in (Nats(0.5, likelihood), Nats(0.0, likelihood), Nats(1.0, likelihood)):
        decoder.inverse_lipschitz = value
        assert decoder.nats == value.kappa
        assert decoder.inverse_lipschitz == pytest.approx(0.3 * ratio(value.kappa), rel=1e-5)
    for kappa in (0.0, 0.3, 2.0):
        decoder.nats = kappa
        assert (decoder.nats, decoder.inverse_lipschitz) == (kappa, pytest.approx(0.3 * ratio(kappa), rel=1e-5))
    for wrong in (-0.1, math.nan, math.inf, 41, "a", None):
        with pytest.raises(ValueError, match="nats"):
            decoder.nats = wrong
        assert decoder.nats == 2.0
    decoder.inverse_lipschitz = 1.5
    assert (decoder.nats, decoder.inverse_lipschitz) == (None, pytest.approx(1.5))


def test_the_pair_of_a_composition():
    decoder = composition((4.0, 1.0))
    decoder.inverse_lipschitz = Nats(0.5, learned())
    assert decoder.inner.inverse_lipschitz == pytest.approx(4 * decoder.outer.inverse_lipschitz)
    decoder.inverse_lipschitz = (1.0, 2.0)
    assert (decoder.nats, decoder.inner.inverse_lipschitz, decoder.outer.inverse_lipschitz) == (None, 1.0, 2.0)


def test_schedulers():
    likelihood = learned()
    decoder = composition(Nats(1.0, likelihood))
    scheduler = NatsScheduler(decoder, schedules.linear(1.0, 0.0, num_steps=4))
    for kappa in (0.75, 0.5, 0.25, 0.0):
        scheduler.step()
        assert decoder.inverse_lipschitz == pytest.approx(sigma_of(likelihood) * ratio(kappa), rel=1e-5)
        with torch.no_grad():
            likelihood.log_scale += 0.3
        assert decoder.inverse_lipschitz == pytest.approx(sigma_of(likelihood) * ratio(kappa), rel=1e-5)
    scheduler.load_state_dict({"num_steps_taken": 1})
    assert decoder.nats == 0.75
    InverseLipschitzScheduler(decoder, schedules.constant(3.0))
    assert (decoder.nats, decoder.inverse_lipschitz) == (None, pytest.approx(3.0))
    with pytest.raises(ValueError, match="in nats"):
        scheduler.step()
    for wrong, message in ((composition(1.0), "in nats"), (MLPDecoder(latent_dim=2, event_shape=3), "attribute nats")):
        with pytest.raises(ValueError, match=message):
            NatsScheduler(wrong, schedules.constant(0.5))


# Maps.


def test_derivatives_of_a_map_with_gain_and_nats():
    likelihood = learned().double()
    brenier = perturb(MAP["map"](Nats(0.5, likelihood)).double(), 0.5)
    z = torch.randn(10, LATENT, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(brenier.potential(z).sum(), z)
    torch.testing.assert_close(brenier(z), gradient)
    jacobian = vmap(torch.func.jacrev(brenier))(z.detach())
    torch.testing.assert_close(brenier.jacobian(z.detach()), jacobian)
    assert torch.linalg.eigvalsh(jacobian).min() >= brenier.inverse_lipschitz * (1 - 1e-9)
    torch.testing.assert_close(brenier.inverse(brenier(z).detach()), z, rtol=1e-6, atol=1e-6)


def test_inverse_has_the_gradients_of_the_noise():
    likelihood = learned().double()
    brenier = perturb(MAP["map"](Nats(0.5, likelihood)).double(), 0.3)
    y = torch.randn(4, LATENT, dtype=torch.float64)
    sigma = likelihood.log_scale

    def inverse(log_scale):
        with torch.no_grad():
            sigma.copy_(log_scale)
        return brenier.inverse(y)

    at = sigma.detach().clone()
    slopes = [torch.autograd.grad(inverse(at + step).sum(), sigma)[0] for step in (0.0, 1e-5, -1e-5)]
    first = (inverse(at + 1e-5).sum() - inverse(at - 1e-5).sum()) / 2e-5
    torch.testing.assert_close(slopes[0], first, rtol=1e-5, atol=1e-7)
    (once,) = torch.autograd.grad(inverse(at).sum(), sigma, create_graph=True)
    (twice,) = torch.autograd.grad(once, sigma)
    torch.testing.assert_close(twice, (slopes[1] - slopes[2]) / 2e-5, rtol=1e-4, atol=1e-6)


def test_a_transform_remembers_a_draw_until_the_noise_moves():
    likelihood = learned().double()
    transform = BrenierTransform(MAP["map"](Nats(0.5, likelihood)).double())
    x = torch.randn(3, LATENT, dtype=torch.float64)
    y = transform(x)
    assert transform.inv(y) is x
    with torch.no_grad():
        likelihood.log_scale += 0.5
    found = transform.inv(y)
    assert found is not x
    torch.testing.assert_close(transform(found), y)
    base = dist.Normal(torch.zeros(LATENT, dtype=torch.float64), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, [transform])
    y = flow.sample((20,))
    ours = torch.autograd.grad(flow.log_prob(y).sum(), likelihood.log_scale)
    theirs = torch.autograd.grad(flow.log_prob(y.clone()).sum(), likelihood.log_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# What is refused.


@pytest.mark.parametrize("kappa", [-0.1, math.nan, math.inf, 40.1, "1", None, True])
def test_refuses_nats(kappa):
    with pytest.raises(ValueError, match="Expected kappa"):
        Nats(kappa, likelihoods.Normal())


def test_refuses_likelihoods_and_units():
    for wrong in (likelihoods.Normal, lambda eta: dist.Normal(eta, 1.0), None, dist.Normal(0.0, 1.0)):
        with pytest.raises(TypeError, match="Expected likelihood"):
            Nats(0.5, wrong)
    with pytest.raises(ValueError, match=r"Expected unit=None for a likelihood with a noise_scale, got 2\.0"):
        Nats(0.5, likelihoods.Normal(), unit=2.0)
    for unit in (0.0, -1.0, math.nan, "a"):
        with pytest.raises(ValueError, match="unit"):
            Nats(0.5, likelihoods.Bernoulli(), unit=unit)


def test_refuses_the_noise_of_another_model():
    decoder = projected(Nats(0.5, learned()))
    encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,))
    with pytest.raises(ValueError, match="Expected likelihood to be the one of the decoder's inverse_lipschitz"):
        VAE(decoder, encoder, learned())


@pytest.mark.parametrize("kind", ["projected", "composition"])
def test_refuses_scales_of_another_shape(kind):
    with pytest.raises(
        ValueError, match=r"inverse_lipschitz with a likelihood whose noise_scale has the shape \(4, 2\)"
    ):
        KINDS[kind](Nats(0.5, NormalOfEntries([1.0, 2.0])))


def test_what_is_printed():
    likelihood = learned()
    assert repr(Nats(0.5, likelihood)) == "Nats(0.5, Normal)"
    assert repr(Nats(0.5, likelihoods.Bernoulli(), unit=2.0)) == "Nats(0.5, Bernoulli, unit=2)"
    for decoder in (projected(Nats(0.5, likelihood)), composition(Nats(0.5, likelihood))):
        assert "inverse_lipschitz=0.39325, nats=0.5, frame" in repr(decoder)
    assert "nats" not in repr(projected(1.0))
