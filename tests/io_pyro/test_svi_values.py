"""The values that the conversion of a variational fit gives, on models in plain Pyro."""

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import PASSES, assert_same, values
from helpers.plain_pyro_models import (
    conjugate_guide,
    conjugate_model,
    hierarchical_model,
)
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_ilvae.io_pyro import from_pyro_svi


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_pass", [1, 300, None])
def test_draws_have_the_law_of_the_guide_and_of_the_model(samples_per_pass):
    x = torch.tensor([1.0, 2.0, 4.0])
    n = 600 if samples_per_pass == 1 else 3000
    fit = from_pyro_svi(
        (conjugate_model, conjugate_guide), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass, seed=1
    )
    prior, posterior = (0.0, 1.0), (7 / 4, 1 / 4)
    for group, (mean, variance) in {
        "posterior": posterior,
        "prior": prior,
        "posterior_predictive": (posterior[0], posterior[1] + 1.0),
        "prior_predictive": (prior[0], prior[1] + 1.0),
    }.items():
        for draws in np.moveaxis(np.atleast_3d(next(iter(values(fit, group).values()))), -1, 0):
            assert abs(draws.mean() - mean) < 5 * (variance / n) ** 0.5
            assert abs(draws.var() - variance) < 5 * variance * (2 / n) ** 0.5


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_log_likelihood_is_that_of_each_draw_and_datum(samples_per_pass):
    x = torch.randn(5)
    fit = from_pyro_svi(
        (conjugate_model, conjugate_guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass
    )
    mu = torch.tensor(values(fit, "posterior")["mu"])
    expected = dist.Normal(mu[..., None], 1.0).log_prob(x).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-5)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_predictive_draws_follow_their_own_latent_draw(samples_per_pass):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1e-6), obs=x)

    x = torch.zeros(3)
    fit = from_pyro_svi((model, conjugate_guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    for latent, predictive in [("posterior", "posterior_predictive"), ("prior", "prior_predictive")]:
        mu = values(fit, latent)["mu"]
        assert len(np.unique(mu)) == 10
        np.testing.assert_allclose(values(fit, predictive)["x"], np.broadcast_to(mu[..., None], (1, 10, 3)), atol=1e-4)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_deterministic_sites_are_those_of_their_draw(samples_per_pass):
    x = torch.randn(2, 3, 2)
    guide = AutoNormal(hierarchical_model)
    arguments = {"num_samples": 10, "samples_per_pass": samples_per_pass, "log_likelihood": False}
    fit = from_pyro_svi((hierarchical_model, guide), model_args=(x,), **arguments)
    for group in ["posterior", "prior"]:
        draws = values(fit, group)
        np.testing.assert_allclose(draws["norm"], np.sqrt(np.square(draws["weight"]).sum((-2, -1))), rtol=1e-5)
        shifted = draws["loc"][:, :, :, None] + draws["local"][..., None]
        np.testing.assert_allclose(draws["shifted"], shifted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_vector_events_are_summed_out_of_the_log_likelihood(samples_per_pass):
    x = torch.randn(2, 3, 2)
    guide = AutoNormal(hierarchical_model)
    arguments = {"num_samples": 10, "samples_per_pass": samples_per_pass, "log_likelihood": "conditional"}
    fit = from_pyro_svi((hierarchical_model, guide), model_args=(x,), **arguments)
    shifted = torch.tensor(values(fit, "posterior")["shifted"])
    expected = dist.Normal(shifted, 1.0).log_prob(x).sum(-1).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)


@pytest.mark.parametrize("samples_per_pass", PASSES)
@pytest.mark.parametrize("scaled", [poutine.scale(scale=0.1), poutine.scale(scale=torch.tensor(7.0))])
def test_log_likelihood_ignores_scales(samples_per_pass, scaled):
    x = torch.randn(5)
    arguments = {"model_args": (x,), "num_samples": 10, "samples_per_pass": samples_per_pass, "seed": 3}
    plain = from_pyro_svi((conjugate_model, conjugate_guide), **arguments)
    annealed = from_pyro_svi((scaled(conjugate_model), scaled(conjugate_guide)), **arguments)
    assert_same(plain, annealed)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_masked_elements_have_no_log_likelihood(samples_per_pass):
    mask = torch.tensor([True, False, True])

    def model(x):
        with poutine.mask(mask=mask):
            conjugate_model(x)

    arguments = {"model_args": (torch.randn(3),), "num_samples": 10, "samples_per_pass": samples_per_pass, "seed": 0}
    plain = values(from_pyro_svi((conjugate_model, conjugate_guide), **arguments), "log_likelihood")["x"]
    masked = values(from_pyro_svi((model, conjugate_guide), **arguments), "log_likelihood")["x"]
    np.testing.assert_array_equal(masked, np.where(mask.numpy(force=True), plain, 0.0))


def test_observed_data_is_a_copy_of_the_data():
    x = torch.randn(5)
    fit = from_pyro_svi((conjugate_model, conjugate_guide), model_args=(x,), num_samples=2)
    expected = x.numpy(force=True).copy()
    x.zero_()
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], expected)


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_draws_of_a_point_estimate_are_copies_of_it(samples_per_pass):
    guide = AutoDelta(conjugate_model)
    fit = from_pyro_svi(
        (conjugate_model, guide), model_args=(torch.ones(3),), num_samples=10, samples_per_pass=samples_per_pass
    )
    expected = guide.median()["mu"].item()
    with torch.no_grad():
        guide.mu.add_(1.0)
    assert np.unique(values(fit, "posterior")["mu"]).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_discrete_observations(samples_per_pass):
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("count", dist.Poisson(rate), obs=x)
            pyro.sample("kind", dist.Categorical(probs), obs=x.long() % 3)

    x = torch.tensor([0.0, 1.0, 2.0, 7.0])
    guide = AutoMultivariateNormal(model)
    fit = from_pyro_svi((model, guide), model_args=(x,), num_samples=10, samples_per_pass=samples_per_pass)
    draws = values(fit, "posterior")
    counts, kinds = values(fit, "posterior_predictive")["count"], values(fit, "posterior_predictive")["kind"]
    assert kinds.dtype == np.int64
    assert set(np.unique(kinds)) <= {0, 1, 2}
    np.testing.assert_array_equal(counts, counts.round())
    expected = np.log(draws["probs"])[..., x.long().numpy(force=True) % 3]
    np.testing.assert_allclose(values(fit, "log_likelihood")["kind"], expected, rtol=1e-4)


# Subsampling


def subsampled(**plate):
    data = torch.linspace(-1.0, 1.0, 100)

    def model(x=data):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, **plate) as index:
            local = pyro.sample("local", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(local, 1.0), obs=x[index])

    return model, data


@pytest.mark.parametrize("samples_per_pass", [1, 4])
@pytest.mark.parametrize("plate", [{"subsample_size": 5}, {"subsample": torch.tensor([40, 7, 99])}, {}])
@pytest.mark.parametrize("make_guide", [AutoNormal, AutoDelta])
def test_subsampled_plates_are_held_at_the_indices_of_their_coordinate(plate, make_guide, samples_per_pass):
    model, data = subsampled(**plate)
    guide = make_guide(model)
    guide()
    locs = torch.randn(100)  # the guide has a parameter for each of the 100 data
    with torch.no_grad():
        next(value for name, value in guide.named_parameters() if "local" in name).copy_(locs)
    fit = from_pyro_svi((model, guide), num_samples=6, samples_per_pass=samples_per_pass, log_likelihood="conditional")
    index = torch.tensor(fit["posterior"].coords["data"].values)
    if "subsample" in plate:
        np.testing.assert_array_equal(index.numpy(force=True), plate["subsample"].numpy(force=True))
    else:
        np.testing.assert_array_equal(index.numpy(force=True), np.arange(plate.get("subsample_size", 100)))
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], data[index].numpy(force=True))
    local = torch.tensor(values(fit, "posterior")["local"])
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(local, 1.0).log_prob(data[index]).numpy(force=True), rtol=1e-5
    )
    np.testing.assert_allclose(
        local[0].mean(0).numpy(force=True),
        locs[index].numpy(force=True),
        atol=1e-6 if make_guide is AutoDelta else 0.25,
    )


def test_a_minibatch_in_a_plate_of_the_size_of_the_data():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(4)
    fit = from_pyro_svi((model, AutoNormal(model)), model_args=(x,), num_samples=6, samples_per_pass=4)
    loc = torch.tensor(values(fit, "posterior")["loc"])[..., None]
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(loc, 1.0).log_prob(x).numpy(force=True), rtol=1e-5
    )
    np.testing.assert_array_equal(values(fit, "observed_data")["x"], x.numpy(force=True))
