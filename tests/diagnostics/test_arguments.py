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
    evidence,
    fisher_bound,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
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
        ([X], "model_args to be a tensor or a tuple, got list of tensors: pass a tuple"),
        ((X, [1.0] * 5), r"model_args\[1\] to be a tensor over the 5 data or something that all data share, got list"),
        (
            (X, X.numpy()),
            r"model_args\[1\] to be a tensor over .*, got ndarray of 5 values; convert it with torch.as_te",
        ),
    ],
)
def test_refuses_arguments_of_another_kind(model_args, message):
    with pytest.raises(TypeError, match=message):
        kl_per_dimension(sum_model, mean_field_guide, model_args, batch_size=2)


def weighted_model(weights, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1) + weights.mean(), 1.0), obs=x)


def weighted_guide(weights, x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] * torch.tensor([0.4, 0.1]), 0.7).to_event(1))


CALLS = {
    "kl_divergence": lambda *call, **more: kl_divergence(*call, **more).values,
    "kl_per_dimension": lambda *call, **more: kl_per_dimension(*call, **more).values,
    "active_units": lambda *call, **more: active_units(*call, **more).variances,
    "evidence": lambda *call, **more: evidence(*call, seed=0, **more).log_likelihood,
    "guide_fisher_divergence": lambda *call, **more: guide_fisher_divergence(*call, **more).values,
    "posterior_fisher_divergence": lambda *call, **more: posterior_fisher_divergence(*call, seed=0, **more).values,
    "mutual_information": lambda *call, **more: torch.tensor(mutual_information(*call, seed=0, **more)[0]),
    "collapse_summary": lambda *call, **more: torch.tensor(collapse_summary(*call, seed=0, **more).kl.values),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_data_is_that_of_a_plate_where_tensors_differ(name):
    call, weights = CALLS[name], torch.tensor([1.0, 3.0])
    expected = call(weighted_model, weighted_guide, (torch.tensor(2.0), X))
    torch.testing.assert_close(call(weighted_model, weighted_guide, (weights, X)), expected)
    torch.testing.assert_close(call(weighted_model, weighted_guide, (weights,), model_kwargs={"x": X}), expected)
    torch.testing.assert_close(call(weighted_model, weighted_guide, (torch.full((5,), 2.0), X)), expected)
    torch.testing.assert_close(call(lambda: weighted_model(weights, X), lambda: weighted_guide(weights, X)), expected)


def test_the_plate_is_named_where_tensors_fit_several():
    def model(weights, x):
        with pyro.plate("features", len(weights)):
            pyro.sample("w", dist.Normal(weights, 1.0))
        weighted_model(weights, x)

    def guide(weights, x):
        with pyro.plate("features", len(weights)):
            pyro.sample("w", dist.Normal(weights, 0.5))
        weighted_guide(weights, x)

    with pytest.raises(ValueError, match="name the plate over the data with plate="):
        kl_divergence(model, guide, (torch.zeros(2), X), site="z")
    named = kl_divergence(model, guide, (torch.zeros(2), X), site="z", plate="data")
    torch.testing.assert_close(named.values, kl_divergence(weighted_model, weighted_guide, (torch.zeros(2), X)).values)
    with pytest.raises(ValueError, match=r"Expected plate to be one of \['data', 'features'\], got 'rows'"):
        kl_divergence(model, guide, (torch.zeros(2), X), site="z", plate="rows")


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


# Data that are not in the arguments

HIDDEN = torch.linspace(-1.0, 1.0, 5)


def over(plates):
    """A model and its guide whose data are not in the arguments, in a plate and perhaps others."""

    def program(observe, weights):
        with pyro.plate("data", 5, dim=-1 - plates):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if observe and plates:
                with pyro.plate("inner", 4, dim=-1):
                    pyro.sample("x", dist.Normal(z * weights.mean(), 1.0), obs=HIDDEN[:, None].expand(5, 4))
            elif observe:
                pyro.sample("x", dist.Normal(z * weights.mean(), 1.0), obs=HIDDEN)

    return lambda weights: program(True, weights), lambda weights: program(False, weights)


WEIGHTS = torch.tensor([0.5, 1.0, 1.5])


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_data_is_that_of_the_plate_over_what_is_observed(name):
    model, guide = over(0)

    def explicit(weights, x):
        return model(weights)

    expected = CALLS[name](explicit, lambda weights, x: guide(weights), (WEIGHTS, HIDDEN))
    for args in (WEIGHTS, (WEIGHTS, "mean")):
        programs = (lambda *a: model(a[0])), (lambda *a: guide(a[0]))
        torch.testing.assert_close(CALLS[name](*programs, args), expected)
        torch.testing.assert_close(CALLS[name](*programs, args, plate="data"), expected)
    torch.testing.assert_close(CALLS[name](lambda: model(WEIGHTS), lambda: guide(WEIGHTS), ()), expected)
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="the 5 data"):
            CALLS[name](model, guide, WEIGHTS, batch_size=batch_size)


@pytest.mark.parametrize("name", CALLS)
def test_the_plate_over_the_data_is_named_where_several_hold_what_is_observed(name):
    model, guide = over(1)
    with pytest.raises(ValueError, match=r"got \['data', 'inner'\]; name the plate over the data with plate="):
        CALLS[name](model, guide, WEIGHTS)
    named = CALLS[name](model, guide, WEIGHTS, plate="data")
    assert named.shape[:1] in ((), (1,), (5,))


def test_the_same_data_in_each_batch_are_refused():
    model, guide = over(0)
    with pytest.raises(ValueError, match="got the same"):
        evidence(model, guide, torch.ones(10), batch_size=5)


def test_a_summary_says_how_many_data_there_are():
    assert collapse_summary(*over(0), WEIGHTS, seed=0).num_data == 5


def test_one_evidence_without_a_plate_over_the_data():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.expand(len(x)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x.sum() / 6, 6**-0.5))

    exact = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1).log_prob(X)
    torch.testing.assert_close(evidence(model, guide, X).log_likelihood, exact[None])
