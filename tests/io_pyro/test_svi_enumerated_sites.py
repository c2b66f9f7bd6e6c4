"""Draws of the sites that inference enumerates, in the conversion of a variational fit."""

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import PASSES, assert_same, values, z_scores
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
)
from pyro.ops.indexing import Vindex

from pyro_ilvae.io_pyro import from_pyro_svi


@config_enumerate
def mixture_model(x):
    """A shifted mixture of N(shift, 1) and N(shift + 2, 1), whose indicator is enumerated, and a coin without data."""
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("coin", dist.Bernoulli(0.4))
        loc = pyro.deterministic("loc", shift + 2.0 * kind)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def mixture_guide(x):
    pyro.sample("shift", dist.Normal(0.5, 1.5))


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_pass", [1, 60, 1500, None])
def test_enumerated_sites_are_drawn_given_the_draw_of_the_guide_and_the_data(samples_per_pass):
    x = torch.tensor([0.0, 1.0, 4.0])
    n = 50 if samples_per_pass == 1 else 1500
    fit = from_pyro_svi(
        (mixture_model, mixture_guide), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass
    )
    draws = values(fit, "posterior")
    shift = torch.tensor(draws["shift"])[..., None]
    weights = torch.stack(
        [0.3 * dist.Normal(shift, 1.0).log_prob(x).exp(), 0.7 * dist.Normal(shift + 2, 1.0).log_prob(x).exp()]
    )
    probs = (weights[1] / weights.sum(0)).numpy(force=True)
    variance = probs * (1 - probs)
    assert (abs(z_scores(draws["kind"] - probs, variance)) < 5).all()
    # The indicators follow the shift of their own draw.
    assert (
        abs(z_scores((draws["kind"] - probs) * shift.numpy(force=True), variance * shift.numpy(force=True) ** 2)) < 5
    ).all()
    # What has no data under it keeps its prior, on its own for each datum and draw.
    coins = draws["coin"]
    assert (abs(z_scores(coins - 0.4, np.full_like(coins, 0.24))) < 5).all()
    products = (coins[..., [0, 1, 2]] - 0.4) * (coins[..., [1, 2, 0]] - 0.4)
    assert (abs(z_scores(products, np.full_like(products, 0.24**2))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_log_likelihood_and_predictions_are_given_the_enumerated_sites(samples_per_pass):
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(4)))
            loc = pyro.deterministic("loc", 10.0 * kind)
            pyro.sample("x", dist.Normal(loc, 0.1 + kind), obs=x)

    x = torch.tensor([0.0, 9.0, 31.0])
    arguments = {"model_args": (x,), "num_samples": 10, "samples_per_pass": samples_per_pass, "seed": 1}
    arguments["log_likelihood"] = "conditional"
    fit = from_pyro_svi((model, lambda x: None), **arguments)
    for group, predictive in [("posterior", "posterior_predictive"), ("prior", "prior_predictive")]:
        kind = fit[group]["kind"]
        assert kind.dims == ("chain", "draw", "data")
        assert kind.dtype == np.int64
        np.testing.assert_array_equal(fit[group]["loc"], 10.0 * kind)
        assert (abs(fit[predictive]["x"] - 10.0 * kind) < 6 * (0.1 + kind)).all()
    kind = torch.tensor(values(fit, "posterior")["kind"])
    expected = dist.Normal(10.0 * kind, 0.1 + kind).log_prob(x).numpy(force=True)
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)
    assert len(np.unique(values(fit, "prior")["kind"])) > 2
    assert_same(fit, from_pyro_svi((model, lambda x: None), **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_pass", [1, 500, None])
def test_paths_of_a_hidden_markov_model_have_their_posterior(samples_per_pass):
    step = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x):
        state = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            state = pyro.sample(f"state_{t}", dist.Categorical(step[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(2.0 * state, 1.0), obs=x[t])

    x = torch.tensor([0.5, 2.0, 1.0])
    n = 50 if samples_per_pass == 1 else 1500
    fit = from_pyro_svi(
        (model, lambda x: None), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass, prior=False
    )
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    joint = step[0, paths[:, 0]] * step[paths[:, 0], paths[:, 1]] * step[paths[:, 1], paths[:, 2]]
    joint = joint * dist.Normal(2.0 * paths, 1.0).log_prob(x).sum(-1).exp()
    expected = (joint / joint.sum()).numpy(force=True)
    draws = values(fit, "posterior")
    drawn = np.stack([draws[f"state_{t}"] for t in range(3)], -1)[..., None, :] == paths.numpy(force=True)
    assert (abs(z_scores(drawn.all(-1) - expected, np.broadcast_to(expected * (1 - expected), (1, n, 8)))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", [1, 1500, None])
def test_global_and_local_enumerated_sites_and_what_the_guide_draws_below_them(samples_per_pass):
    """regime -> kind[n] -> z[n] -> x[n], of which the guide draws z."""
    z = torch.tensor([0.2, 1.5])

    @config_enumerate
    def model(x):
        regime = pyro.sample("regime", dist.Bernoulli(0.4))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.2 + 0.6 * regime))
            local = pyro.sample("z", dist.Normal(2.0 * kind, 1.0))
            pyro.sample("x", dist.Normal(local, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z))

    n = 50 if samples_per_pass == 1 else 1500
    arguments = {"num_samples": n, "samples_per_pass": samples_per_pass, "log_likelihood": "conditional"}
    fit = from_pyro_svi((model, guide), model_args=(torch.zeros(2),), **arguments)
    states = torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    joint = dist.Bernoulli(0.4).log_prob(states[:, 0]) + dist.Bernoulli(0.2 + 0.6 * states[:, :1]).log_prob(
        states[:, 1:]
    ).sum(-1)
    joint = (joint + dist.Normal(2.0 * states[:, 1:], 1.0).log_prob(z).sum(-1)).exp()
    expected = (joint / joint.sum()).numpy(force=True)
    draws = values(fit, "posterior")
    drawn = np.concatenate([draws["regime"][..., None], draws["kind"]], -1)[..., None, :] == states.numpy(force=True)
    assert fit["posterior"]["regime"].dims == ("chain", "draw")
    assert (abs(z_scores(drawn.all(-1) - expected, np.broadcast_to(expected * (1 - expected), (1, n, 8)))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", [1, 500, None])
def test_sites_enumerated_in_the_guide_are_drawn_from_it(samples_per_pass):
    @config_enumerate
    def guide(x):
        pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(torch.tensor([0.9, 0.1])))
            pyro.sample("coin", dist.Bernoulli(0.5))

    n = 50 if samples_per_pass == 1 else 500
    x = torch.tensor([2.0, 6.0])  # whose posterior would be another
    fit = from_pyro_svi((mixture_model, guide), model_args=(x,), num_samples=n, samples_per_pass=samples_per_pass)
    kind = values(fit, "posterior")["kind"]
    assert (abs(z_scores(kind - 0.1, np.full(kind.shape, 0.09))) < 5).all()


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_enumerated_mixture_fitted_with_automatic_guides(samples_per_pass):
    @config_enumerate
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(Vindex(loc.unsqueeze(-2))[..., kind], 1.0), obs=x)

    x = torch.tensor([-3.0, 3.0, 2.5, -2.0])
    continuous = AutoNormal(poutine.block(model, hide=["kind"]))
    both = AutoGuideList(model)
    both.append(AutoNormal(poutine.block(model, hide=["kind"])))
    both.append(AutoDiscreteParallel(poutine.block(model, expose=["kind"])))
    for guide in [continuous, both]:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
        svi.step(x)
        arguments = {"num_samples": 4, "samples_per_pass": samples_per_pass, "log_likelihood": "conditional"}
        fit = from_pyro_svi(svi, model_args=(x,), **arguments)
        assert fit["posterior"]["loc"].dims == ("chain", "draw", "component")
        assert fit["posterior"]["kind"].dims == ("chain", "draw", "data")
        draws = {name: torch.tensor(value) for name, value in values(fit, "posterior").items()}
        expected = dist.Normal(draws["loc"].gather(-1, draws["kind"]), 1.0).log_prob(x).numpy(force=True)
        np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_enumerated_sites_of_a_minibatch(samples_per_pass):
    data = torch.linspace(-20.0, 20.0, 100)

    @config_enumerate
    def model():
        with pyro.plate("data", 100, subsample_size=5) as index:
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(40.0 * kind - 20.0, 0.1), obs=data[index])

    fit = from_pyro_svi((model, lambda: None), num_samples=8, samples_per_pass=samples_per_pass)
    assert fit["posterior"].coords["data"].values.tolist() == [0, 1, 2, 3, 4]
    assert (values(fit, "posterior")["kind"] == 0).all()
