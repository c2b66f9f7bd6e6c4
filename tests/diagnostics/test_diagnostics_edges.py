"""The diagnostics at the edges: degenerate data, numbers that are none, and known mistakes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.known_models import (
    assert_within,
    chain_guide,
    chain_model,
    data_plate,
    reversed_chain_guide,
    scalar_guide,
    scalar_model,
)
from pyro import poutine
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import (
    active_units,
    active_units_of_draws,
    collapsed_dimensions,
    collapsed_fraction,
    evidence,
    kl_divergence,
    kl_per_dimension,
)

MEASURES = (kl_per_dimension, kl_divergence, active_units, evidence)


def test_one_datum_and_one_draw():
    x = torch.tensor([0.3])
    bounds = evidence(chain_model, chain_guide, x, num_samples=1)
    torch.testing.assert_close(bounds.elbo, bounds.log_likelihood)
    assert bounds.elbo_standard_errors.isnan().all()
    assert bounds.log_likelihood_standard_errors.isnan().all()
    torch.testing.assert_close(bounds.effective_sample_sizes, torch.ones(1))
    kl = kl_divergence(chain_model, chain_guide, x, num_samples=1)
    assert kl.values.shape == (1,)
    assert kl.standard_errors.isnan().all()
    assert kl_per_dimension(scalar_model, scalar_guide, x, num_samples=1).standard_errors.tolist() == [0.0]
    assert torch.isfinite(active_units(chain_model, chain_guide, torch.randn(3), site="z1", num_samples=1).variances)
    with pytest.raises(ValueError, match="at least two data"):
        active_units(scalar_model, scalar_guide, x)


def test_two_data_say_nothing_about_the_error_of_their_variance():
    units = active_units(scalar_model, scalar_guide, torch.tensor([0.0, 1.0]))
    assert units.variances.item() == pytest.approx(0.08)
    assert units.standard_errors.isnan().all()


def test_constant_data_and_dimensions_without_variance():
    def model(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[:, None] * torch.tensor([1.0, 0.0]), 1.0).to_event(1))

    units = active_units(model, guide, torch.full((6,), 3.0))
    assert units.variances.tolist() == [0.0, 0.0]
    assert units.standard_errors.tolist() == [0.0, 0.0]
    units = active_units(model, guide, torch.arange(6.0))
    assert units.active.tolist() == [True, False]
    kl = kl_per_dimension(model, guide, torch.full((6,), 3.0))
    assert kl.values.tolist() == [[4.5, 0.0]] * 6
    assert collapsed_dimensions(kl.values).tolist() == [False, True]


def test_one_latent_dimension_keeps_its_place():
    def model(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x[:, None], 1.0).to_event(1))

    for x in (torch.randn(1), torch.randn(4)):
        kl = kl_per_dimension(model, guide, x)
        torch.testing.assert_close(kl.values, x[:, None] ** 2 / 2)
        assert kl_divergence(model, guide, x).values.shape == x.shape
    assert active_units(model, guide, x).variances.shape == (1,)
    assert active_units(scalar_model, scalar_guide, x).variances.shape == ()


def nan_guide(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(torch.where(x > 0, math.nan, x), 1.0, validate_args=False))


def nan_likelihood(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, torch.where(x > 0, math.nan, 1.0), validate_args=False), obs=x)


def nan_prior(x):
    with data_plate(x):
        z = pyro.sample("z", dist.StudentT(torch.where(x > 0, math.nan, 2.0), validate_args=False))
        pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)


def test_nan_is_refused_with_the_name_of_its_site():
    x = torch.tensor([-1.0, 1.0])
    with pyro.validation_enabled(False):
        for model, guide, site in ((scalar_model, nan_guide, "z"), (nan_prior, scalar_guide, "z")):
            for measure in (kl_divergence, kl_per_dimension, evidence):
                with pytest.raises(ValueError, match=f"NaN at site.*'{site}'"):
                    measure(model, guide, x)
        with pytest.raises(ValueError, match=r"NaN at sites \['x'\]"):
            evidence(nan_likelihood, scalar_guide, x)
        with pytest.raises(ValueError, match="posterior means of site 'z' to be finite"):
            active_units(scalar_model, nan_guide, x)
        with pytest.raises(ValueError, match=r"NaN at sites \['z1', 'z2'\]"):
            kl_divergence(chain_model, chain_guide, torch.tensor([math.nan, 1.0]))


def test_a_draw_outside_of_the_support_is_refused_with_the_name_of_its_site():
    def positive(x):
        with data_plate(x):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for measure in (kl_divergence, evidence):
        with pytest.raises(ValueError, match="support at site 'z'"):
            measure(positive, scalar_guide, torch.randn(4))


def test_impossible_data_have_no_evidence():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("impossible", torch.where(x > 0, -math.inf, 0.0).expand(z.shape))

    x = torch.tensor([-1.0, 1.0])
    bounds = evidence(model, scalar_guide, x, num_samples=5000)
    assert bounds.elbo[1] == bounds.log_likelihood[1] == -math.inf
    assert bounds.effective_sample_sizes[1] == 0
    assert abs(bounds.log_likelihood[0]) < 5 * bounds.log_likelihood_standard_errors[0]


def test_some_draws_without_weight():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("positive", torch.where(z > 0, 0.0, -math.inf))

    def prior(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    bounds = evidence(model, prior, torch.zeros(50), num_samples=400)
    assert (bounds.elbo == -math.inf).all()
    assert_within(bounds.log_likelihood, torch.full((50,), -math.log(2)), bounds.log_likelihood_standard_errors)
    spread, stated = bounds.log_likelihood.std(), bounds.log_likelihood_standard_errors.mean()
    assert abs(float(stated / spread) - 1) < 0.4
    assert ((bounds.effective_sample_sizes / 400 - 0.5).abs() < 5 * 0.5 / 20).all()


def test_infinite_divergence():
    def model(x):
        with data_plate(x):
            pyro.sample("z", dist.Uniform(torch.zeros(2), 1.0, validate_args=False).to_event(1))

    def guide(x):
        with data_plate(x):
            wide = torch.stack([torch.ones_like(x), 1 + 3 * (x > 0)], -1)
            pyro.sample("z", dist.Uniform(0.0, wide).to_event(1))

    x = torch.tensor([-1.0, 1.0])
    for options in ({}, {"num_samples": 3}):
        kl = kl_per_dimension(model, guide, x, **options)
        assert kl.values.tolist() == [[0.0, 0.0], [0.0, math.inf]]
        assert kl_divergence(model, guide, x, **options).values.tolist() == [0.0, math.inf]
    curve = collapsed_fraction(kl_divergence(model, guide, x).values, [0.1, 10.0])
    assert curve.fractions.tolist() == [0.5, 0.5]
    assert collapsed_fraction(kl.values[:, 1]).fractions.tolist() == [0.5]


def test_infinite_divergence_by_draws_in_passes(monkeypatch):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Uniform(-0.5, z.new_full((), 0.5), validate_args=False))

    def guide(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("w", dist.Normal(z, 1.0))

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batches._MOST_PAIRS", 20)
    with pyro.validation_enabled(False):
        kl = kl_divergence(model, guide, torch.zeros(2), num_samples=100)
    assert kl.values.tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("delta", [0.29, 0.07, 0.57])
def test_delta_is_a_number_of_data(delta):
    above = round(delta * 100)
    kl = torch.zeros(100, 2)
    kl[:above, 0] = 1.0
    kl[: above + 1, 1] = 1.0
    assert collapsed_dimensions(kl, delta=delta).tolist() == [True, False]


# What the measures must not be.


def test_the_likelihood_is_not_the_mean_of_logarithms():
    x = torch.linspace(-2, 2, 5)
    bounds = evidence(scalar_model, scalar_guide, x, num_samples=20000)
    exact = Normal(0.0, 2**0.5).log_prob(x)
    elbo = exact - exact_kl(Normal(0.4 * x, 0.8), Normal(0.5 * x, 0.5**0.5))
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    assert_within(bounds.elbo, elbo, bounds.elbo_standard_errors)
    assert (exact - elbo > 5 * bounds.log_likelihood_standard_errors).all()


def test_active_units_are_of_the_data_set_and_not_of_its_batches():
    x = torch.arange(12.0)  # sorted, so that the means move between batches
    within = torch.stack([batch.var() for batch in x.split(4)]).mean() * 0.16
    units = active_units(scalar_model, scalar_guide, x, batch_size=4)
    torch.testing.assert_close(units.variances, 0.16 * x.var())
    assert units.variances > 5 * within


def test_scales_do_not_enter():
    x = torch.randn(5)

    def scaled(function):
        def call(x):
            with poutine.scale(scale=0.1), data_plate(x, full_size=1000):
                function(x)

        return call

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    bounds = evidence(scaled(model), scaled(guide), x, num_samples=5)
    torch.testing.assert_close(bounds.elbo, Normal(0.0, 2**0.5).log_prob(x))
    kl = kl_divergence(scaled(model), scaled(guide), x)
    torch.testing.assert_close(kl.values, exact_kl(Normal(x / 2, 0.5**0.5), Normal(0.0, 1.0)))


def test_units_of_draws_are_those_of_the_guide():
    x = torch.randn(40)
    draws = Normal(0.4 * x, 0.8).sample((3000,))
    of_draws, of_guide = active_units_of_draws(draws), active_units(scalar_model, scalar_guide, x)
    assert abs(of_draws.variances - of_guide.variances) < 0.02


@pytest.mark.parametrize("guide", [chain_guide, reversed_chain_guide])
def test_standard_errors_of_active_units(guide):
    def call(seed):
        x = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        units = active_units(chain_model, guide, x, site="z1", num_samples=10)
        return units.variances, units.standard_errors

    variances, errors = zip(*(call(seed) for seed in range(100)), strict=True)
    spread = torch.stack(variances).std()
    assert abs(float(torch.stack(errors).mean() / spread) - 1) < 0.3
    exact = (0.62 if guide is chain_guide else 0.5) ** 2
    assert_within(torch.stack(variances).mean(), torch.tensor(exact), spread / 10)
