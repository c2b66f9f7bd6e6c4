"""Constants in nats by likelihood: a scale for each entry of a datum, scales with priors, and reference units."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import EVENT, LATENT, jacobian, perturb
from helpers.noise import NormalOfEntries, drawn
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample

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
    ProjectedDecoder,
    SequenceDecoder,
    SequenceEncoder,
    SequentialVAE,
    likelihoods,
    mlp,
    schedules,
)

FEATURES = 8
SCALES = torch.tensor([0.1, 1.0, 20.0, 3.0, 0.5, 0.5, 2.0, 7.0]).reshape(EVENT)
SIZES = {"latent_dim": LATENT, "event_shape": EVENT, "map_features": (12, 8)}
KINDS = {
    "projected": lambda constant, **options: ProjectedDecoder(
        mlp(LATENT, (8,), FEATURES), inverse_lipschitz=constant, **SIZES | options
    ),
    "composition": lambda constant, **options: InverseLipschitzDecoder(inverse_lipschitz=constant, **SIZES | options),
}


def ratio(kappa):
    return math.sqrt(math.expm1(2 * kappa))


def vae_with(kind, likelihood, kappa=0.5):
    encoder = MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,))
    return VAE(KINDS[kind](Nats(kappa, likelihood)), encoder, likelihood)


# A scale for each entry.


def mean_scale(scales):
    return scales.log().mean().exp()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_constants_with_a_scale_for_each_entry(kind, seed):
    torch.manual_seed(seed)
    decoder = perturb(KINDS[kind](Nats(0.5, NormalOfEntries(SCALES).double())).double(), 0.7)
    whole, smallest = float(mean_scale(SCALES)), float(SCALES.min())
    assert decoder.inverse_lipschitz == pytest.approx(ratio(0.5) * smallest, rel=1e-5)
    assert decoder.channel_constant == pytest.approx(ratio(0.5) * whole, rel=1e-5)
    z, other = torch.randn(2, 200, LATENT, dtype=torch.float64)
    distance = (z - other).norm(dim=-1) * (1 - 1e-6)
    eta, other_eta = decoder(z), decoder(other)
    assert ((eta - other_eta).flatten(1).norm(dim=-1) >= decoder.inverse_lipschitz * distance).all()
    # In units of the noise, which is the guarantee.
    assert (((eta - other_eta) / SCALES).flatten(1).norm(dim=-1) >= ratio(0.5) * distance).all()
    coordinates = decoder.coordinates(eta) - decoder.coordinates(other_eta)
    assert (coordinates.norm(dim=-1) >= decoder.channel_constant * distance).all()


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_have_equal_noise_and_a_large_determinant(kind):
    decoder = perturb(KINDS[kind](Nats(0.5, NormalOfEntries(SCALES).double())).double(), 0.7)
    eye = torch.eye(FEATURES, dtype=torch.float64).reshape(FEATURES, *EVENT)
    of_noise = decoder.coordinates(SCALES * eye)
    whole = mean_scale(SCALES).double()
    torch.testing.assert_close(of_noise.T @ of_noise, whole**2 * torch.eye(LATENT).double(), rtol=1e-5, atol=1e-6)
    slopes = jacobian(lambda z: decoder.coordinates(decoder(z)), torch.randn(20, LATENT, dtype=torch.float64))
    assert (slopes.det() >= decoder.channel_constant**LATENT * (1 - 1e-6)).all()
    if kind == "projected":
        torch.testing.assert_close(slopes, slopes.mT, rtol=1e-6, atol=1e-6)
        assert (slopes.diagonal(dim1=-2, dim2=-1) >= decoder.coordinate_constant * (1 - 1e-6)).all()


def test_equal_scales_are_one_scale():
    for kind in KINDS:
        one = KINDS[kind](Nats(0.5, likelihoods.Normal(0.3)))
        each = copy.deepcopy(one)
        each.inverse_lipschitz = Nats(0.5, NormalOfEntries(torch.full(EVENT, 0.3)))
        if kind == "composition":
            each.inner.inverse_lipschitz = one.inner.inverse_lipschitz
            each.outer._other = one.outer._other
        z = torch.randn(5, LATENT)
        torch.testing.assert_close(each(z), one(z))
        assert each.inverse_lipschitz == pytest.approx(one.inverse_lipschitz, rel=1e-5)
        torch.testing.assert_close(each.coordinates(each(z)), one.coordinates(one(z)))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_trained_saved_and_copied(kind):
    vae, x = vae_with(kind, NormalOfEntries(SCALES)), SCALES * torch.randn(20, *EVENT)
    svi = SVI(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 0.1}), TraceMeanField_ELBO())
    svi.step(x)
    scales = vae.likelihood.noise_scale.detach()
    assert (scales != SCALES).all()
    assert vae.decoder.inverse_lipschitz == pytest.approx(ratio(0.5) * float(scales.min()), rel=1e-5)
    other = vae_with(kind, NormalOfEntries(torch.ones(EVENT)), kappa=0.1)
    other.load_state_dict(vae.state_dict())
    z = torch.randn(5, LATENT)
    for copied in (other, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(copied.decoder(z), vae.decoder(z))
        assert copied.decoder.inverse_lipschitz == vae.decoder.inverse_lipschitz
    log_scale = vae.likelihood.log_scale
    (slope,) = torch.autograd.grad(vae.decoder(z).square().sum(), log_scale)
    assert (slope != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_refuse_values_of_another_shape(kind):
    decoder = KINDS[kind](1.0)
    assert decoder.coordinates(torch.zeros(2, 5, *EVENT)).shape == (2, 5, LATENT)
    assert decoder.coordinates(torch.zeros(EVENT)).shape == (LATENT,)
    for wrong in (torch.zeros(5, FEATURES), torch.zeros(2, 4), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"Expected y of shape \(\.\.\., 4, 2\)"):
            decoder.coordinates(wrong)


# A scale with a prior.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "parallel"), [("scalar", False), ("vectorized", False), ("vectorized", True)])
def test_each_draw_of_the_scale_has_its_own_constant(kind, form, parallel):
    vae = vae_with(kind, drawn(form))
    z = torch.randn(6, LATENT)
    model = poutine.condition(vae.model, data={"z": z})

    def with_eta():
        with poutine.trace() as tracing:
            model(num_data=6)
        return tracing.trace

    predictive = Predictive(vae.model, num_samples=5, parallel=parallel, return_sites=("likelihood.log_scale", "z"))
    assert predictive(num_data=6)["z"].shape == (5, 6, LATENT)
    for _ in range(3):
        trace = with_eta()
        sigma = trace.nodes["likelihood.log_scale"]["value"].exp()
        fixed = vae_with(kind, likelihoods.Normal(float(sigma)))
        fixed.decoder.load_state_dict({k: v for k, v in vae.decoder.state_dict().items() if "_extra" not in k}, False)
        if kind == "composition":
            fixed.decoder.inner.inverse_lipschitz = vae.decoder.inner.inverse_lipschitz
            fixed.decoder.outer._other = vae.decoder.outer._other
        fn = trace.nodes["x"]["fn"].base_dist
        torch.testing.assert_close(fn.loc, fixed.decoder(z), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fn.scale.expand(6, *EVENT), sigma.expand(6, *EVENT))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_the_scale_side_by_side(kind):
    vae = vae_with(kind, drawn("vectorized")).double()
    log_scales = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    z = torch.randn(6, LATENT, dtype=torch.float64)

    def decoded(log_scale, z):
        with poutine.trace() as tracing, poutine.condition(data={"likelihood.log_scale": log_scale, "z": z}):
            vae.model(num_data=6)
        return tracing.trace.nodes["x"]["fn"].base_dist.loc

    together = decoded(log_scales, z)
    assert together.shape == (3, 6, *EVENT)
    for log_scale, eta in zip(log_scales, together, strict=True):
        torch.testing.assert_close(eta, decoded(log_scale.reshape(1), z))
    other = torch.randn(6, LATENT, dtype=torch.float64)
    difference = (together - decoded(log_scales, other)).flatten(-2).norm(dim=-1)
    floors = log_scales.exp().squeeze(-1) * ratio(0.5) * (z - other).norm(dim=-1)
    assert (difference >= floors * (1 - 1e-9)).all()
    # They differ, so that a single constant would not do.
    assert not torch.allclose(together[0], together[2], rtol=1e-2)


def test_vectorized_particles_with_a_prior_on_the_scale():
    vae, x = vae_with("projected", drawn("vectorized")), torch.randn(6, *EVENT)

    def guide(x):
        vae.guide(x)
        pyro.sample("likelihood.log_scale", dist.Normal(torch.full((1,), -1.0), 0.1).to_event(1))

    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(elbo.loss(vae.model, guide, x))


def test_nothing_is_drawn_to_print_and_save():
    decoder = KINDS["composition"](Nats(0.5, drawn()))
    before = torch.get_rng_state()
    assert "inverse_lipschitz=drawn, nats=0.5" in repr(decoder)
    state = decoder.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = KINDS["composition"](Nats(0.1, drawn()))
    other.load_state_dict(state)
    assert other.nats == 0.5


def test_outside_of_a_model_each_call_has_one_draw():
    class DrawnScales(NormalOfEntries):
        def __init__(self):
            super().__init__(torch.ones(EVENT))
            del self.log_scale
            self.log_scale = PyroSample(dist.Normal(torch.zeros(EVENT), 1.0).to_event(2))

    decoder = KINDS["projected"](Nats(0.5, DrawnScales()))
    assert decoder.inverse_lipschitz != decoder.inverse_lipschitz
    for _ in range(3):
        torch.manual_seed(0)
        eta = decoder(torch.zeros(2, LATENT))
        torch.manual_seed(0)
        scales = dist.Normal(torch.zeros(EVENT), 1.0).sample().exp()
        decoder_of_draw = copy.deepcopy(decoder)
        decoder_of_draw.inverse_lipschitz = Nats(0.5, NormalOfEntries(scales))
        torch.testing.assert_close(eta, decoder_of_draw(torch.zeros(2, LATENT)))


def test_draws_from_the_prior_have_the_scale_that_the_constant_follows():
    likelihood = drawn("vectorized", spread=3.0)
    vae = vae_with("projected", likelihood, kappa=2.0)
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.zero_()
        vae.decoder.map.icnn.output_weight_raw.fill_(-1e3)
    # x = sigma (ratio Q z + e), of which the spread along the frame over that across it does not depend on sigma.
    for seed in range(5):
        x = vae.sample_prior(4000, batch_size=1000, seed=seed).flatten(1)
        inside = vae.decoder.coordinates(x.reshape(-1, *EVENT)).square().sum() / LATENT
        outside = (x.square().sum() - inside * LATENT) / (FEATURES - LATENT)
        assert float(inside / outside) == pytest.approx(math.exp(4.0), rel=0.1)


def test_maps_and_transforms_with_a_drawn_scale():
    brenier = BrenierMap(LATENT, Nats(0.5, drawn("vectorized")), (8,)).double()
    brenier._nats.likelihood.double()
    transform = BrenierTransform(brenier)

    class Flow(PyroModule):
        def __init__(self):
            super().__init__()
            self.brenier, self.likelihood = brenier, brenier._nats.likelihood

        def forward(self, z):
            y = self.brenier(z)
            return y, self.brenier.inverse(y), self.brenier.potential(z), self.brenier.jacobian(z)

    flow, z = Flow(), torch.randn(6, LATENT, dtype=torch.float64)
    log_scales = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1)
    y, found, potential, slopes = poutine.condition(flow, data={"likelihood.log_scale": log_scales})(z)
    assert (y.shape, potential.shape, slopes.shape) == ((3, 6, LATENT), (3, 6), (3, 6, LATENT, LATENT))
    torch.testing.assert_close(found, z.expand(3, -1, -1), rtol=1e-6, atol=1e-6)
    for i, log_scale in enumerate(log_scales):
        alone = poutine.condition(flow, data={"likelihood.log_scale": log_scale.reshape(1)})(z)
        for together, one in zip((y, found, potential, slopes), alone, strict=True):
            torch.testing.assert_close(together[i], one)
    assert transform.inv(transform(z)) is not z


# Reference units.

LIKELIHOODS = {
    "bernoulli": lambda: likelihoods.Bernoulli(),
    "continuous-bernoulli": lambda: likelihoods.ContinuousBernoulli(),
    "poisson": lambda: likelihoods.Poisson(),
    "negative-binomial": lambda: likelihoods.NegativeBinomial(3.0),
    "negative-binomial-of-entries": lambda: likelihoods.NegativeBinomial(torch.rand(EVENT) + 0.5),
    "zero-inflated-poisson": lambda: likelihoods.ZeroInflatedPoisson(0.3),
    "zero-inflated-negative-binomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(3.0, torch.rand(EVENT)),
    "categorical": lambda: likelihoods.Categorical(EVENT[-1]),
}


def information_by_draws(likelihood, eta, count):
    """The Fisher information as the covariance of the score, over draws."""
    eta = eta.expand(count, *eta.shape).clone().requires_grad_()
    distribution = likelihood(eta)
    x = distribution.sample()
    (score,) = torch.autograd.grad(distribution.log_prob(x).sum(), eta)
    score = score.flatten(1)
    return score.T @ score / count


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_unit_is_that_of_the_formula(name, kind):
    likelihood = LIKELIHOODS[name]()
    frame = "centered" if name == "categorical" else "random"
    nats = Nats(0.5, likelihood)
    assert nats.is_reference
    assert not Nats(0.5, likelihoods.Normal()).is_reference
    decoder = KINDS[kind](1.0, frame=frame)
    with torch.no_grad():
        decoder.bias.copy_(0.5 * torch.randn(FEATURES))
    decoder.inverse_lipschitz = nats
    information = information_by_draws(likelihood, decoder.bias.detach().reshape(EVENT), 40_000)
    unit = (torch.trace(information) / torch.trace(information @ information)) ** 0.5
    # With categories the traces are estimated by 64 probes.
    tolerance = 0.1 if name == "categorical" else 0.03
    assert decoder.inverse_lipschitz == pytest.approx(float(unit) * ratio(0.5), rel=tolerance)
    assert decoder.nats == 0.5
    # It stays with the decoder, and is not that of another draw of the bias.
    before = decoder.inverse_lipschitz
    with torch.no_grad():
        decoder.bias += 1.0
    decoder.nats = 1.0
    assert decoder.inverse_lipschitz == pytest.approx(before * ratio(1.0) / ratio(0.5))
    other = KINDS[kind](Nats(0.1, LIKELIHOODS[name]()), frame=frame)
    other.load_state_dict(decoder.state_dict())
    assert (other.nats, other.inverse_lipschitz) == (1.0, decoder.inverse_lipschitz)
    assert f"unit={before / ratio(0.5):.4g}" in repr(other._nats)


def test_a_unit_that_is_given_stays():
    decoder = KINDS["projected"](Nats(0.5, likelihoods.Bernoulli(), unit=3.0))
    assert decoder.inverse_lipschitz == pytest.approx(3 * ratio(0.5))


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_datum_of_one_number_has_one_scale(kind, shape):
    likelihood = likelihoods.Normal(torch.full(shape, 0.3))
    sizes = {"latent_dim": 1, "event_shape": shape} | ({"frame": "identity"} if kind == "composition" else {})
    backbone = [mlp(1, (8,), 1)] if kind == "projected" else []
    decoder = (ProjectedDecoder if backbone else InverseLipschitzDecoder)(
        *backbone, **sizes, inverse_lipschitz=Nats(0.5, likelihood)
    )
    for batch in ((), (5,), (4, 5)):
        assert decoder(torch.randn(*batch, 1)).shape == (*batch, *shape)
    assert decoder.inverse_lipschitz == pytest.approx(0.3 * ratio(0.5))


# The likelihood of the model.


@pytest.mark.parametrize("kind", KINDS)
def test_a_likelihood_that_was_replaced_is_not_followed_silently(kind):
    x = torch.randn(5, *EVENT)
    likelihood = likelihoods.Normal(0.3, "learned")
    vae = vae_with(kind, likelihood)
    vae.model(x)
    vae.likelihood = likelihoods.Normal(5.0, "learned")
    for function in (vae.model, vae.initialize):
        with pytest.raises(ValueError, match="likelihood to be the one of the decoder's inverse_lipschitz"):
            function(x)
    vae.decoder.inverse_lipschitz = Nats(0.5, vae.likelihood)
    vae.model(x)
    assert vae.decoder.inverse_lipschitz == pytest.approx(5 * ratio(0.5))
    vae.decoder.inverse_lipschitz = Nats(0.5, likelihoods.Bernoulli())
    with pytest.raises(ValueError, match="likelihood to be a Bernoulli, as in the decoder's inverse_lipschitz"):
        vae.model(x)


def test_a_model_of_sequences_takes_nats_of_categories_only():
    sizes = {"latent_dim": 2, "event_shape": 10, "context_dim": 8}

    def model_with(likelihood):
        backbone = MLPDecoder(**sizes, hidden_features=(8,))
        decoder = ProjectedDecoder(backbone, **sizes, frame="centered", inverse_lipschitz=Nats(0.5, likelihood))
        encoder = SequenceEncoder(vocab_size=10, latent_dim=2, hidden_features=8)
        return SequentialVAE(SequenceDecoder("gru", decoder), encoder)

    assert model_with(likelihoods.Categorical(10)).decoder.nats == 0.5
    for other in (likelihoods.Normal(0.1), likelihoods.Bernoulli()):
        with pytest.raises(ValueError, match="inverse_lipschitz, Nats"):
            model_with(other)


def test_nats_tell_of_an_inner_constant_that_was_set_by_itself():
    likelihood = likelihoods.Normal(0.3)
    decoder = KINDS["composition"](Nats(0.5, likelihood))
    assert decoder.nats == 0.5
    InverseLipschitzScheduler(decoder.inner, schedules.constant(0.01))
    assert decoder.nats == pytest.approx(0.5 * math.log1p((decoder.inverse_lipschitz / 0.3) ** 2))
    assert f"nats={decoder.nats:g}" in repr(decoder)
    other = KINDS["composition"](Nats(2.0, likelihood))
    other.load_state_dict(decoder.state_dict())
    assert other.nats == decoder.nats < 0.01
    decoder.nats = 0.5
    assert decoder.inverse_lipschitz == pytest.approx(0.3 * ratio(decoder.nats))
    assert decoder.nats == 0.5


def test_a_likelihood_of_other_natural_parameters_is_named():
    with pytest.raises(ValueError, match=r"inverse_lipschitz with a likelihood of natural parameters of shape.*Cat"):
        KINDS["projected"](Nats(0.5, likelihoods.Categorical(EVENT[-1] + 1)))
