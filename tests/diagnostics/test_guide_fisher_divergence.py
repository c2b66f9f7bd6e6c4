"""The relative Fisher divergence of guide from prior against closed forms and grids, importance weights, refusals."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.linear_gaussian import (
    CENTRES,
    ODDS,
    chain_model,
    mixture_model,
    normal_pair,
    scalar_guide,
    scalar_model,
    shared_guide,
    shared_model,
    within,
)
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_ilvae.diagnostics import guide_fisher_divergence, posterior_fisher_divergence
from pyro_ilvae.diagnostics._engine.importance import smoothed_weights
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence_of_draws import posterior_fisher_divergence_of_draws

scales = st.floats(0.1, 3.0)


@given(st.floats(-3.0, 3.0), scales, st.floats(-3.0, 3.0), scales)
def test_guide_form_of_normals_is_its_integral(mu, s, m, t):
    model, guide = normal_pair(lambda x: dist.Normal(x + mu, s), dist.Normal(m, t))
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    result = guide_fisher_divergence(model, guide, x)
    assert result.estimator == "analytic"
    noise, weights = np.polynomial.hermite_e.hermegauss(5)  # exact for squares of linear functions
    z = x[:, None] + mu + s * torch.from_numpy(noise)
    difference = -(z - x[:, None] - mu) / s**2 + (z - m) / t**2
    exact = (difference**2 * torch.from_numpy(weights)).sum(-1) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(result.values, exact, rtol=1e-5, atol=1e-7)
    assert not result.standard_errors.any()


LOC, SCALE = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([0.3, 1.0, 2.0])
PRIOR = dist.Normal(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.8])).to_event(1)


def test_guide_form_is_the_sum_of_its_coordinates():
    model, guide = normal_pair(lambda x: dist.Normal(x[:, None] * LOC, SCALE).to_event(1), PRIOR)
    x = torch.randn(7)
    result = guide_fisher_divergence(model, guide, x, batch_size=3)
    expected = [
        guide_fisher_divergence(
            *normal_pair(lambda x, j=j: dist.Normal(x * LOC[j], SCALE[j]), dist.Normal(PRIOR.mean[j], PRIOR.stddev[j])),
            x,
        ).values
        for j in range(3)
    ]
    torch.testing.assert_close(result.per_dimension, torch.stack(expected, 1))
    torch.testing.assert_close(result.values, result.per_dimension.sum(1))
    # The second coordinate is collapsed where its mean is zero.
    assert not result.per_dimension[:, 1].any()


AFFINE = dist.transforms.AffineTransform(0.0, 1.0)


@pytest.mark.parametrize("covariance", ["q", "p", "both", "low-rank"])
def test_guide_form_of_multivariate_normals(covariance):
    root = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.2, 1.2]])

    def joint(loc):
        if covariance == "low-rank":
            return dist.LowRankMultivariateNormal(loc, root[:, :1], torch.tensor([0.5, 1.0, 0.2]))
        return dist.MultivariateNormal(loc, scale_tril=root.expand(*loc.shape[:-1], 3, 3))

    def q(x):
        loc = x[:, None] * LOC
        return dist.Normal(loc, SCALE).to_event(1) if covariance == "p" else joint(loc)

    p = joint(torch.ones(3)) if covariance in ("p", "both") else PRIOR
    x = torch.randn(4)
    analytic = guide_fisher_divergence(*normal_pair(q, p), x)
    assert analytic.estimator == "analytic"
    # The same distributions, in a form that has no formula.
    hidden = dist.TransformedDistribution(p, [AFFINE])
    sampled = guide_fisher_divergence(*normal_pair(q, hidden), x, num_samples=4000, seed=0)
    assert sampled.estimator == "sampled"
    within(sampled.values, analytic.values, sampled.standard_errors)
    within(sampled.per_dimension, analytic.per_dimension, sampled.per_dimension_standard_errors)
    torch.testing.assert_close(sampled.values, sampled.per_dimension.sum(1))


def test_guide_form_without_a_formula_is_its_integral():
    model, guide = normal_pair(lambda x: dist.Normal(x, 0.7), dist.StudentT(4.0, 0.5, 1.0))
    x = torch.tensor([-1.0, 0.0, 2.0])
    result = guide_fisher_divergence(model, guide, x, num_samples=4000, seed=0)
    grid = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    exact = []
    for loc in x.double():
        q, p = dist.Normal(loc, 0.7).log_prob(grid), dist.StudentT(4.0, 0.5, 1.0).log_prob(grid)
        score = torch.autograd.grad((q - p).sum(), grid)[0]
        exact.append(torch.trapezoid(q.detach().exp() * score**2, grid.detach()))
    within(result.values, torch.stack(exact).float(), result.standard_errors)


@pytest.mark.parametrize("build", [AutoNormal, AutoDiagonalNormal])
def test_guide_form_of_a_transformed_auxiliary_draw(build):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.3, 0.5))

    guide = build(model, init_scale=0.4, init_loc_fn=lambda site: torch.ones(3))
    x = torch.zeros(3)
    guide(x)
    result = guide_fisher_divergence(model, guide, x, num_samples=4000, seed=0)
    u = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    # In z = exp(u) the scores are those in u, less one, over z.
    difference = (-u / 0.4**2 + (u - 0.3) / 0.5**2) / u.exp()
    exact = torch.trapezoid(dist.Normal(0.0, 0.4).log_prob(u).exp() * difference**2, u)
    within(result.values, exact.float().expand(3), result.standard_errors)


def test_guide_form_of_a_joint_draw_is_that_of_each_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", PRIOR)

    guide = AutoMultivariateNormal(model)
    x = torch.zeros(2)
    guide(x)
    with torch.no_grad():
        perturb(guide, 0.5)
        joint = guide.get_posterior()
    result = guide_fisher_divergence(model, guide, x)
    assert result.estimator == "analytic"
    for n, own in enumerate((slice(0, 3), slice(3, 6))):
        block = dist.MultivariateNormal(joint.mean[own], joint.covariance_matrix[own, own])
        alone = guide_fisher_divergence(*normal_pair(lambda x, q=block: q, PRIOR), x[:1])
        torch.testing.assert_close(result.per_dimension[n], alone.per_dimension[0], rtol=1e-3, atol=1e-3)


def test_guide_form_of_what_is_masked_is_zero():
    def masked(fn):
        def call(x):
            with poutine.mask(mask=torch.tensor([True, False])):
                fn(x)

        return call

    pair = normal_pair(lambda x: dist.Normal(x[:, None] + LOC, SCALE).to_event(1), PRIOR)
    x = torch.randn(2)
    expected = guide_fisher_divergence(*pair, x).values * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(guide_fisher_divergence(*map(masked, pair), x).values, expected)


def test_guide_form_is_the_mean_over_draws_of_other_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(a, 2.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x, 0.5))
            pyro.sample("z", dist.Normal(1.0, 0.8))

    x = torch.tensor([-1.0, 0.0, 3.0])
    result = guide_fisher_divergence(model, guide, x, site="z", num_samples=2000, seed=0)
    exact = ((1 - x) ** 2 + 0.5**2) / 2.0**4 + (0.8 / 4 - 1 / 0.8) ** 2
    assert result.estimator == "analytic"
    within(result.values, exact, result.standard_errors)
    assert (result.standard_errors > 0).all()
    alone = guide_fisher_divergence(model, guide, x, site="a")
    torch.testing.assert_close(alone.values, x**2 + (0.5 - 2) ** 2, atol=1e-4, rtol=1e-4)


def test_guide_form_in_nested_plates_and_of_a_shared_site():
    def guide(x, loc=2.0):
        pyro.sample("a", dist.Normal(1.0, 1.0))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("part", 3, dim=-1):
            pyro.sample("z", dist.Normal(loc * x.sum(-1, keepdim=True) + torch.arange(3.0), 1.0))

    x = torch.randn(4, 5)
    result = guide_fisher_divergence(lambda x: poutine.do(guide, {})(x, 0.0), guide, x, site="z", num_samples=3)
    torch.testing.assert_close(result.per_dimension, (4 * x.sum(-1, keepdim=True) ** 2).expand(4, 3))
    torch.testing.assert_close(result.values, 12 * x.sum(-1) ** 2)
    assert guide_fisher_divergence(guide, guide, x, site="a", num_samples=3).values.tolist() == [0.0]
    with pytest.raises(ValueError, match="batch_size=None where data share sites, here ..a.."):
        guide_fisher_divergence(guide, guide, x, site="a", batch_size=2)


def test_kl_is_at_most_half_the_guide_form_for_a_standard_normal_prior():
    loc, scale = 3 * torch.randn(500), 3 * torch.rand(500) + 0.05
    model, guide = normal_pair(lambda x: dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
    kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
    assert (kl <= guide_fisher_divergence(model, guide, torch.zeros(500)).values / 2 + 1e-5).all()


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_weights_know_their_tail(k):
    log_weights = k * torch.distributions.Exponential(1.0).sample((20000, 5))  # of a Pareto distribution of this shape
    weights = smoothed_weights(log_weights)
    torch.testing.assert_close(weights.values.sum(0), torch.ones(5), rtol=1e-4, atol=0)
    assert ((weights.pareto_k - k).abs() < 0.25).all()


def test_weights_without_a_tail():
    equal = smoothed_weights(torch.full((100, 2), -1000.0))
    assert (equal.pareto_k == -math.inf).all()
    torch.testing.assert_close(equal.values, torch.full((100, 2), 0.01))
    assert smoothed_weights(torch.randn(29, 2)).pareto_k.isnan().all()
    assert smoothed_weights(torch.randn(30, 2)).pareto_k.isfinite().all()
    few = torch.full((100, 1), -math.inf)
    few[:3] = torch.tensor([[0.0], [-1.0], [-2.0]])
    weights = smoothed_weights(few)
    assert weights.pareto_k.tolist() == [math.inf]
    assert weights.values.isfinite().all()


def dirichlet_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def dirichlet_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Dirichlet(2 * torch.ones(3)))


def reversed_guide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(z, 1.0))


def nan_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.sqrt(z - 1000), 1.0, validate_args=False), obs=x)


def impossible_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", torch.where(z < 1000, -math.inf, z))


def mixture_chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Categorical(ODDS))
        z = pyro.sample("z", dist.Normal(a + CENTRES[y], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixture_chain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))


PLANAR = dist.transforms.planar(2)


def planar_guide(x):
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [PLANAR]))


def two_dim_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def auto(build, model):
    guide = build(model)
    guide(torch.ones(4))
    return guide


LINE = torch.linspace(-1.0, 1.0, 4)


posterior, guided, of_draws = (
    posterior_fisher_divergence,
    guide_fisher_divergence,
    posterior_fisher_divergence_of_draws,
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: posterior(shared_model, shared_guide, LINE, sites=["a"]),
            ValueError,
            "site 'a' in a plate over the 4 data",
        ),
        (lambda: posterior(scalar_model, scalar_guide, LINE, sites=["x"]), ValueError, r"among \['z'\], got 'x'"),
        (
            lambda: posterior(scalar_model, scalar_guide, LINE, sites="z"),
            ValueError,
            "a sequence of names, got the string 'z'",
        ),
        (
            lambda: posterior(scalar_model, scalar_guide, LINE, sites=[]),
            ValueError,
            "a continuous latent site in the plate",
        ),
        (lambda: posterior(scalar_model, lambda x: None, LINE), ValueError, "got none for 'z'"),
        (lambda: posterior(scalar_model, scalar_guide, LINE, num_samples=0), ValueError, "num_samples"),
        (lambda: posterior(scalar_model, scalar_guide, LINE, samples_per_pass=0), ValueError, "samples_per_pass"),
        (
            lambda: posterior(nan_model, scalar_guide, LINE, num_samples=9),
            ValueError,
            r"numbers, got NaN at sites \['x'\]",
        ),
        (
            lambda: posterior(impossible_model, scalar_guide, LINE, num_samples=9),
            ValueError,
            "draws that the model allows, got none for 4 data",
        ),
        (
            lambda: posterior(dirichlet_model, dirichlet_guide, LINE),
            UnavailableError,
            "site 'z' to have a support with interior",
        ),
        (
            lambda: posterior(scalar_model, auto(AutoDelta, scalar_model), LINE),
            UnavailableError,
            r"a point for each of \['z'\]",
        ),
        (lambda: guided(scalar_model, scalar_guide, LINE, site="y"), ValueError, "got 'y'"),
        (lambda: guided(scalar_model, scalar_guide, LINE, num_samples=0), ValueError, "num_samples"),
        (
            lambda: guided(mixture_model, mixture_model, LINE, site="y"),
            UnavailableError,
            "site 'y' to be continuous, got a Categorical",
        ),
        (
            lambda: guided(dirichlet_model, dirichlet_guide, LINE),
            UnavailableError,
            "site 'z' to have a support with interior",
        ),
        (lambda: guided(scalar_model, auto(AutoDelta, scalar_model), LINE), UnavailableError, "got a Delta"),
        (
            lambda: guided(chain_model, auto(AutoMultivariateNormal, chain_model), LINE, site="z"),
            UnavailableError,
            "draws site 'z' by itself, got a joint draw",
        ),
        (
            lambda: guided(chain_model, reversed_guide, LINE, site="z"),
            UnavailableError,
            r"draws \['a'\] before site 'z', as the model does, got the order \['z', 'a'\]",
        ),
        (
            lambda: guided(two_dim_model, auto(AutoIAFNormal, two_dim_model), LINE),
            UnavailableError,
            "joint draw is not Gaussian",
        ),
        (lambda: guided(two_dim_model, planar_guide, LINE), UnavailableError, "Planar of Normal"),
        (
            lambda: guided(mixture_chain, mixture_chain_guide, LINE, site="z"),
            UnavailableError,
            r"sums over \['y'\] and no drawn site but its own, got \['a', 'z'\]",
        ),
        (
            lambda: of_draws(scalar_model, {"z": torch.zeros(5, 3)}, LINE),
            ValueError,
            r"'z' of shape \(5, 4\), got \(5, 3\)",
        ),
        (lambda: of_draws(scalar_model, {"z": torch.zeros(5, 4, 1)}, LINE), ValueError, r"'z' of shape \(5, 4\)"),
        (
            lambda: of_draws(scalar_model, {"z": torch.full((5, 4), math.nan)}, LINE),
            ValueError,
            "draws of site 'z' to be finite",
        ),
        (lambda: of_draws(scalar_model, {}, LINE), ValueError, "draws of one number >= 1"),
        (lambda: of_draws(scalar_model, {"z": torch.zeros(5, 4), "y": torch.zeros(5, 4)}, LINE), ValueError, "got 'y'"),
        (
            lambda: of_draws(scalar_model, {"z": torch.zeros(5, 4)}, LINE, num_chains=2),
            ValueError,
            "num_chains to divide",
        ),
        (lambda: of_draws(shared_model, {"a": torch.zeros(5)}, LINE), ValueError, "none for 'z'"),
        (
            lambda: of_draws(shared_model, {"a": torch.zeros(5), "z": torch.zeros(5, 4)}, LINE, sites=["a"]),
            ValueError,
            "site 'a' in a plate",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
