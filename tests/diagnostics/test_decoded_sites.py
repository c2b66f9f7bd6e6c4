"""The decoder of a model is found by what it does, and its bound is refused where its conditions do not hold."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.fisher_models import Linear
from pyro.nn import PyroModule
from torch import nn

from pyro_ilvae import VAE, InverseLipschitzDecoder, MLPEncoder, likelihoods
from pyro_ilvae.diagnostics import (
    UnavailableError,
    collapse_summary,
    fisher_bound,
    posterior_fisher_divergence,
    posterior_fisher_divergence_of_draws,
)

D = 2
WEIGHT = torch.tensor([[1.5, 0.2], [-0.3, 2.0]])
X = torch.linspace(-2.0, 2.0, 12).reshape(6, D)
NOISE = likelihoods.Normal(0.7)


def plate(x):
    return pyro.plate("data", len(x))


def normal(loc, scale=1.0):
    return dist.Normal(loc, scale).to_event(1)


def guide_of(*sites):
    def guide(x):
        with plate(x):
            for site in sites:
                pyro.sample(site, normal(x / 3, 0.7))

    return guide


def model_of(decoder, data, site="code"):
    """A model of a site whose prior is N(0, I), with ``data`` that makes the rest of it."""

    def model(x):
        with plate(x):
            data(pyro.sample(site, normal(torch.zeros(D))), decoder, x)

    return model


def observed(eta, x, name="x"):
    return pyro.sample(name, NOISE(eta).to_event(1), obs=x)


def beside(z, f, x):
    """A second head, with a bound that happens to lie below the value."""
    observed(f(z), x)
    pyro.sample("y", normal(3.0 * z), obs=x)


def in_the_noise(z, f, x):
    pyro.sample("x", normal(f(z), z.square().mean(-1, keepdim=True).exp()), obs=x)


def in_a_factor(z, f, x):
    observed(f(z), x)
    pyro.factor("penalty", -0.01 * z.square().sum(-1))


def through_a_latent_site(z, f, x):
    w = pyro.sample("w", normal(z))
    observed(f(z) + w, x)


def through_an_enumerated_site(z, f, x):
    y = pyro.sample("y", dist.Bernoulli(logits=z[..., 0]))
    pyro.sample("x", normal(f(z) + 2 * y.unsqueeze(-1)), obs=x)


def decoded_into_a_latent_site(z, f, x):
    observed(pyro.sample("w", normal(f(z))), x)


PATHS = {
    beside: ("code", "through the decoder alone"),
    in_the_noise: ("code", "through the decoder alone"),
    in_a_factor: ("code", "through the decoder alone"),
    through_an_enumerated_site: ("code", "through the decoder alone"),
    through_a_latent_site: ("code w", r"without other drawn sites in between, got \['w'\]"),
    decoded_into_a_latent_site: ("code w", r"without other drawn sites in between, got \['w'\]"),
    (lambda z, f, x: observed(f(z) + f(z), x)): ("code", "calls its decoder once, got 2 calls"),
    (lambda z, f, x: observed(f(2 * z), x)): ("code", "with the value of site 'code', got another input"),
    (lambda z, f, x: observed(z, x)): ("code", "calls its decoder once, got 0 calls"),
}


@pytest.mark.parametrize("data", PATHS)
def test_no_bound_where_z_reaches_the_data_by_another_path(data):
    sites, message = PATHS[data]
    decoder = Linear(WEIGHT)
    model, guide = model_of(decoder, data), guide_of(*sites.split())
    with pytest.raises(UnavailableError, match=message):
        fisher_bound(model, guide, X, decoder=decoder, site="code", num_samples=20)
    model.decoder = decoder
    model.likelihood = NOISE
    summary = collapse_summary(model, guide, X, num_samples=20, measures=["fisher", "decoder"])
    assert math.isnan(summary.get("fisher_bound", math.nan))
    assert "model_fisher" not in summary
    assert "fisher_bound: " in summary.notes
    assert "model_fisher: " in summary.notes


def test_no_bound_of_a_constant_that_does_not_hold():
    decoder = Linear(WEIGHT)
    model, guide = model_of(decoder, lambda z, f, x: observed(f(z), x)), guide_of("code")
    assert (fisher_bound(model, guide, X, decoder=decoder, num_samples=20).ratio >= 1).all()
    decoder.inverse_lipschitz = 10.0
    with pytest.raises(UnavailableError, match="Linear does not keep the constant that it carries"):
        fisher_bound(model, guide, X, decoder=decoder, num_samples=20)


def mixed(x):
    """A path by the component that is summed over and does not depend on z, which is none."""
    with plate(x):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        z = pyro.sample("code", normal(4.0 * y.unsqueeze(-1) + torch.zeros(D)))
        observed(mixed.decoder(z), x)


mixed.decoder = Linear(WEIGHT)


def with_component(x):
    with plate(x):
        pyro.sample("y", dist.Bernoulli(0.5))
        pyro.sample("code", normal(x / 3, 0.7))


@pytest.mark.parametrize("guide", [guide_of("code"), with_component])
def test_a_component_of_the_prior_is_no_second_path(guide):
    result = fisher_bound(mixed, guide, X, decoder=mixed.decoder, site="code", num_samples=50)
    assert (result.ratio >= 1 - 1e-4).all()


class Own(PyroModule):
    """A model whose parts have names and places of their own."""

    def __init__(self):
        super().__init__()
        self.generator, self.noise = Linear(WEIGHT), likelihoods.Normal(0.7)

    def forward(self, x, shift=0.0):
        with plate(x):
            z = pyro.sample("code", normal(torch.full((D,), shift)))
            pyro.sample("picture", self.noise(self.generator(z)).to_event(1), obs=x)


class Wrapped(nn.Module):
    """A decoder inside a network without a constant."""

    def __init__(self):
        super().__init__()
        self.inside = Linear(WEIGHT)

    def forward(self, z):
        return self.inside(z)


def layers(x):
    with plate(x):
        above = pyro.sample("above", normal(torch.zeros(D)))
        observed(layers.parts[0](pyro.sample("code", normal(above))), x)


layers.parts = [Linear(WEIGHT)]


def in_a_function(decoder):
    return model_of(decoder, lambda z, f, x: observed(f(z), x))


OWN = Own()
MODELS = {
    "function": in_a_function(Linear(WEIGHT)),
    "module": OWN,
    "lambda": lambda x: OWN(x),
    "partial": functools.partial(OWN, shift=0.0),
    "inside a network": in_a_function(Wrapped()),
    "two layers": layers,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_decoder_is_found_by_what_it_is_called_with(name):
    model, guide = MODELS[name], guide_of("above", "code") if name == "two layers" else guide_of("code")
    summary = collapse_summary(model, guide, X, num_samples=400, measures=["fisher", "decoder"], seed=0)
    assert summary.fisher_ratio >= 1 - 1e-4
    # Linear with Normal noise: ||W||^2 / sigma^2, whatever the prior.
    assert float(summary.model_fisher) == pytest.approx(float(WEIGHT.square().sum()) / 0.49, rel=1e-3)
    if name == "inside a network":
        assert math.isnan(summary.model_fisher_floor) or summary.model_fisher_floor > 0
    assert "fisher_bound" not in summary.notes


def test_a_bound_method_in_a_partial_has_the_parts_of_its_object():
    vae = VAE(
        InverseLipschitzDecoder(latent_dim=D, event_shape=4, inverse_lipschitz=0.5, map_features=(8,)),
        MLPEncoder(event_shape=4, latent_dim=D, hidden_features=(8,)),
        likelihoods.Bernoulli(),
    )
    x = torch.rand(5, 4).round()
    options = {"num_samples": 50, "measures": ["fisher", "decoder"], "seed": 0}
    whole = collapse_summary(vae.model, vae.guide, x, **options)
    for model in (functools.partial(vae.model, num_data=3), lambda x: vae.model(x)):
        other = collapse_summary(model, lambda x: vae.guide(x), x, **options)
        for name in ("fisher_bound", "fisher_ratio", "model_fisher", "model_fisher_floor"):
            assert float(other[name]) == pytest.approx(float(whole[name]), rel=1e-5)
    compiled = vae.decoder
    compiled._compiled_call_impl = compiled.forward  # what torch.compile leaves of a module's call: no hooks
    other = collapse_summary(vae.model, vae.guide, x, **options)
    assert float(other.fisher_bound) == pytest.approx(float(whole.fisher_bound), rel=1e-5)


def test_notes_say_what_to_do_where_no_decoder_is_found():
    summary = collapse_summary(lambda x: noise_alone(x), guide_of("code"), X, num_samples=5)
    assert "model_fisher: Expected a model that calls a decoder" in summary.notes
    assert "mean_fisher_divergence(decoder, likelihood, sampler=...)" in summary.notes
    two = model_of(None, lambda z, _, x: observed(first(z) + second(z), x))
    first, second = Linear(WEIGHT), Linear(WEIGHT)
    summary = collapse_summary(two, guide_of("code"), X, num_samples=5)
    assert (
        "fisher_bound: Expected one module that decodes a latent site, got calls of ['Linear', 'Linear']"
        in summary.notes
    )
    assert "posterior_fisher" in summary
    plain = model_of(Linear(WEIGHT), lambda z, f, x: pyro.sample("x", normal(f(z)), obs=x))
    summary = collapse_summary(plain, guide_of("code"), X, num_samples=5)
    assert summary.fisher_ratio >= 1 - 1e-4
    assert "model_fisher: Expected a likelihood that the model calls with its decoder's output" in summary.notes


def noise_alone(x):
    with plate(x):
        pyro.sample("x", normal(pyro.sample("code", normal(torch.zeros(D)))), obs=x)


def test_a_layer_that_reaches_the_data_through_another_has_no_divergence_of_its_own():
    guide = guide_of("above", "code")
    message = r"Expected site 'above' to reach the data without other drawn sites in between, got \['code'\]"
    with pytest.raises(UnavailableError, match=message):
        posterior_fisher_divergence(layers, guide, X, sites=["above"], num_samples=20)
    draws = {name: torch.randn(20, len(X), D) for name in ("above", "code")}
    with pytest.raises(UnavailableError, match=message):
        posterior_fisher_divergence_of_draws(layers, draws, X, sites=["above"])
    both, below = (
        posterior_fisher_divergence(layers, guide, X, sites=sites, num_samples=50, seed=0) for sites in (None, ["code"])
    )
    torch.testing.assert_close(both.values, below.values)


def test_a_discrete_site_in_between_is_noted_in_place_of_a_zero():
    def model(x):
        with plate(x):
            z = pyro.sample("code", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Bernoulli(logits=3 * z))
            pyro.sample("x", normal(4.0 * y.unsqueeze(-1)), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("code", dist.Normal(x[:, 0], 1.0))
            pyro.sample("y", dist.Bernoulli(0.5).expand([len(x)]))

    summary = collapse_summary(model, guide, X, num_samples=20)
    assert "posterior_fisher" not in summary
    assert "posterior_fisher: Expected site 'code' to reach the data without other drawn sites" in summary.notes
    # Summed over, it is no site in between.
    summary = collapse_summary(model, lambda x: guide_alone(x), X, num_samples=200)
    assert float(summary.posterior_fisher) > 0.1


def guide_alone(x):
    with plate(x):
        pyro.sample("code", dist.Normal(x[:, 0] / 2, 1.0))
