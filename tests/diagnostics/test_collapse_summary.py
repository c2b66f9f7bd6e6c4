"""The summary says of every site what the single measures say, or why it cannot."""

import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.factor_models import mean_field_guide, sum_model
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    diagnostics,
    from_pyro_svi,
    likelihoods,
    mlp,
)
from pyro_ilvae.diagnostics import collapse_summary
from pyro_ilvae.diagnostics._engine.summaries import OfSite

N, K, D = 40, 3, 6


def vae(kind):
    decoder = {
        "composition": lambda: InverseLipschitzDecoder(
            latent_dim=K, event_shape=D, inverse_lipschitz=0.5, map_features=(16,)
        ),
        "projected": lambda: ProjectedDecoder(mlp(K, (16,), D), latent_dim=K, event_shape=D, inverse_lipschitz=0.5),
        "plain": lambda: MLPDecoder(latent_dim=K, event_shape=D, hidden_features=(16,)),
    }[kind]()
    return VAE(decoder, MLPEncoder(event_shape=D, latent_dim=K, hidden_features=(16,)), likelihoods.Normal(1.0))


@pytest.mark.parametrize("kind", ["composition", "projected", "plain"])
def test_of_a_vae_is_that_of_the_single_measures(kind):
    model = vae(kind)
    pair = (model.model, model.guide, torch.randn(N, D))
    summary = collapse_summary(*pair, num_samples=200, seed=3, batch_size=16)
    assert isinstance(summary, xr.Dataset)
    assert summary.unit.values.tolist() == [f"z[{j}]" for j in range(K)]
    kl = diagnostics.kl_per_dimension(*pair)
    np.testing.assert_allclose(summary.kl, kl.values.mean(0).numpy(force=True), rtol=1e-5)
    np.testing.assert_allclose(summary.kl_se, (kl.values.std(0) / math.sqrt(N)).numpy(force=True), rtol=1e-4)
    total = diagnostics.kl_divergence(*pair)
    of_site = summary.sel(site="z")
    assert of_site.kl_total.item() == pytest.approx(float(total.values.mean()), rel=1e-5)
    assert of_site.active_units.item() == diagnostics.active_units(*pair).num_active
    assert of_site.mutual_information.item() + of_site.aggregate_kl.item() == pytest.approx(
        of_site.kl_total.item(), abs=1e-4
    )
    assert of_site.mutual_information_limit.item() == pytest.approx(math.log(N))
    assert of_site.guide_fisher.item() == pytest.approx(
        float(diagnostics.guide_fisher_divergence(*pair).values.mean()), rel=1e-5
    )
    assert summary.elbo < summary.log_likelihood
    assert of_site.note.item() == ""
    if kind != "plain":
        guaranteed = diagnostics.guaranteed_information(model.model, num_samples=5000)
        assert of_site.guaranteed_floor.item() == pytest.approx(guaranteed.floor) == pytest.approx(1.5 * math.log(1.25))
        assert abs(of_site.guaranteed_nats.item() - guaranteed.by_jacobian) < 5 * of_site.guaranteed_nats_se.item()
        assert of_site.guaranteed_nats > of_site.guaranteed_floor
    if kind == "plain":
        assert np.isnan([of_site.guaranteed_nats, of_site.guaranteed_nats_se, of_site.guaranteed_floor]).all()
        assert math.isnan(summary.model_fisher_floor)
        assert "fisher_bound" not in summary
    else:
        assert summary.model_fisher >= summary.model_fisher_floor == pytest.approx(K * 0.25)
    if kind == "composition":
        assert summary.fisher_ratio >= 1 - 1e-4
        assert summary.posterior_fisher >= summary.fisher_bound
    if kind == "projected":
        assert "fisher_bound" in summary.notes


def test_seeds_reproduce_it_and_leave_the_random_state():
    model = vae("projected")
    x = torch.randn(N, D)
    state = torch.get_rng_state()
    first, second = (collapse_summary(model.model, model.guide, x, num_samples=20, seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    xr.testing.assert_identical(first, second)


def test_computes_what_is_asked_for():
    model = vae("composition")
    summary = collapse_summary(model.model, model.guide, torch.randn(N, D), measures=("kl", "active_units"))
    assert not summary.kl.isnull().any()
    assert summary.mutual_information.isnull().all()
    assert {"elbo", "posterior_fisher", "model_fisher"}.isdisjoint(summary)


def hierarchical(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z + 2.0 * kind, 1.0), obs=x)


def hierarchical_guide(x):
    pyro.sample("mu", dist.Normal(1.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def test_of_several_sites_says_what_each_has():
    x = torch.randn(N)
    summary = collapse_summary(hierarchical, hierarchical_guide, x, num_samples=50, epsilon=0.05)
    assert summary.site.values.tolist() == ["mu", "kind", "z"]
    verdicts = dict(zip(summary.unit.values.tolist(), summary.verdict.values.tolist(), strict=True))
    assert verdicts == {"mu": "active", "kind": "weak", "z": "active"}
    # The sentence is about what each datum has of its own.
    assert summary.attrs["verdict"].startswith("active: 0 of 2 units hold less than 0.01 nats, 1 weak (0.01 to 0.1), 1")
    exact = math.log(10) - 0.5 + (0.01 + 1) / 2
    assert float(summary.kl.sel(unit="mu")) == pytest.approx(exact, rel=1e-4)
    assert float(summary.kl.sel(unit="kind")) == pytest.approx(-0.5 * math.log(4 * 0.4 * 0.6), rel=1e-4)
    notes = dict(zip(summary.site.values.tolist(), summary.note.values.tolist(), strict=True))
    assert "active_units" in notes["mu"]  # data share it
    assert "categories" in notes["kind"]
    assert collapse_summary(hierarchical, hierarchical_guide, x, sites=["z"], measures=("kl",)).site.values == ["z"]


def test_of_a_site_that_the_guide_leaves_out_or_fixes():
    def no_kind(x):
        pyro.sample("mu", dist.Normal(1.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x = torch.randn(N)
    summary = collapse_summary(hierarchical, no_kind, x, num_samples=20)
    assert summary.verdict.sel(unit="kind") == "unknown"
    assert "got 'kind'" in summary.note.sel(site="kind").item()
    assert np.isfinite(summary.elbo)

    def simple(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for build, verdict in ((AutoDelta, "unknown"), (AutoNormal, "active")):
        guide = build(simple)
        guide(x)
        summary = collapse_summary(simple, guide, x, num_samples=20)
        assert summary.verdict.item() == verdict
    assert np.isfinite(summary.kl.item())


def test_says_so_of_nats_that_are_the_same_for_all_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def still_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([0.5, 1.0, 0.1])).to_event(1).expand([len(x)]))

    summary = collapse_summary(model, still_guide, torch.randn(N), num_samples=20)
    assert summary.verdict.values.tolist() == ["active", "collapsed", "active"]
    assert summary.note.item() == "kl: the same for all data, about which it says nothing, for z[0], z[2]"
    moving = collapse_summary(model, lambda x: mean_field_guide(x), torch.randn(N), num_samples=20)
    assert "the same for all data" not in moving.note.item()


def test_stands_beside_the_draws_in_arviz():
    model = vae("projected")
    x = torch.randn(N, D)
    summary = collapse_summary(model.model, model.guide, x, num_samples=20)
    fit = from_pyro_svi((model.model, model.guide), model_args=(x,), num_samples=5)
    if isinstance(fit, getattr(xr, "DataTree", ())):
        fit["collapse"] = xr.DataTree(summary)
    else:
        fit.add_groups(collapse=summary)
    np.testing.assert_array_equal(fit["collapse"]["verdict"], summary.verdict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["y"]}, r"sites among the latent ones, \['mu', 'kind', 'z'\], got \['y'\]"),
        ({"measures": ("kl", "entropy")}, "measures among"),
        ({"measures": "kl"}, "measures among"),
        ({"measures": ()}, "at least one, got"),
        ({"measures": 3}, "measures among"),
        ({"sites": []}, "sites among the latent ones.* got none"),
        ({"sites": "z"}, "sites to be a sequence of names, got the string 'z'"),
        ({"sites": ["z", "z"]}, "each once"),
        ({"sites": [3]}, "sites to be names"),
        ({"epsilon": "a"}, "epsilon to be a finite number"),
        ({"threshold": math.nan}, "threshold to be a finite number"),
        ({"collapsed_below": -0.1}, "collapsed_below"),
        ({"active_from": math.inf}, "active_from"),
        ({"active_from": 0.001}, "active_from >= collapsed_below = 0.01, got 0.001"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 1.5}, r"delta to be a number in \[0, 1\]"),
        ({"num_samples": 0}, "num_samples"),
        ({"plate": "nowhere"}, "plate to be one of"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        collapse_summary(hierarchical, hierarchical_guide, torch.randn(N), **arguments)


@pytest.mark.parametrize(("delta", "collapsed"), [(0.0, 0.0), (0.3, 0.0), (0.7, 1.0)])
def test_delta_is_the_part_of_the_data_that_may_differ(delta, collapsed):
    def half_guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.where(torch.arange(len(x)) % 2 == 0, 3.0, 0.0)
            pyro.sample("z", dist.Normal(loc[:, None].expand(-1, 3), 1.0).to_event(1))

    summary = collapse_summary(sum_model, half_guide, torch.randn(60), delta=delta, measures=("kl", "active_units"))
    assert summary.epsilon_delta_collapsed[0] == collapsed
    assert summary.verdict[0] == "active"  # 2.25 nats in the mean, whatever delta


X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collapse_summary(sum_model, mean_field_guide, X, delta=2.0), r"delta to be a number in \[0, 1\]"),
        (lambda: collapse_summary(sum_model, mean_field_guide, X, epsilon=-1.0), "epsilon"),
        (lambda: collapse_summary(sum_model, mean_field_guide, X, num_samples=0), "num_samples"),
        (lambda: collapse_summary(sum_model, mean_field_guide, X, batch_size=0), "batch_size"),
    ],
)
def test_refuses_limits(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_columns_of_a_measure_have_names_that_the_summary_knows(monkeypatch):
    misspelled = OfSite("kl", lambda call, site: {"kl_totl": 1.0}, missing={"kl_total": math.nan})
    module = sys.modules["pyro_ilvae.diagnostics.collapse_summary"]  # the function has its name in the package
    monkeypatch.setattr(module, "_OF_SITES", (("kl", misspelled),))
    with pytest.raises(AssertionError, match=r"from kl, got \['kl_totl'\]"):
        collapse_summary(sum_model, mean_field_guide, torch.randn(5), measures=("kl",))
