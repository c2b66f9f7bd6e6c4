"""The bound on the relative Fisher divergence, against closed forms and at every draw."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import LATENT, perturb
from helpers.estimates import within
from helpers.fisher_models import SQUARE, Linear, LinearGaussian, N, X
from torch import nn

from pyro_ilvae import VAE, InverseLipschitzDecoder, MLPDecoder, MLPEncoder, ProjectedDecoder, likelihoods, mlp
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics.fisher.fisher_bound import fisher_bound
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence import posterior_fisher_divergence


def test_bound_and_ratio_where_both_are_known():
    linear = LinearGaussian(SQUARE, widen=1.2)
    result = fisher_bound(linear.model, linear.guide, X, num_samples=1500, batch_size=4, seed=0)
    divergence, score = linear.divergence(X)
    constant = linear.decoder.inverse_lipschitz
    assert constant == pytest.approx(1.5, rel=1e-5)
    within(result.divergence.values, divergence, result.divergence.standard_errors)
    within(result.bound, constant**2 * score, result.bound_standard_errors)
    within(result.ratio, divergence / (constant**2 * score), result.ratio_standard_errors)
    # Both sides are of the same draws, so the ratio is known better than either.
    relative = (
        result.divergence.standard_errors / result.divergence.values,
        result.ratio_standard_errors / result.ratio,
    )
    assert (relative[1] < relative[0]).all()
    alone = posterior_fisher_divergence(linear.model, linear.guide, X, num_samples=1500, batch_size=4, seed=0)
    torch.testing.assert_close(alone.values, result.divergence.values)


def test_bound_is_tight_for_an_orthogonal_decoder():
    linear = LinearGaussian(2.0 * torch.linalg.qr(SQUARE).Q)
    result = fisher_bound(linear.model, linear.guide, X, num_samples=50)
    torch.testing.assert_close(result.ratio, torch.ones(N), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.bound, result.divergence.values, rtol=1e-4, atol=1e-4)


EVENT = 5
LIKELIHOODS = {
    "normal": (lambda: likelihoods.Normal(0.5), lambda n, d: torch.randn(n, d)),
    "bernoulli": (likelihoods.Bernoulli, lambda n, d: torch.rand(n, d).round()),
    "continuous_bernoulli": (likelihoods.ContinuousBernoulli, lambda n, d: torch.rand(n, d)),
    "poisson": (likelihoods.Poisson, lambda n, d: torch.rand(n, d).mul(4).floor()),
    "negative_binomial": (lambda: likelihoods.NegativeBinomial(3.0), lambda n, d: torch.rand(n, d).mul(4).floor()),
    "zero_inflated_negative_binomial": (
        lambda: likelihoods.ZeroInflatedNegativeBinomial(3.0, 0.3),
        lambda n, d: torch.rand(n, d).mul(4).floor(),
    ),
    "categorical": (lambda: likelihoods.Categorical(2), lambda n, d: torch.rand(n, d // 2).round().long()),
}


BOUNDED = {
    "composition": lambda event: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=event, inverse_lipschitz=(0.6, 0.9), map_features=(8,)
    ),
    "composition-identity": lambda event: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=event, inverse_lipschitz=(0.6, 0.9), map_features=(8,), frame="identity"
    ),
    "composition-square": lambda event: InverseLipschitzDecoder(
        latent_dim=math.prod(event), event_shape=event, inverse_lipschitz=(0.6, 0.9), map_features=(8,)
    ),
    "projected-square": lambda event: ProjectedDecoder(
        mlp(math.prod(event), (8,), math.prod(event)),
        latent_dim=math.prod(event),
        event_shape=event,
        inverse_lipschitz=0.7,
    ),
}


def vae_of(decoder, likelihood, shape):
    return VAE(
        decoder,
        MLPEncoder(event_shape=shape, latent_dim=decoder.latent_dim, hidden_features=(8,)),
        likelihood,
        data_size=1000,
    ).double()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("kind", BOUNDED)
def test_divergence_exceeds_its_bound_at_every_draw(kind, name):
    build, draw = LIKELIHOODS[name]
    event = (3, 2) if name == "categorical" else (6,)
    vae = perturb(vae_of(BOUNDED[kind](event), build(), (3,) if name == "categorical" else (6,)), 0.5)
    x = draw(40, 6)
    x = x if name == "categorical" else x.double()
    result = fisher_bound(vae.model, vae.guide, x, num_samples=1)  # one draw is one point, and its weight is 1
    assert (result.bound > 0).all()
    assert (result.ratio >= 1 - 1e-9).all()
    many = fisher_bound(vae.model, vae.guide, x[:5], num_samples=30, batch_size=2)
    assert (many.ratio >= 1 - 1e-9).all()


def at(z):
    """A guide at the given points, but for a width that makes no difference."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(z, 1e-9).to_event(1))

    return guide


def test_bound_of_the_composition_is_its_formula():
    decoder = perturb(
        InverseLipschitzDecoder(
            latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=(0.6, 0.9), map_features=(8, 6)
        ),
        0.5,
    )
    vae = vae_of(decoder, likelihoods.Normal(0.5), EVENT)
    x, z = torch.randn(7, EVENT).double(), torch.randn(7, LATENT).double()
    result = fisher_bound(vae.model, at(z), x, num_samples=1)
    u = decoder.inner(z)
    s = (x - decoder(z)) / 0.5**2
    jacobian = decoder.outer.jacobian(decoder.frame.add(torch.zeros_like(x), u))
    folded = decoder.frame.coordinates((jacobian @ s.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(result.bound, 0.36 * folded.square().sum(-1), rtol=1e-5, atol=1e-6)
    full = (decoder.inner.jacobian(z) @ folded.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(result.divergence.values, full.square().sum(-1), rtol=1e-5, atol=1e-6)


def test_bound_of_the_composition_is_tight_where_it_is_linear():
    decoder = InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=(0.6, 0.9), map_features=(8,)
    )
    for part in (decoder.inner, decoder.outer):
        nn.init.zeros_(part.icnn.input_weight)
    vae = vae_of(decoder, likelihoods.Normal(0.5), EVENT)
    result = fisher_bound(vae.model, vae.guide, torch.randn(6, EVENT).double(), num_samples=10)
    torch.testing.assert_close(result.ratio, torch.ones_like(result.ratio), rtol=1e-9, atol=0)


def test_bound_in_single_precision_and_compiled():
    decoder = InverseLipschitzDecoder(latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=0.7, map_features=(8,))
    vae = vae_of(decoder, likelihoods.Normal(0.5), EVENT).float()
    x = torch.randn(6, EVENT)
    expected = fisher_bound(vae.model, vae.guide, x, num_samples=30, seed=0)
    for part in (decoder, decoder.inner):
        part._compiled_call_impl = part.forward  # what torch.compile leaves of a module's call: no hooks
    result = fisher_bound(vae.model, vae.guide, x, num_samples=30, seed=0)
    assert decoder._compiled_call_impl == decoder.forward
    assert result.bound.dtype == torch.float32
    assert (result.ratio >= 1 - 1e-4).all()
    torch.testing.assert_close(result.bound, expected.bound)


def test_bound_of_a_decoder_without_a_constant_is_zero():
    vae = vae_of(
        InverseLipschitzDecoder(latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=0.0, map_features=(8,)),
        likelihoods.Normal(0.5),
        EVENT,
    )
    result = fisher_bound(vae.model, vae.guide, torch.randn(3, EVENT).double(), num_samples=5)
    assert not result.bound.any()
    assert (result.ratio == math.inf).all()


def test_bound_of_a_model_that_is_no_vae():
    decoder = Linear(SQUARE)

    def model(x):
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.factor("x", -(decoder(code) - x).abs().sum(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(x / 2, 1.0).to_event(1))

    result = fisher_bound(model, guide, X, decoder=decoder, site="code", num_samples=20)
    assert (result.ratio >= 1 - 1e-5).all()
    with pytest.raises(ValueError, match=r"Expected decoder=\.\.\., or a model whose object has the attribute decoder"):
        fisher_bound(model, guide, X, site="code")


def unusual_model(use):
    decoder = Linear(SQUARE)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(use(decoder, z), 1.0).to_event(1), obs=x)

    return lambda: fisher_bound(model, LinearGaussian(SQUARE).guide, X, decoder=decoder, num_samples=5)


def bound_of(decoder):
    vae = VAE(decoder, MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,)), likelihoods.Normal(0.5))
    return lambda: fisher_bound(vae.model, vae.guide, torch.randn(3, EVENT))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            bound_of(ProjectedDecoder(mlp(LATENT, (8,), EVENT), latent_dim=LATENT, event_shape=EVENT)),
            "ProjectedDecoder with K = 3 and D = 5",
        ),
        (
            bound_of(MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(8,))),
            "latent_dim, event_shape and inverse_lipschitz, got MLPDecoder",
        ),
        (unusual_model(lambda f, z: f(z) + f(z)), "calls its decoder once, got 2 calls"),
        (unusual_model(lambda f, z: z), "calls its decoder once, got 0 calls"),
        (unusual_model(lambda f, z: f(2 * z)), "with the value of site 'z', got another input"),
    ],
)
def test_no_bound(call, message):
    with pytest.raises(UnavailableError, match=message):
        call()
