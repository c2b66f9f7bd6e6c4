"""Plates that are written without a size, as in Pyro's own examples: everything is as with the size."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

from pyro_ilvae.diagnostics import (
    active_units,
    collapse_summary,
    evidence,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    mutual_information,
    posterior_fisher_divergence,
)
from pyro_ilvae.io_pyro import from_pyro_svi

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def pair(sized, expanded=True):
    """One latent vector for each datum, whose prior has a batch shape of its own if it is ``expanded``."""

    def plate(x):
        return pyro.plate("data", *([len(x)] if sized else []))

    def model(x):
        with plate(x):
            shape = (len(x), 2) if expanded else (2,)
            z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Normal(0.5 * x[:, :2], torch.tensor([0.5, 1.0])).to_event(1))

    return model, guide


def nested(sized):
    """Several plates, one of them with a size, and a site of all data."""

    def plate(name, size, dim):
        return pyro.plate(name, *([size] if sized else []), dim=dim)

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with plate("data", len(x), -2):
            z = pyro.sample("z", dist.Normal(a + torch.zeros(len(x), 1), 1.0))
            with plate("inner", 3, -1):
                pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 3), 1.0), obs=x)

    def guide(x):
        pyro.sample("a", dist.Normal(0.1, 0.5))
        with plate("data", len(x), -2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 0.5))

    return model, guide


def labelled(sized, labels):
    """Pyro's semi-supervised example in small, its label observed or drawn."""

    def plate(x):
        return pyro.plate("data", *([len(x)] if sized else []))

    def model(x, y=None):
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3) / 3), obs=y)
            pyro.sample("x", dist.Normal(y + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x, y=None):
        with plate(x):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=x))
            pyro.sample("z", dist.Normal(0.3 * x[:, :2] + 0.1 * y[..., :2], 0.7).to_event(1))

    return (model, config_enumerate(guide)), ((X, nn.functional.one_hot(X.argmax(1), 3).float()) if labels else X)


MEASURES = {
    "kl_divergence": lambda *call, **more: kl_divergence(*call, site="z", seed=0, **more).values,
    "kl_per_dimension": lambda *call, **more: kl_per_dimension(*call, site="z", seed=0, **more).values,
    "active_units": lambda *call, **more: active_units(*call, site="z", seed=0, **more).variances,
    "mutual_information": lambda *call, **more: torch.tensor(mutual_information(*call, site="z", seed=0, **more)[0]),
    "guide_fisher_divergence": lambda *call, **more: guide_fisher_divergence(*call, site="z", seed=0, **more).values,
    "evidence": lambda *call, **more: torch.stack(evidence(*call, seed=0, **more)[:2]),
    "posterior_fisher_divergence": lambda *call, **more: posterior_fisher_divergence(*call, seed=0, **more).values,
}


@pytest.mark.parametrize("batch_size", [None, 3, 1])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("expanded", [True, False])
def test_measures_are_those_with_the_size(measure, expanded, batch_size):
    found = measure(*pair(sized=False, expanded=expanded), X, batch_size=batch_size)
    expected = measure(*pair(sized=True), X, batch_size=batch_size)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_summary_has_the_units_of_the_site():
    summary = collapse_summary(*pair(sized=False), X, seed=0)
    expected = collapse_summary(*pair(sized=True), X, seed=0)
    assert summary.unit.values.tolist() == ["z[0]", "z[1]"]
    assert summary.verdict.values.tolist() == expected.verdict.values.tolist()
    assert summary.equals(expected)
    assert summary.elbo.attrs == expected.elbo.attrs


def test_nested_plates():
    for site in ("a", "z"):
        found, expected = (kl_divergence(*nested(sized), X, site=site, seed=0) for sized in (False, True))
        torch.testing.assert_close(found.values, expected.values)
    bounds, expected = (evidence(*nested(sized), X, seed=0) for sized in (False, True))
    assert bounds.elbo.shape == (1,)
    torch.testing.assert_close(bounds, expected)


@pytest.mark.parametrize("labels", [True, False])
def test_labels_observed_and_drawn(labels):
    (model, guide), args = labelled(False, labels)
    (sized_model, sized_guide), _ = labelled(True, labels)
    for measure in ("evidence", "kl_divergence"):
        found, expected = (
            MEASURES[measure](*programs, args) for programs in ((model, guide), (sized_model, sized_guide))
        )
        assert found.shape[-1] == 7
        torch.testing.assert_close(found, expected)


def test_sites_that_are_summed_out_have_a_value_for_each_datum():
    def model(x):
        with pyro.plate("data"):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(3.0 * y, 1.0), obs=x)

    def guide(x):
        pass

    x = X[:, 0]
    bounds = evidence(model, guide, x)
    exact = torch.log(0.3 * dist.Normal(0.0, 1.0).log_prob(x).exp() + 0.7 * dist.Normal(3.0, 1.0).log_prob(x).exp())
    torch.testing.assert_close(bounds.log_likelihood, exact)
    assert float(exact.sum()) == pytest.approx(-TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x), rel=1e-5)
    draws = from_pyro_svi((model, guide), x, num_samples=5)
    assert draws["posterior"]["y"].shape == (1, 5, 7)


def test_one_value_for_all_data_is_a_shared_site():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x.sum() / 8, 8**-0.5))

    x = X[:, 0]
    bounds = evidence(model, guide, x)
    exact = dist.MultivariateNormal(torch.zeros(7), torch.eye(7) + 1).log_prob(x)
    torch.testing.assert_close(bounds.log_likelihood, exact[None])
    with pytest.raises(ValueError, match="batch_size=None"):
        evidence(model, guide, x, batch_size=2)


def test_one_value_of_the_guide_for_several_of_the_model_is_refused():
    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for measure in (*MEASURES.values(), collapse_summary, lambda model, guide, x: from_pyro_svi((model, guide), x)):
        with pytest.raises(ValueError, match="7 values of site 'z' in plate 'data'"):
            measure(pair(sized=False)[0], guide, X)


def test_sites_of_several_sizes_are_refused():
    def model(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))

    with pytest.raises(ValueError, match="plate 'data' to agree on its size, got 4 at site 'z' and 7 at site 'x'"):
        evidence(model, guide, X[:, 0])


def test_other_data_than_a_guide_holds_values_for_are_refused():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def model_of_any(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(torch.arange(7.0), 1.0))

    for size in (1, 3):
        for program in (model, model_of_any):
            with pytest.raises(ValueError, match=r"site '[xz]'"):
                evidence(program, guide, X[:size, 0])


@pytest.mark.parametrize("expanded", [True, False])
def test_exported_draws_have_the_plate(expanded):
    found = from_pyro_svi(pair(sized=False, expanded=expanded), X, num_samples=200, seed=0)
    expected = from_pyro_svi(pair(sized=True), X, num_samples=200, seed=0)
    for group in ("posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive", "observed_data"):
        for name in expected[group].data_vars:
            assert found[group][name].dims == expected[group][name].dims
            assert found[group][name].shape == expected[group][name].shape
            assert found[group][name].coords["data"].values.tolist() == list(range(7))
    prior = torch.tensor(found["prior"]["z"].values)[0]
    assert abs(torch.corrcoef(prior[:, :, 0].mT)[0, 1]) < 0.4  # not one value for all
