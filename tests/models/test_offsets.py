"""Offsets: known shifts of natural parameters, such as the log of a size, in model, methods, start and diagnostics."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.models import FORMS, NUM_COMPONENTS, enumerated_in
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO

from pyro_ilvae import VAE, MixtureVAE, MLPDecoder, MLPEncoder, Nats, ProjectedDecoder, likelihoods
from pyro_ilvae.diagnostics import collapse_summary, guaranteed_information, mean_fisher_divergence
from pyro_ilvae.models._given import Given
from pyro_ilvae.models._start import working_data

N, D = 12, 6
SIZE = {"latent_dim": 2, "event_shape": D}
COUNTS = ["Poisson", "NegativeBinomial"]


def decoder(**options):
    return ProjectedDecoder(MLPDecoder(**SIZE, hidden_features=(8,)), **SIZE, map_features=(8,), **options)


def vae(likelihood=None, kind=None, **options):
    own = NUM_COMPONENTS if kind == "components" else None
    parts = decoder(), MLPEncoder(**SIZE, hidden_features=(8,), num_components=own), likelihood or likelihoods.Poisson()
    if kind in FORMS:
        return MixtureVAE(*parts, NUM_COMPONENTS, enumerate_in=enumerated_in(kind), **options)
    return VAE(*parts, **options)


def counts():
    return torch.poisson(3 * torch.rand(N, D))


def distribution(model, z, **given):
    return poutine.trace(poutine.condition(model.model, {"z": z})).get_trace(**given).nodes["x"]["fn"]


@pytest.mark.parametrize("name", COUNTS)
def test_an_offset_of_log_sizes_scales_the_mean(name):
    model, z, sizes = vae(getattr(likelihoods, name)()), torch.randn(N, 2), 100 * torch.rand(N) + 1
    one = distribution(model, z, num_data=N).base_dist.mean
    for offset in (sizes.log(), sizes.log()[:, None], sizes.log()[:, None].expand(N, D), sizes.log().double().numpy()):
        scaled = distribution(model, z, num_data=N, offset=offset).base_dist.mean
        torch.testing.assert_close(scaled, one * sizes[:, None], rtol=1e-4, atol=0)


def test_elbo_is_the_one_by_hand_and_the_guide_does_not_read_the_offset():
    model, x, offset = perturb(vae(), 0.2), counts(), torch.randn(N, D)

    def by_hand(x, offset):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = (model.decoder(z) + offset).exp()
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    losses = []
    for programs in ((model.model, model.guide), (by_hand, lambda x, offset: model.guide(x))):
        pyro.set_rng_seed(0)
        losses.append(Trace_ELBO().loss(*programs, x, offset=offset))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_offset_of_zeros_is_the_model_without_one():
    model, x = vae(), counts()
    losses = []
    for options in ({}, {"offset": torch.zeros(N)}, {"offset": [0] * N}):
        pyro.set_rng_seed(0)
        losses.append(Trace_ELBO().loss(model.model, model.guide, x, **options))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("kind", ["vae", *FORMS])
def test_methods_take_an_offset_or_give_the_mean_for_a_size_of_one(kind):
    model, x, offset = perturb(vae(kind=kind), 0.2), counts(), torch.linspace(-1, 1, N)
    unit = model.reconstruct(x)
    torch.testing.assert_close(model.reconstruct(x, offset=offset), unit * offset.exp()[:, None])
    torch.testing.assert_close(model.reconstruct(x, offset=offset, batch_size=5), unit * offset.exp()[:, None])
    drawn = [model.sample_prior(N, offset=own, mean=True, seed=0, batch_size=7) for own in (None, offset)]
    torch.testing.assert_close(drawn[1], drawn[0] * offset.exp()[:, None])
    if kind != "vae":
        drawn = [model.sample_component(1, N, offset=own, mean=True, seed=0) for own in (None, offset)]
        torch.testing.assert_close(drawn[1], drawn[0] * offset.exp()[:, None])
    if kind == "vae":
        found = Predictive(model.model, guide=model.guide, num_samples=2, parallel=True)(num_data=N, offset=offset)
        assert found["x"].shape == (2, N, D)


# The start.


@pytest.mark.parametrize("name", [*COUNTS, "Normal", "Bernoulli"])
def test_start_from_data_is_at_the_maximum_of_the_likelihood(name):
    """At z = 0 the decoder returns the b that solves the score equations of all data."""
    torch.manual_seed(0)
    likelihood, offset = getattr(likelihoods, name)(), 2 * torch.randn(4000)
    base = torch.linspace(-1, 1, D)
    x = likelihood(base + offset[:, None]).sample()
    model = vae(likelihood)
    model.initialize(x, offset=offset, seed=0)
    with torch.no_grad():
        start = model.decoder(torch.randn(4000, 2)).mean(0)
    torch.testing.assert_close(start, base, rtol=0, atol=0.25)


OF_COUNTS = {
    "poisson": likelihoods.Poisson,
    "negative-binomial": lambda: likelihoods.NegativeBinomial(torch.full((D,), 3.0)),
    "inflated-poisson": lambda: likelihoods.ZeroInflatedPoisson(0.1),
    "inflated-negative-binomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(3.0, 0.1),
}


@pytest.mark.parametrize("name", OF_COUNTS)
def test_working_data_of_counts_are_counts_over_sizes(name):
    likelihood, sizes = OF_COUNTS[name](), torch.exp(torch.randn(500))
    x = torch.poisson(2 * sizes[:, None] * torch.rand(500, D))
    given = [Given(500, x, offset=sizes.log()[:, None])]
    data = working_data(iter(given), likelihood, torch.Size([D]))
    expected = (x / sizes[:, None]).double() * sizes.log().mean().exp().double()
    torch.testing.assert_close(data.values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OF_COUNTS)
def test_start_with_features_that_are_absent(name):
    """A feature without counts in one batch, one without any, and one that is missing in all data."""
    x, labels = torch.poisson(3 * torch.rand(60, D)), torch.arange(60) % 2
    x[labels == 0, 0] = 0
    x[:, 1] = 0
    mask = torch.ones(60, D, dtype=torch.bool)
    mask[:, 2] = False
    sizes = {**SIZE, "context_dim": 2}
    for given in ({}, {"mask": mask}):
        own = ProjectedDecoder(MLPDecoder(**sizes), **sizes, map_features=(8,))
        model = VAE(own, MLPEncoder(**sizes, takes_mask=True), OF_COUNTS[name]())
        model.initialize(x, labels, offset=x.sum(1).clamp(min=1).log(), **given)
        assert all(parameter.isfinite().all() for parameter in own.parameters())


@pytest.mark.parametrize("name", OF_COUNTS)
def test_start_seeks_directions_beyond_the_sizes(name):
    """The sizes alone are not a direction of z, and the noise unit is the one at the mean size."""
    torch.manual_seed(0)
    direction = torch.linalg.qr(torch.randn(D, 1)).Q[:, 0]
    direction = direction - direction.mean()
    direction = direction / direction.norm()
    z, sizes = torch.randn(4000), torch.exp(4 + torch.randn(4000))
    x = torch.poisson(sizes[:, None] * torch.exp(0.5 * z[:, None] * direction - 2))
    sizes_of = {"latent_dim": 1, "event_shape": D}
    columns = []
    for offset in (None, sizes.log()):
        likelihood = OF_COUNTS[name]()
        own = ProjectedDecoder(
            MLPDecoder(**sizes_of), **sizes_of, map_features=(8,), inverse_lipschitz=Nats(0.5, likelihood)
        )
        model = VAE(own, MLPEncoder(**sizes_of), likelihood)
        model.initialize(x, offset=offset, seed=0)
        columns.append(own.frame.embed(torch.ones(1)).detach())
    assert abs(columns[0] @ direction) < 0.5 < 0.95 < abs(columns[1] @ direction)
    if name != "poisson":
        return
    # exp(-4 / 2) e^(2 / 2): one over the root of the mean rate at the mean of the log sizes.
    assert own.inverse_lipschitz / Nats(0.5, likelihood).ratio == pytest.approx(math.exp(-1), rel=0.1)


@pytest.mark.parametrize("offset", [torch.linspace(1e3, 1e4, N), -400 * torch.rand(N)], ids=["sizes", "tiny"])
def test_start_with_offsets_that_are_no_logs_of_sizes(offset):
    with pytest.raises(ValueError, match="Expected offset on the scale of natural parameters"):
        vae().initialize(counts(), offset=offset)


# Diagnostics.


def test_normal_noise_keeps_its_floor_and_the_fisher_information_has_an_offset():
    model = vae(likelihoods.Normal(0.5))
    x, offset = torch.randn(N, D), torch.randn(N)
    summary = collapse_summary(model.model, model.guide, x, model_kwargs={"offset": offset}, seed=0)
    assert summary["guaranteed_floor"].item() == pytest.approx(guaranteed_information(model).floor, rel=1e-5)
    assert "model_fisher" not in summary
    assert "offset" in summary.attrs["notes"]
    counts_model = vae()
    one, shifted = (
        mean_fisher_divergence(own, counts_model.likelihood, seed=0)
        for own in (counts_model.decoder, counts_model.decoder.given(offset=1.5))
    )
    assert shifted.total == pytest.approx(one.total * math.exp(1.5), rel=1e-4)
    at_zero = mean_fisher_divergence(counts_model.decoder.given(offset=torch.zeros(D)), counts_model.likelihood, seed=0)
    assert at_zero.total == pytest.approx(one.total, rel=1e-5)


# What is refused.

SIZES = torch.tensor([10.0] * (N - 1) + [-3.0])


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (SIZES.log(), "log of a size above 0"),
        (torch.zeros(N).log(), "log of a size above 0"),
        (torch.zeros(N - 1), "offset of shape"),
        (torch.zeros(N, D - 1), "offset of shape"),
        (torch.zeros(N, 1, 1), "offset of shape"),
        (torch.zeros(1, D), "offset of shape"),
        (torch.zeros(()), "offset of shape"),
        (torch.zeros(N) * 1j, "offset to hold real numbers"),
        (torch.zeros(N, D).to_sparse(), "offset to be a dense tensor"),
        ("log", "offset to be a tensor"),
    ],
)
@pytest.mark.parametrize("kind", ["vae", "summed-out"])
def test_wrong_offsets_name_the_argument(kind, offset, message):
    model, x = vae(kind=kind), counts()
    for name in ("model", "guide", "reconstruct", "create_plates", "initialize"):
        if name == "model" and kind != "vae":  # which needs an objective that enumerates
            continue
        with pytest.raises((ValueError, TypeError), match=f"Expected {message}|Expected.*{message}"):
            getattr(model, name)(x, offset=offset)
    with pytest.raises((ValueError, TypeError), match="offset"):
        model.sample_prior(N, offset=offset)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither"),
        ({"offset": torch.zeros(D - 1)}, "offset"),
        ({"offset": math.nan}, "offset"),
        ({"context": torch.zeros(3)}, "no context"),
        ({"context": torch.zeros(3), "offset": 1.0}, "no context"),
    ],
)
def test_a_decoder_given_something_wrong(given, message):
    with pytest.raises(ValueError, match=f"Expected.*{message}"):
        decoder().given(**given)
