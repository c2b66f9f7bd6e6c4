"""What ArviZ makes of log likelihoods that are integrated over the latent sites of each datum."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from helpers.arviz_groups import az, values
from pyro import distributions as dist
from pyro.infer import HMC, MCMC, config_enumerate

from pyro_ilvae.io_pyro import from_pyro_mcmc, from_pyro_svi

GENERATION = int(az.__version__.split(".")[0])
X = torch.randn(100, generator=torch.Generator().manual_seed(0))


def scaled(noise, prior=1.0):
    """A datum x_n = z_n + noise, and the exact posterior of z_n: little noise fits each datum by its own z."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, prior))
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    def guide(x):
        shrinkage = prior**2 / (prior**2 + noise**2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shrinkage * x, noise * shrinkage**0.5))

    return model, guide


def log_marginal(noise, prior=1.0):
    return dist.Normal(0.0, (prior**2 + noise**2) ** 0.5).log_prob(X)


def elpd(result):
    return result.elpd if GENERATION else result.elpd_loo


def test_the_ranking_is_that_of_the_evidence():
    """The wide prior with little noise fits each datum by its own z, and has the smaller evidence."""
    arguments = {"num_samples": 200, "prior": False, "posterior_predictive": False, "seed": 0}
    kinds = {"right": (0.5, 0.9), "wide": (0.05, 5.0)}
    fits = {name: from_pyro_svi(scaled(*kind), X, **arguments) for name, kind in kinds.items()}
    with warnings.catch_warnings():
        # ArviZ 0.23 sorts a data frame in a way that pandas 3 announces the end of.
        warnings.filterwarnings("ignore", "The inplace keyword", DeprecationWarning)
        table = az.compare(fits)
    assert list(table.index) == ["right", "wide"]
    for name, fit in fits.items():
        result = az.loo(fit, pointwise=True)  # and no warning of a large Pareto k
        assert elpd(result) == pytest.approx(float(log_marginal(*kinds[name]).sum()), abs=1e-3)
    conditional = {
        name: from_pyro_svi(scaled(*kind), X, log_likelihood="conditional", **arguments) for name, kind in kinds.items()
    }
    means = {name: float(values(fit, "log_likelihood")["x"].mean()) for name, fit in conditional.items()}
    assert means["wide"] > means["right"] + 1  # nats for each datum, the other way round


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
@pytest.mark.parametrize("width", [1.5, 0.5, 0.2])
def test_arviz_finds_the_pareto_k_of_the_importance_weights(width):
    model, _ = scaled(1.0)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, width * 0.5**0.5))

    fit = from_pyro_svi((model, guide), X, num_samples=500, num_importance_samples=500, seed=0)
    own = values(fit, "importance_sampling")["x_pareto_k"]
    found = np.asarray(az.loo(fit, pointwise=True).pareto_k)
    assert abs(found - np.clip(own, -0.5, 1.5)).max() < 0.25
    sizes = values(fit, "importance_sampling")["x_effective_sample_size"]
    assert (sizes > 1).all()
    assert (sizes <= 500).all()
    assert (np.median(own) > 0.7) == (width == 0.2)


def shared_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide_guide(x):
    """The exact posterior of z given mu; of mu, twice as wide."""
    precision = 1 + len(x) / 2
    mu = pyro.sample("mu", dist.Normal(x.sum() / 2 / precision, 2 * precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + mu) / 2, 0.5**0.5))


def test_leave_one_out_with_a_correction_for_the_guide():
    x = X[:20].double()
    fit = from_pyro_svi((shared_model, wide_guide), x, num_samples=4000, prior=False, seed=0)
    stats = fit["sample_stats"]
    variance = 1 / (1 + (len(x) - 1) / 2)
    exact = dist.Normal((x.sum() - x) / 2 * variance, (2 + variance) ** 0.5).log_prob(x)
    ratios = stats["lp_global"] - stats["lp_approx_global"]
    if GENERATION:
        from arviz_stats import loo_approximate_posterior

        result = loo_approximate_posterior(
            fit, log_p=stats["lp_global"], log_q=stats["lp_approx_global"], pointwise=True
        )
        found = result.elpd_i.values
    else:
        log_likelihood = fit["log_likelihood"]["x"].stack(__sample__=("chain", "draw"))
        log_weights = ratios.stack(__sample__=("chain", "draw")) - log_likelihood
        weights, _ = az.psislw(log_weights.transpose("data", "__sample__"))
        found = np.log(np.exp(weights + log_likelihood).sum("__sample__")).values
    np.testing.assert_allclose(found, exact, atol=0.02)
    plain = az.loo(fit, pointwise=True)
    uncorrected = np.asarray(plain.elpd_i if GENERATION else plain.loo_i)
    assert abs(found - exact.numpy()).sum() < abs(uncorrected - exact.numpy()).sum()


# Markov chains


def chains(model, x):
    mcmc = MCMC(HMC(model, step_size=0.1, num_steps=2, adapt_step_size=False), 20, 1, disable_progbar=True)
    mcmc.run(x)
    return mcmc


def test_chains_of_latent_sites_of_each_datum_are_said_to_be_conditional():
    x = X[:4]
    mcmc = chains(shared_model, x)
    with pytest.warns(UserWarning, match=r"\['x'\] is conditional on the draws of \['z'\], of which each datum has"):
        fit = from_pyro_mcmc(mcmc)
    z = torch.tensor(values(fit, "posterior")["z"])
    np.testing.assert_allclose(values(fit, "log_likelihood")["x"], dist.Normal(z, 1.0).log_prob(x), rtol=1e-4)
    assert "conditional on the draws of ['z']" in fit["log_likelihood"].attrs["log_likelihood_note"]
    with pytest.raises(ValueError, match=r"Expected log_likelihood='conditional' or False .* no guide draws \['z'\]"):
        from_pyro_mcmc(mcmc, log_likelihood="integrated")


def test_chains_have_discrete_sites_of_each_datum_summed_out():
    @config_enumerate
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(shift + 2 * kind, 1.0), obs=x)

    x = X[:4]
    for samples_per_pass in (1, 7, None):
        fit = from_pyro_mcmc(chains(model, x), log_likelihood="integrated", samples_per_pass=samples_per_pass)
        shift = torch.tensor(values(fit, "posterior")["shift"])[..., None]
        low, high = (dist.Normal(shift + 2 * k, 1.0).log_prob(x) for k in (0, 1))
        expected = torch.logaddexp(low + np.log(0.7), high + np.log(0.3))
        np.testing.assert_allclose(values(fit, "log_likelihood")["x"], expected, rtol=1e-4)
