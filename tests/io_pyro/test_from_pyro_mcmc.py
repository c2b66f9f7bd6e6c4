"""Laws of the ArviZ conversion of Markov chains, and what ArviZ's own functions do with the conversions."""

import multiprocessing
import warnings
from unittest import mock

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import SAMPLED, assert_same, az, values
from matplotlib import pyplot as plt
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ilvae.io_pyro import from_pyro_mcmc, from_pyro_svi

CHAINS, DRAWS = 2, 40
PASSES = [1, 7, CHAINS * DRAWS, None]  # one by one, across the border between the chains, all at once, as chosen
X = torch.tensor([1.0, 2.0, 4.0, 1.5])


def run(kernel, *args, chains=CHAINS, draws=DRAWS, warmup=30, processes=False, **kwargs):
    """Chains in this process, one after the other, or each in its own."""
    with (
        mock.patch("pyro.infer.mcmc.api.mp.cpu_count", return_value=99 if processes else 1),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "num_chains=.* is more than available_cpu", UserWarning)
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
        context = "fork" if processes else None
        mcmc = MCMC(kernel, draws, warmup, num_chains=chains, mp_context=context, disable_progbar=True, **kwargs)
        mcmc.run(*args)
    return mcmc


def short_hmc(model):
    """Steps that are cheap rather than good."""
    return HMC(model, step_size=0.1, num_steps=2, adapt_step_size=False)


def conjugate_model(x):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    pyro.deterministic("square", mu.square())
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def hierarchical_model(x):
    """x of shape (groups, data, 2): a global scale, a vector for each group, and a scalar for each datum."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    pyro.deterministic("norm", weight.square().sum((-2, -1)).sqrt())
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = pyro.sample("loc", dist.Normal(weight.mean(-2), scale[..., None]).to_event(1))
        with pyro.plate("datum", x.shape[1], dim=-1):
            local = pyro.sample("local", dist.Normal(0.0, scale))
            pyro.deterministic("shifted", loc + local[..., None], event_dim=1)
            pyro.sample("x", dist.Normal(loc + local[..., None], 1.0).to_event(1), obs=x)


def mixture_model(x):
    """A shifted mixture of N(shift, 1) and N(shift + 2, 1)."""
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        loc = pyro.deterministic("loc", shift + 2.0 * kind)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.fixture(scope="module")
def conjugate():
    pyro.set_rng_seed(0)
    return run(NUTS(conjugate_model), X)


@pytest.fixture(scope="module")
def mixture():
    pyro.set_rng_seed(0)
    return run(short_hmc(mixture_model), X)


# Values


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_posterior_is_that_of_the_chains_in_their_order(conjugate, samples_per_pass):
    fit = from_pyro_mcmc(conjugate, samples_per_pass=samples_per_pass)
    assert fit["posterior"]["mu"].dims == ("chain", "draw")
    np.testing.assert_array_equal(
        fit["posterior"]["mu"], conjugate.get_samples(group_by_chain=True)["mu"].numpy(force=True)
    )
    np.testing.assert_array_equal(fit["observed_data"]["x"], X.numpy(force=True))


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_log_likelihood_is_that_of_each_draw_and_datum(conjugate, samples_per_pass):
    fit = from_pyro_mcmc(conjugate, samples_per_pass=samples_per_pass)
    mu = torch.tensor(values(fit, "posterior")["mu"])
    assert fit["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(mu[..., None], 1.0).log_prob(X).numpy(force=True), rtol=1e-5
    )


@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_predictive_draws_have_the_law_of_the_model(conjugate, samples_per_pass):
    fit = from_pyro_mcmc(conjugate, samples_per_pass=samples_per_pass)
    standard = values(fit, "prior")["mu"]
    for latent, predictive in [("posterior", "posterior_predictive"), ("prior", "prior_predictive")]:
        noise = values(fit, predictive)["x"] - values(fit, latent)["mu"][..., None]
        standard = np.concatenate([standard, *np.moveaxis(noise, -1, 0)])
    # Also by chain, because each draw has noise of its own.
    for draws in [standard, *np.split(standard, len(standard))]:
        assert abs(draws.mean()) < 5 / draws.size**0.5
        assert abs(draws.var() - 1) < 5 * (2 / draws.size) ** 0.5


@pytest.mark.parametrize("samples_per_pass", PASSES)
@pytest.mark.parametrize("sizes", [(2, 3), (3, 3), (1, 2)])
def test_dims_and_deterministic_sites(sizes, samples_per_pass):
    x = torch.randn(*sizes, 2)
    mcmc = run(short_hmc(hierarchical_model), x, draws=4, warmup=1)
    fit = from_pyro_mcmc(mcmc, samples_per_pass=samples_per_pass, log_likelihood="conditional")
    expected = {
        "scale": (),
        "weight": ("weight_dim_0", "weight_dim_1"),
        "norm": (),
        "loc": ("group", "loc_dim_0"),
        "local": ("group", "datum"),
        "shifted": ("group", "datum", "shifted_dim_0"),
    }
    for group in ["posterior", "prior"]:
        assert {name: array.dims[2:] for name, array in fit[group].data_vars.items()} == expected
        draws = values(fit, group)
        assert draws["shifted"].shape == (CHAINS, 4, *sizes, 2)
        np.testing.assert_allclose(draws["norm"], np.sqrt(np.square(draws["weight"]).sum((-2, -1))), rtol=1e-5)
        np.testing.assert_allclose(
            draws["shifted"], draws["loc"][:, :, :, None] + draws["local"][..., None], rtol=1e-5, atol=1e-6
        )
    chains = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(fit["posterior"]["loc"], chains["loc"].squeeze(3).numpy(force=True))
    np.testing.assert_array_equal(fit["posterior"]["local"], chains["local"].numpy(force=True))
    assert fit["log_likelihood"]["x"].dims == ("chain", "draw", "group", "datum")
    shifted = torch.tensor(values(fit, "posterior")["shifted"])
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(shifted, 1.0).log_prob(x).sum(-1).numpy(force=True), rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_pass", PASSES)
def test_discrete_sites_are_drawn_given_the_chains_and_the_data(mixture, samples_per_pass):
    fit = from_pyro_mcmc(mixture, samples_per_pass=samples_per_pass, log_likelihood="conditional")
    draws = {name: torch.tensor(value) for name, value in values(fit, "posterior").items()}
    assert fit["posterior"]["kind"].dims == ("chain", "draw", "data")
    assert draws["kind"].dtype == torch.int64
    shift = draws["shift"][..., None]
    torch.testing.assert_close(draws["shift"], mixture.get_samples(group_by_chain=True)["shift"])
    torch.testing.assert_close(draws["loc"], shift + 2 * draws["kind"])
    low, high = 0.3 * dist.Normal(shift, 1.0).log_prob(X).exp(), 0.7 * dist.Normal(shift + 2, 1.0).log_prob(X).exp()
    probs = high / (low + high)
    for weight in [torch.ones_like(shift), shift - shift.mean()]:
        variance = (weight**2 * probs * (1 - probs)).sum((0, 1))
        assert ((weight * (draws["kind"] - probs)).sum((0, 1)).abs() < 5 * variance.sqrt()).all()
    np.testing.assert_allclose(
        values(fit, "log_likelihood")["x"], dist.Normal(draws["loc"], 1.0).log_prob(X), rtol=1e-4
    )


def test_a_model_of_discrete_sites_only():
    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(20.0 * kind, 1.0), obs=x)

    fit = from_pyro_mcmc(run(NUTS(model), torch.tensor([0.0, 20.0, 21.0]), draws=5, warmup=1))
    np.testing.assert_array_equal(values(fit, "posterior")["kind"], np.broadcast_to([0.0, 1.0, 1.0], (CHAINS, 5, 3)))


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_reparametrized_sites_are_variables_rather_than_data(samples_per_pass):
    def centered(x):
        with pyro.plate("data", len(x)):
            loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    model = poutine.reparam(centered, {"loc": LocScaleReparam(0.0)})
    chains = run(short_hmc(model), X, draws=4, warmup=1)
    fit = from_pyro_mcmc(chains, samples_per_pass=samples_per_pass, log_likelihood="conditional")
    assert list(fit["observed_data"].data_vars) == ["x"]
    for group in ["posterior", "prior"]:
        draws = values(fit, group)
        np.testing.assert_allclose(draws["loc"], 1 + 2 * draws["loc_decentered"], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_chains_in_processes_of_their_own():
    mcmc = run(short_hmc(conjugate_model), X, draws=10, warmup=1, processes=True)
    fit = from_pyro_mcmc(mcmc, samples_per_pass=7)
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    np.testing.assert_array_equal(fit["posterior"]["mu"], mcmc.get_samples(group_by_chain=True)["mu"].numpy(force=True))
    assert fit["sample_stats"]["diverging"].shape == (CHAINS, 10)


# Sample statistics


def test_sample_stats_are_those_that_pyro_keeps():
    def cliff(x):
        """Flat between walls on which a long step diverges."""
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", -1e4 * torch.relu(z.abs() - 1.0) ** 2)

    mcmc = run(HMC(cliff, step_size=1.0, num_steps=1, adapt_step_size=False), X, draws=100, warmup=0)
    stats = from_pyro_mcmc(mcmc)["sample_stats"]
    assert list(stats.data_vars) == ["diverging"]
    diverging = stats["diverging"].values
    assert diverging.dtype == bool
    assert 0 < diverging.sum() < diverging.size
    moved = np.diff(mcmc.get_samples(group_by_chain=True)["z"].numpy(force=True), prepend=np.inf) != 0
    assert not (moved & diverging)[:, 1:].any()  # a proposal that diverged is rejected
    diagnostics = mcmc.diagnostics()
    for chain in range(CHAINS):
        assert np.flatnonzero(diverging[chain]).tolist() == diagnostics["divergences"][f"chain {chain}"]
        assert stats.attrs["acceptance_rate"][chain] == diagnostics["acceptance rate"][f"chain {chain}"]
        # Whether the first draw moved the chains do not say.
        assert stats.attrs["acceptance_rate"][chain] == pytest.approx(moved[chain].mean(), abs=0.011)


def test_one_draw():
    fit = from_pyro_mcmc(run(short_hmc(conjugate_model), X, chains=1, draws=1, warmup=0))
    assert fit["posterior"]["mu"].shape == fit["sample_stats"]["diverging"].shape == (1, 1)


# What may be passed, and what is left as it was


def test_arguments_are_by_default_those_of_the_run(conjugate):
    arguments = {"samples_per_pass": 20, "seed": 1}
    fit = from_pyro_mcmc(conjugate, **arguments)
    assert_same(fit, from_pyro_mcmc(conjugate, model_args=(X,), **arguments))
    assert_same(fit, from_pyro_mcmc(conjugate, X, **arguments))
    assert_same(fit, from_pyro_mcmc(conjugate, model_kwargs={"x": X}, **arguments))
    other = from_pyro_mcmc(conjugate, model_args=(torch.zeros(2),), model=conjugate_model, **arguments)
    assert other["log_likelihood"]["x"].shape == (CHAINS, DRAWS, 2)
    np.testing.assert_array_equal(other["posterior"]["mu"], fit["posterior"]["mu"])


def test_a_kernel_of_a_potential_needs_the_model():
    def model(x):
        pyro.sample("rate", dist.Exponential(1.0))

    _, potential, transforms, _ = initialize_model(model, (X,))
    mcmc = run(
        HMC(potential_fn=potential, step_size=0.1, num_steps=2),
        chains=1,
        draws=5,
        warmup=1,
        initial_params={"rate": torch.zeros(())},
        transforms=transforms,
    )
    with pytest.raises(ValueError, match="Expected a model for a kernel that was made from a potential_fn"):
        from_pyro_mcmc(mcmc)
    fit = from_pyro_mcmc(mcmc, model=model, model_args=(X,))
    assert (values(fit, "posterior")["rate"] > 0).all()


@pytest.mark.parametrize("samples_per_pass", [1, 4])
def test_a_seed_fixes_the_draws_and_leaves_the_random_state(samples_per_pass):
    mixture = run(short_hmc(mixture_model), X, draws=3, warmup=1)
    before = torch.get_rng_state()
    fit = from_pyro_mcmc(mixture, seed=3, samples_per_pass=samples_per_pass)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(fit, from_pyro_mcmc(mixture, seed=3, samples_per_pass=samples_per_pass))
    other = from_pyro_mcmc(mixture, seed=4, samples_per_pass=samples_per_pass)
    assert not np.isin(values(other, "prior")["shift"], values(fit, "prior")["shift"]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_chains(dtype):
    fit = from_pyro_mcmc(run(short_hmc(conjugate_model), X.to(dtype), draws=4, warmup=1), samples_per_pass=3)
    expected = np.dtype(str(dtype).removeprefix("torch."))
    for group in [*SAMPLED, "observed_data"]:
        assert {array.dtype for array in values(fit, group).values()} == {expected}


def test_groups_can_be_left_out_and_constants_added(conjugate):
    fit = from_pyro_mcmc(
        conjugate,
        prior=False,
        posterior_predictive=False,
        log_likelihood=False,
        constant_data={"covariate": torch.arange(4)},
        dims={"covariate": ["data"]},
        coords={"data": list("abcd")},
    )
    assert all(group in fit for group in ["posterior", "sample_stats", "observed_data", "constant_data"])
    assert not any(group in fit for group in SAMPLED[1:])
    assert fit["constant_data"]["covariate"].sel(data="c") == 2


def test_modules_run_in_evaluation_mode_and_without_gradients():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](1, 1, bias=False)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
            self.seen = []

        def forward(self, x):
            self.seen.append((self.training, torch.is_grad_enabled()))
            mean = self.linear(x[:, None]).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=x)

    model = Regression()
    mcmc = run(short_hmc(model), X, draws=3, warmup=1)
    model.seen.clear()
    fit = from_pyro_mcmc(mcmc)
    assert fit["posterior"]["linear.weight"].shape == (CHAINS, 3, 1, 1)
    assert set(model.seen) == {(False, False)}
    assert model.training
    assert model.linear.training


# Errors


def test_chains_that_leave_out_a_site_are_refused():
    mcmc = run(short_hmc(hierarchical_model), torch.randn(2, 3, 2), draws=2, warmup=1, save_params=["scale", "loc"])
    with pytest.raises(ValueError, match=r"Expected the chains to sample every latent site .* named 'weight'"):
        from_pyro_mcmc(mcmc)


def test_chains_with_a_value_for_each_value_of_an_enumerated_site_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            local = pyro.sample("local", dist.Normal(2.0 * kind, 1.0))
            pyro.sample("x", dist.Normal(local, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"Expected draws of shape \(4,\) of site 'local', got \(2, 4\)"):
        from_pyro_mcmc(run(short_hmc(model), X, draws=2, warmup=1))
    started = run(short_hmc(model), X, draws=2, warmup=1, initial_params={"local": torch.zeros(CHAINS, 4)})
    assert from_pyro_mcmc(started, log_likelihood="conditional")["posterior"]["local"].dims == ("chain", "draw", "data")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"samples_per_pass": 0}, ValueError, "Expected samples_per_pass"),
        ({"model_args": [X]}, TypeError, "Expected model_args to be a tensor or a tuple, got list"),
        ({"dims": {"nu": ["a"]}}, ValueError, r"Expected dims for sites among .*got \['nu'\]"),
        ({"constant_data": {"mu": 1.0}}, ValueError, "Expected names in constant_data"),
    ],
)
def test_arguments_are_checked(conjugate, arguments, error, match):
    with pytest.raises(error, match=match):
        from_pyro_mcmc(conjugate, **arguments)


def test_what_is_converted_is_checked():
    with pytest.raises(TypeError, match=r"Expected mcmc to be a pyro\.infer\.MCMC object, got"):
        from_pyro_mcmc(NUTS(conjugate_model))
    with pytest.raises(ValueError, match="Expected mcmc to have run"):
        from_pyro_mcmc(MCMC(NUTS(conjugate_model), 4))


# ArviZ


@pytest.fixture(scope="module")
def fits(conjugate, mixture):
    """Conversions of either kind, with and without discrete sites."""
    guide = AutoNormal(poutine.block(mixture_model, hide=["kind"]))
    marked = pyro.infer.config_enumerate(mixture_model)
    return {
        "chains": from_pyro_mcmc(conjugate, samples_per_pass=30),
        "chains-discrete": from_pyro_mcmc(mixture, samples_per_pass=30),
        "guide": from_pyro_svi((conjugate_model, AutoNormal(conjugate_model)), model_args=(X,), num_samples=100),
        "guide-discrete": from_pyro_svi((marked, guide), model_args=(X,), num_samples=100, samples_per_pass=100),
    }


KINDS = ["chains", "chains-discrete", "guide", "guide-discrete"]
PLOTS = ["plot_trace", "plot_trace_dist", "plot_forest", "plot_pair", "plot_ppc", "plot_ppc_dist"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # an indicator that is certain
def test_summary(fits, kind):
    table = az.summary(fits[kind], round_to="none")
    posterior = fits[kind]["posterior"]
    assert len(table) == sum(posterior[name][0, 0].size for name in posterior.data_vars)
    name = next(iter(posterior.data_vars))
    assert table["mean"].iloc[0] == pytest.approx(posterior[name].values.mean(), rel=1e-3)


@pytest.mark.parametrize("kind", ["chains", "guide"])
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
def test_loo(fits, kind):
    result = az.loo(fits[kind], pointwise=True)
    # Close to the in-sample value, less about one parameter.
    log_likelihood = values(fits[kind], "log_likelihood")["x"].astype(float)
    in_sample = np.log(np.exp(log_likelihood).mean((0, 1))).sum()
    elpd = getattr(result, "elpd_loo", None) or result.elpd
    assert 0.1 < in_sample - elpd < 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ 0.23 with Matplotlib 3.11
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # an indicator that is certain
def test_plots(fits, plot, kind):
    if not hasattr(az, plot):
        pytest.skip(f"ArviZ {az.__version__} has no {plot}")
    # A pair plot of every variable would have more panels than ArviZ allows.
    some = {"var_names": list(fits[kind]["posterior"].data_vars)[:2]} if plot == "plot_pair" else {}
    getattr(az, plot)(fits[kind], **some)
    assert plt.get_fignums()
    plt.close("all")
