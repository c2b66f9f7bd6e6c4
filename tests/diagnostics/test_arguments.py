"""What the diagnostics are called with: the arguments of model and guide, and the names of sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.factor_models import N, mean_field_guide, sum_model
from helpers.fisher_models import Linear
from helpers.latent_structures import (
    chain_guide,
    chain_model,
    empty_guide,
    exact_mixture_guide,
    gmvae_guide,
    gmvae_model,
    mixture_model,
)

from pyro_ilvae.diagnostics import (
    UnavailableError,
    active_units,
    collapse_summary,
    fisher_bound,
    guide_fisher_divergence,
    kl_per_dimension,
    mutual_information,
)


def test_scalar_sites_and_several_arguments():
    def scalar_model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)

    def scalar_guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((y - x) / 2, 0.5**0.5))

    x, y = torch.randn(2, N)
    summary = collapse_summary(scalar_model, scalar_guide, (x, y), batch_size=10)
    assert summary.unit.values.tolist() == ["z"]
    expected = dist.Normal(x, 2**0.5).log_prob(y).mean()
    assert float(summary.log_likelihood) == pytest.approx(float(expected), abs=1e-5)


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ([1.0], "model_args to be a tensor or a tuple, got list"),
        ((X, [1.0] * 5), r"model_args\[1\] to be a tensor over the 5 data or something that all data share, got list"),
    ],
)
def test_refuses_arguments_of_another_kind(model_args, message):
    with pytest.raises(TypeError, match=message):
        kl_per_dimension(sum_model, mean_field_guide, model_args)


ONE_SITE = (kl_per_dimension, active_units, mutual_information, guide_fisher_divergence)


@pytest.mark.parametrize("diagnostic", ONE_SITE)
def test_the_only_site_needs_no_name(diagnostic):
    def model(x):
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(code, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(x / 2, 0.5))

    x = torch.randn(6)
    assert repr(diagnostic(model, guide, x, seed=0)) == repr(diagnostic(model, guide, x, site="code", seed=0))
    with pytest.raises(UnavailableError, match="got none"):
        diagnostic(mixture_model, empty_guide, x)


@pytest.mark.parametrize("diagnostic", ONE_SITE)
def test_several_sites_need_a_name(diagnostic):
    with pytest.raises(ValueError, match=r"the argument site to name one of .*\['z2', 'z1'\], got None"):
        diagnostic(chain_model, chain_guide, torch.randn(6))


def test_a_discrete_site_is_no_candidate_for_a_gradient():
    x = torch.randn(6)
    unnamed, named = (guide_fisher_divergence(gmvae_model, gmvae_guide, x, site=site, seed=0) for site in (None, "z"))
    torch.testing.assert_close(unnamed.values, named.values)
    with pytest.raises(UnavailableError, match=r"a continuous latent site that the guide samples, got \['y'\]"):
        guide_fisher_divergence(mixture_model, exact_mixture_guide, x)
    with pytest.raises(ValueError, match=r"the argument site to name one of several latent sites, \['z2', 'z1'\]"):
        fisher_bound(chain_model, chain_guide, x, decoder=Linear(torch.eye(1)))
