"""Decoders and likelihoods written outside of the package are treated as the package's own, with the same numbers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ilvae import VAE, InverseLipschitzDecoder, MLPDecoder, MLPEncoder, ProjectedDecoder, likelihoods, mlp
from pyro_ilvae.diagnostics import (
    UnavailableError,
    collapse_summary,
    fisher_bound,
    lipschitz_audit,
    mean_fisher_divergence,
    separation,
)

K, D = 2, 6


class OwnDecoder(nn.Module):
    """The function, constant, coordinates and bounded part of another decoder, and nothing else of it."""

    def __init__(self, other):
        super().__init__()
        self.other = other
        self.latent_dim, self.event_shape = other.latent_dim, other.event_shape
        if hasattr(other, "bounded_part"):
            self.bounded_part = other.bounded_part
        if hasattr(other, "coordinates"):
            self.coordinates = other.coordinates
        if hasattr(other, "inverse_lipschitz"):
            self.inverse_lipschitz = other.inverse_lipschitz

    def forward(self, z):
        return self.other(z)


class OwnNormal:
    """Normal noise that says what a likelihood may say about itself."""

    def __init__(self, scale):
        self.noise_scale = torch.tensor(scale)

    def __call__(self, eta, x=None):
        return dist.Normal(eta, self.noise_scale)

    def divergence(self, eta, other):
        return 0.5 * ((eta.double() - other.double()) / self.noise_scale.double()).square()

    def information_product(self, eta, tangent):
        return tangent / self.noise_scale.square()

    def smallest_information(self, eta):
        return torch.ones_like(eta) / self.noise_scale.square()


class OwnBernoulli:
    def __call__(self, eta, x=None):
        return dist.Bernoulli(logits=eta)

    def divergence(self, eta, other):
        p = eta.double().sigmoid()
        log_odds = eta.double() - other.double()
        softplus = nn.functional.softplus
        return p * log_odds + softplus(other.double()) - softplus(eta.double())

    def information_product(self, eta, tangent):
        return eta.sigmoid() * (-eta).sigmoid() * tangent

    def smallest_information(self, eta):
        return eta.sigmoid() * (-eta).sigmoid()


DECODERS = {
    "composition": lambda k: InverseLipschitzDecoder(
        latent_dim=k, event_shape=D, inverse_lipschitz=(0.6, 0.9), map_features=(8,)
    ),
    "projected": lambda k: ProjectedDecoder(mlp(k, (8,), D), latent_dim=k, event_shape=D, inverse_lipschitz=0.5),
    "plain": lambda k: MLPDecoder(latent_dim=k, event_shape=D, hidden_features=(8,)),
}
PAIRS = {"normal": (likelihoods.Normal(0.3), OwnNormal(0.3)), "bernoulli": (likelihoods.Bernoulli(), OwnBernoulli())}


def assert_same(first, second):
    for value, other in zip(first, second, strict=True):
        if isinstance(value, tuple):
            assert_same(value, other)
        elif value is None or isinstance(value, str):
            assert value == other
        else:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", DECODERS)
def test_measures_of_decoders_are_the_same(kind, name):
    decoder, (likelihood, own) = DECODERS[kind](K), PAIRS[name]
    options = {"seed": 0, "num_samples": 50}
    result = mean_fisher_divergence(OwnDecoder(decoder), own, **options)
    assert_same(mean_fisher_divergence(decoder, likelihood, **options), result)
    assert result.estimator == "analytic"
    assert (result.floor is None) == (kind == "plain")
    measured = separation(OwnDecoder(decoder), own, seed=0, num_pairs=50)
    assert_same(separation(decoder, likelihood, seed=0, num_pairs=50), measured)
    assert measured.estimator == "analytic"
    assert (measured.guaranteed is None) == (kind == "plain" or name == "bernoulli")
    audit = {"seed": 0, "num_samples": 30, "steps": 3}
    assert_same(lipschitz_audit(decoder, **audit), lipschitz_audit(OwnDecoder(decoder), **audit))


class OwnModel:
    """A VAE written by hand."""

    def __init__(self, decoder, likelihood, encoder):
        self.decoder, self.likelihood, self.encoder = decoder, likelihood, encoder

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.decoder.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))


@pytest.mark.parametrize(("kind", "latent_dim"), [("composition", K), ("composition", D), ("projected", D)])
def test_bounds_of_each_datum_are_the_same(kind, latent_dim):
    decoder, x = DECODERS[kind](latent_dim).double(), torch.randn(7, D, dtype=torch.float64)
    encoder = MLPEncoder(event_shape=D, latent_dim=latent_dim, hidden_features=(8,)).double()
    vae = VAE(decoder, encoder, likelihoods.Normal(0.3)).double()
    own = OwnModel(OwnDecoder(decoder), OwnNormal(0.3), encoder)
    result = fisher_bound(own.model, own.guide, x, num_samples=40, seed=0)
    assert (result.ratio >= 1 - 1e-4).all()
    assert_same(fisher_bound(vae.model, vae.guide, x, num_samples=40, seed=0), result)
    summaries = [collapse_summary(pair.model, pair.guide, x, num_samples=40, seed=0) for pair in (vae, own)]
    assert "fisher_bound" in summaries[1]
    assert "model_fisher_floor" in summaries[1]
    for name, values in summaries[0].items():
        if values.dtype.kind == "f":
            torch.testing.assert_close(*(torch.tensor(s[name].values) for s in summaries), rtol=1e-4, atol=1e-6)


def test_a_bounded_part_is_enough():
    decoder = DECODERS["composition"](K)
    part_alone = OwnDecoder(decoder)
    del part_alone.inverse_lipschitz
    encoder, x = MLPEncoder(event_shape=D, latent_dim=K, hidden_features=(8,)), torch.randn(5, D)
    vae, own = (OwnModel(which, OwnNormal(0.3), encoder) for which in (decoder, part_alone))
    expected, result = (fisher_bound(m.model, m.guide, x, num_samples=20, seed=0) for m in (vae, own))
    assert_same(expected, result)


class Conditional(nn.Module):
    """A decoder that needs more than z."""

    latent_dim, event_shape, conditional, inverse_lipschitz = K, torch.Size([K]), True, 1.0

    def forward(self, z, context):
        return z + context


class WithGiven(Conditional):
    def given(self, context):
        return lambda z: self(z, context)


@pytest.mark.parametrize(
    ("decoder", "way"),
    [
        (WithGiven(), r"got WithGiven, which needs more than z: pass decoder.given\(\.\.\.\)"),
        (Conditional(), r"got Conditional, which needs more than z: pass lambda z: decoder\(z, context\)"),
    ],
)
def test_a_decoder_that_needs_more_than_z_is_refused_with_the_way_out(decoder, way):
    likelihood = OwnNormal(1.0)
    own = OwnModel(decoder, likelihood, MLPEncoder(event_shape=K, latent_dim=K, hidden_features=(8,)))
    for call in (
        lambda: lipschitz_audit(decoder),
        lambda: mean_fisher_divergence(decoder, likelihood),
        lambda: separation(decoder, likelihood),
        lambda: fisher_bound(own.model, own.guide, torch.randn(3, K)),
    ):
        with pytest.raises(UnavailableError, match=way):
            call()
    audit = lipschitz_audit(WithGiven().given(torch.ones(K)), latent_dim=K, num_samples=20, steps=2)
    assert audit.smallest == pytest.approx(1.0, rel=1e-3)


def test_a_summary_notes_a_decoder_that_needs_more_than_z():
    class GivenBefore(OwnModel):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(K), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z, x), 1.0).to_event(1), obs=x)

    own = GivenBefore(Conditional(), OwnNormal(1.0), MLPEncoder(event_shape=K, latent_dim=K, hidden_features=(8,)))
    summary = collapse_summary(own.model, own.guide, torch.randn(5, K), num_samples=10)
    assert "model_fisher: Expected a decoder of z alone" in summary.notes
    assert "fisher_bound: Expected a decoder of z alone" in summary.notes
    assert "model_fisher" not in summary
    assert math.isfinite(summary.posterior_fisher)
