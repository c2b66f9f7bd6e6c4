"""The KL divergence of each latent dimension, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.factor_models import (
    LOADING,
    SCALE,
    N,
    expected_kl,
    flow_guide,
    global_guide,
    global_model,
    mean_field_guide,
    sum_model,
)
from helpers.latent_structures import data_plate, scalar_guide, scalar_model
from pyro import poutine
from torch.distributions import Normal

from pyro_ilvae import anneal
from pyro_ilvae.diagnostics import active_units, kl_divergence, kl_per_dimension


@pytest.mark.parametrize("batch_size", [None, 1, 7, 1000])
def test_kl_is_analytic(batch_size):
    x = torch.randn(N)
    kl = kl_per_dimension(sum_model, mean_field_guide, x, batch_size=batch_size)
    assert kl.estimator == "analytic"
    torch.testing.assert_close(kl.values, expected_kl(x))


def test_kl_is_sampled_where_there_is_no_formula():
    def student_prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, torch.zeros(3), 1.0).to_event(1))

    x = torch.randn(4)
    kl = kl_per_dimension(student_prior, mean_field_guide, x, num_samples=20000)
    assert kl.estimator == "sampled"
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None, None]
    q = Normal((x[:, None] * LOADING).double(), SCALE.double().expand(4, 3))
    integrand = q.log_prob(grid).exp() * (q.log_prob(grid) - dist.StudentT(5.0).log_prob(grid))
    torch.testing.assert_close(kl.values, torch.trapezoid(integrand, grid, dim=0).float(), atol=0.03, rtol=0)


def test_kl_ignores_subsampling_and_handlers_around_the_call():
    x = torch.randn(N)

    def scaled(x):
        with pyro.plate("data", 100 * len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with anneal(beta=0.1), poutine.trace() as outer:
        kl = kl_per_dimension(scaled, mean_field_guide_scaled, x)
    torch.testing.assert_close(kl.values, expected_kl(x))
    assert not [name for name, site in outer.trace.nodes.items() if site["type"] == "sample"]


def mean_field_guide_scaled(x):
    with pyro.plate("data", 100 * len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(x[:, None] * LOADING, SCALE).to_event(1))


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kl_per_dimension(sum_model, mean_field_guide, X, site="y"),
            r"latent site of the guide, one of \['z'\]",
        ),
        (lambda: kl_per_dimension(sum_model, mean_field_guide, X, site="x"), "got 'x'"),
        (lambda: kl_per_dimension(sum_model, flow_guide, X), "site 'z' to factorize"),
        (
            lambda: kl_per_dimension(global_model, global_guide, X, site="a", batch_size=2),
            r"batch_size=None where data share sites, here \[.a.\], got 2",
        ),
        (lambda: kl_per_dimension(sum_model, mean_field_guide, X[:0]), "at least one datum in model_args, got none"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
