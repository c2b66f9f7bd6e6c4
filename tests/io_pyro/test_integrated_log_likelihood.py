"""Log likelihoods of a conversion are integrated over the latent sites of each datum, against closed forms."""

import math

import numpy as np
import pyro
import pytest
import torch
from helpers import latent_structures as structures
from helpers.arviz_groups import values
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy.integrate import quad
from torch.distributions import MultivariateNormal

from pyro_ilvae import diagnostics
from pyro_ilvae.io_pyro import from_pyro_svi

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
PASSES = pytest.mark.parametrize("samples_per_pass", [1, 7, None])


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def converted(pair, *args, **arguments):
    quick = {"prior": False, "posterior_predictive": False, "num_samples": 20, "seed": 0}
    return from_pyro_svi(pair, args, **quick | arguments)


def log_likelihood(fit, name="x"):
    return torch.tensor(values(fit, "log_likelihood")[name])


def assert_close_to(fit, expected, name="x", num_samples=1000):
    """Within five standard errors of the importance-weighted estimate, in every draw."""
    found = log_likelihood(fit, name)
    sizes = torch.tensor(values(fit, "importance_sampling")[f"{name}_effective_sample_size"])
    errors = ((num_samples / sizes - 1).clamp(min=0) / (num_samples - 1)).sqrt()
    assert ((found - expected).abs() < 5 * errors + 1e-6).all()
    assert errors.max() < 0.2


# Local sites only: the value of the evidence in every draw


@PASSES
def test_an_exact_guide_gives_the_marginal_density_to_rounding(samples_per_pass):
    def guide(x):
        with structures.data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    fit = converted((structures.scalar_model, guide), X, samples_per_pass=samples_per_pass)
    assert fit["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    expected = dist.Normal(0.0, 2**0.5).log_prob(X).expand(1, 20, 3)
    torch.testing.assert_close(log_likelihood(fit), expected, rtol=2e-9, atol=2e-9)
    np.testing.assert_allclose(values(fit, "importance_sampling")["x_effective_sample_size"], 100, rtol=1e-9)
    # Joint and guide density are those of each draw, and differ by the evidence of all data.
    stats = values(fit, "sample_stats")
    np.testing.assert_allclose(stats["lp"] - stats["lp_approx"], expected[0, 0].sum(), rtol=1e-9)
    z = torch.tensor(values(fit, "posterior")["z"])
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    np.testing.assert_allclose(stats["lp"], joint.sum(-1))
    np.testing.assert_allclose(stats["lp_global"], expected[0, 0].sum(), rtol=1e-8)
    np.testing.assert_allclose(stats["lp_approx_global"], 0.0)


CASES = {
    "another guide": (structures.scalar_model, structures.scalar_guide, lambda x: dist.Normal(0.0, 2**0.5).log_prob(x)),
    "chain": (structures.chain_model, structures.chain_guide, lambda x: dist.Normal(0.0, 1.25**0.5).log_prob(x)),
    "reversed": (
        structures.chain_model,
        structures.reversed_chain_guide,
        lambda x: dist.Normal(0.0, 1.25**0.5).log_prob(x),
    ),
    "rough mixture": (structures.mixture_model, structures.rough_mixture_guide, structures.mixture_log_marginal),
    "indicator drawn": (
        structures.gmvae_model,
        structures.gmvae_guide,
        lambda x: structures.mixture_log_marginal(x, 1.0),
    ),
    "indicator summed out": (
        config_enumerate(structures.gmvae_model),
        structures.gmvae_guide_without_y,
        lambda x: structures.mixture_log_marginal(x, 1.0),
    ),
}


@PASSES
@pytest.mark.parametrize("case", CASES)
def test_a_rough_guide_gives_the_marginal_density_within_its_error(case, samples_per_pass, monkeypatch):
    monkeypatch.setattr(structures, "WEIGHTS", structures.WEIGHTS.double())
    monkeypatch.setattr(structures, "CENTERS", structures.CENTERS.double())
    model, guide, log_marginal = CASES[case]
    arguments = {"num_importance_samples": 1000, "num_samples": 2, "samples_per_pass": samples_per_pass}
    fit = converted((model, guide), X, **arguments)
    assert_close_to(fit, log_marginal(X))
    evidence = diagnostics.evidence(model, guide, X, num_samples=1000, seed=1)
    errors = 2 * evidence.log_likelihood_standard_errors
    assert ((log_likelihood(fit) - evidence.log_likelihood).abs() < 5 * errors + 1e-6).all()
    assert values(fit, "importance_sampling")["x_pareto_k"].shape == (3,)


@PASSES
def test_sites_that_are_summed_out_are_summed_out_exactly(samples_per_pass, monkeypatch):
    monkeypatch.setattr(structures, "WEIGHTS", structures.WEIGHTS.double())
    monkeypatch.setattr(structures, "CENTERS", structures.CENTERS.double())
    pair = config_enumerate(structures.mixture_model), structures.empty_guide
    fit = converted(pair, X, samples_per_pass=samples_per_pass)
    expected = structures.mixture_log_marginal(X).expand(1, 20, 3)
    torch.testing.assert_close(log_likelihood(fit), expected, rtol=2e-9, atol=2e-9)
    np.testing.assert_allclose(values(fit, "sample_stats")["lp"], expected[0, 0].sum())
    assert "importance_sampling" not in fit


@PASSES
@pytest.mark.parametrize("data_dim", [-2, -1])
def test_plates_inside_the_plate_of_the_data(data_dim, samples_per_pass):
    """z_n -> w_nm -> x_nm: by default given z_n for each (n, m), and for each n if the plate is named."""
    x = torch.randn(3, 2, 2)
    model, guide = structures.nested(data_dim)
    arguments = {"num_importance_samples": 2000, "num_samples": 3, "samples_per_pass": samples_per_pass}
    fit = converted(
        (model, guide),
        x,
        plate="data",
        **arguments | ({"num_importance_samples": 300} if samples_per_pass == 1 else {}),
    )
    assert fit["log_likelihood"]["joint_data"].dims == ("chain", "draw", "data")
    if samples_per_pass != 1:
        assert_close_to(fit, structures.nested_log_marginal(x), "joint_data", 2000)
    fit = converted((model, guide), x, **arguments | {"num_importance_samples": 50})
    z = torch.tensor(values(fit, "posterior")["z"])[..., None, None]
    # x given z is N(z, 1 + 0.25) in each entry.
    expected = dist.Normal(z, 1.25**0.5).log_prob(x).sum(-1)
    found = log_likelihood(fit)
    if data_dim == -1:
        found = found.mT
    assert fit["log_likelihood"]["x"].dims[2:] == (("data", "inner") if data_dim == -2 else ("inner", "data"))
    assert (found - expected).abs().median() < 0.3


# Sites that data share: given each draw of them


@PASSES
def test_given_each_draw_of_a_shared_site(samples_per_pass):
    """a -> z_n -> x_n: log p(x_n | a) by the exact posterior of z_n given a, and the evidence from the densities."""
    fit = converted((structures.shared_model, structures.exact_shared_guide), X, samples_per_pass=samples_per_pass)
    a = torch.tensor(values(fit, "posterior")["a"])
    expected = dist.Normal(a[..., None], (1 + structures.NOISE**2) ** 0.5).log_prob(X)
    torch.testing.assert_close(log_likelihood(fit), expected)
    stats = values(fit, "sample_stats")
    evidence = float(structures.shared_log_marginal(X))
    np.testing.assert_allclose(stats["lp"] - stats["lp_approx"], evidence)
    np.testing.assert_allclose(stats["lp_global"] - stats["lp_approx_global"], evidence)


def test_a_hierarchy_against_quadrature():
    """A shared scale, and a rate for each datum: log p(x_n | scale) by quadrature."""

    def model(x):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(0.0, scale))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 3.0])
    guide = AutoNormal(model, init_scale=0.5)
    fit = converted((model, guide), x, num_samples=3, num_importance_samples=4000)
    scales = values(fit, "posterior")["scale"][0]

    def likelihood(u, scale, count):
        return math.exp(-(u**2) / 2 + count * scale * u - math.exp(scale * u) - math.lgamma(count + 1)) / math.sqrt(
            2 * math.pi
        )

    expected = [[math.log(quad(likelihood, -9, 9, (scale, float(count)))[0]) for count in x] for scale in scales]
    assert_close_to(fit, torch.tensor([expected]), num_samples=4000)


def test_unchanged_without_local_sites():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    pair = model, AutoNormal(model)
    for kind in (True, "integrated", "conditional"):
        fit = converted(pair, X, log_likelihood=kind)
        mu = torch.tensor(values(fit, "posterior")["mu"])[..., None]
        torch.testing.assert_close(log_likelihood(fit), dist.Normal(mu, 1.0).log_prob(X))
    stats = values(converted(pair, X), "sample_stats")
    assert set(stats) == {"lp", "lp_approx"}


# Several observed sites, masks, sequential plates, minibatches


def test_several_observed_sites_have_their_joint_density():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 2.0), obs=y)
        pyro.sample("total", dist.Normal(0.0, 1.0), obs=x.sum())

    def guide(x, y):
        variance = 1 / (1 + 1 + 0.25)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y / 4) * variance, variance**0.5))

    y = torch.tensor([1.0, 0.0, -1.0])
    fit = converted((model, guide), X, y)
    assert set(fit["log_likelihood"].data_vars) == {"joint_data", "total"}
    covariance = torch.ones(2, 2) + torch.diag(torch.tensor([1.0, 4.0]))
    expected = MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([X, y], -1))
    torch.testing.assert_close(log_likelihood(fit, "joint_data"), expected.expand(1, 20, 3), rtol=2e-9, atol=2e-9)
    assert "log p of ['x', 'y'], integrated over ['z']" in fit["log_likelihood"].attrs["log_likelihood_note"]


def test_a_sequence_of_sites_has_its_joint_density():
    """A random walk with noise, one walk for each datum, and a guide that is far from exact."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = 0.0
            for t in pyro.markov(range(2)):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(2)):
                pyro.sample(f"z_{t}", dist.Normal(x[:, t] / 2, 0.9))

    x = torch.randn(4, 2)
    fit = converted((model, guide), x, num_importance_samples=2000)
    covariance = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert_close_to(fit, MultivariateNormal(torch.zeros(2), covariance).log_prob(x), "joint_data", 2000)


def test_a_datum_that_is_masked_out_has_no_log_likelihood():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    expected = torch.where(mask, dist.Normal(0.0, 2**0.5).log_prob(X), 0.0)
    found = log_likelihood(converted((model, guide), X))
    torch.testing.assert_close(found, expected.expand(1, 20, 3), rtol=2e-9, atol=2e-9)


def test_sequential_plates_and_minibatches():
    def model(x):
        for n in pyro.plate("step", len(x)):
            z = pyro.sample(f"z_{n}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{n}", dist.Normal(z, 1.0), obs=x[n])

    def guide(x):
        for n in pyro.plate("step", len(x)):
            pyro.sample(f"z_{n}", dist.Normal(x[n] / 2, 0.5**0.5))

    expected = dist.Normal(0.0, 2**0.5).log_prob(X)
    fit = converted((model, guide), X)
    for n in range(3):
        torch.testing.assert_close(log_likelihood(fit, f"x_{n}"), expected[n].expand(1, 20), rtol=2e-9, atol=2e-9)

    def batch_model(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def batch_guide(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    found = log_likelihood(converted((batch_model, batch_guide), X))
    torch.testing.assert_close(found, expected.expand(1, 20, 3), rtol=2e-9, atol=2e-9)


# What cannot be integrated, and what is asked for


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("make_guide", [AutoDelta, AutoMultivariateNormal])
def test_a_guide_without_a_density_for_each_datum(make_guide):
    pair = local, make_guide(local)
    with pytest.warns(UserWarning, match=r"log likelihood of 'x' is left out: .* draws \['z'\] at a point, or jointly"):
        fit = converted(pair, X)
    assert "log_likelihood" not in fit
    with pytest.raises(ValueError, match=r"Expected log_likelihood='conditional' or False .*'x'"):
        converted(pair, X, log_likelihood="integrated")
    fit = converted(pair, X, log_likelihood="conditional")
    z = torch.tensor(values(fit, "posterior")["z"])
    torch.testing.assert_close(log_likelihood(fit), dist.Normal(z, 1.0).log_prob(X))
    assert "conditional on the draws of ['z']" in fit["log_likelihood"].attrs["log_likelihood_note"]
    assert ("lp_approx" in fit["sample_stats"]) == (make_guide is not AutoDelta)


def test_sites_that_several_elements_share_are_named():
    def model(x):
        with pyro.plate("group", len(x), dim=-2):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("datum", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        with pyro.plate("group", len(x), dim=-2):
            pyro.sample("loc", dist.Normal(x.sum(-1, keepdim=True) / 3, 0.6))

    x = torch.randn(3, 2)
    pair = model, guide
    with pytest.warns(UserWarning, match=r"'x' is conditional on the draws of \['loc'\].* one of \['group'\]"):
        fit = converted(pair, x)
    loc = torch.tensor(values(fit, "posterior")["loc"])[..., None]
    torch.testing.assert_close(log_likelihood(fit), dist.Normal(loc, 1.0).log_prob(x))
    with pytest.raises(ValueError, match=r"Expected plate to name .* one of \['group'\].*'integrated' without it"):
        converted(pair, x, log_likelihood="integrated")
    fit = converted(pair, x, plate="group", log_likelihood="integrated", num_importance_samples=4000)
    covariance = torch.ones(2, 2) + torch.eye(2)
    assert_close_to(fit, MultivariateNormal(torch.zeros(2), covariance).log_prob(x), "joint_group", 4000)


def test_the_kind_of_log_likelihood_changes_no_draw():
    pair = structures.shared_model, structures.exact_shared_guide
    fits = [converted(pair, X, log_likelihood=kind, prior=True) for kind in (True, "conditional", False)]
    for group in ("posterior", "prior"):
        first = values(fits[0], group)
        for fit in fits[1:]:
            for name, array in values(fit, group).items():
                np.testing.assert_array_equal(first[name], array)
    again = converted(pair, X, prior=True)
    np.testing.assert_array_equal(log_likelihood(again), log_likelihood(fits[0]))
