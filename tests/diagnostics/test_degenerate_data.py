"""The diagnostics on few or constant data, on NaN and infinity, and on impossible data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_within
from helpers.latent_structures import chain_guide, chain_model, data_plate, scalar_guide, scalar_model

from pyro_ilvae.diagnostics import (
    active_units,
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
