"""The relative Fisher divergence of guide from prior, against closed forms and grids."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.estimates import within
from helpers.fisher_models import (
    CENTERS,
    LINE,
    ODDS,
    auto,
    chain_model,
    dirichlet_guide,
    dirichlet_model,
    mixture_densities,
    mixture_guide,
    mixture_model,
    normal_pair,
    scalar_guide,
    scalar_model,
)
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from pyro_ilvae.diagnostics import guide_fisher_divergence
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError

scales = st.floats(0.1, 3.0)


@given(st.floats(-3.0, 3.0), scales, st.floats(-3.0, 3.0), scales)
def test_guide_form_of_normals_is_its_integral(mu, s, m, t):
    model, guide = normal_pair(lambda x: dist.Normal(x + mu, s), dist.Normal(m, t))
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    result = guide_fisher_divergence(model, guide, x)
    assert result.estimator == "analytic"
    noise, weights = np.polynomial.hermite_e.hermegauss(5)  # exact for squares of linear functions
    z = x[:, None] + mu + s * torch.as_tensor(noise)
    difference = -(z - x[:, None] - mu) / s**2 + (z - m) / t**2
    exact = (difference**2 * torch.as_tensor(weights)).sum(-1) / math.sqrt(2 * math.pi)
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
    with pytest.raises(ValueError, match=r"batch_size=None where data share sites, here ..a.."):
        guide_fisher_divergence(guide, guide, x, site="a", batch_size=2)


def test_kl_is_at_most_half_the_guide_form_for_a_standard_normal_prior():
    loc, scale = 3 * torch.randn(500), 3 * torch.rand(500) + 0.05
    model, guide = normal_pair(lambda x: dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
    kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
    assert (kl <= guide_fisher_divergence(model, guide, torch.zeros(500)).values / 2 + 1e-5).all()


def reversed_guide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(z, 1.0))


def mixture_chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Categorical(ODDS))
        z = pyro.sample("z", dist.Normal(a + CENTERS[y], 1.0))
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: guide_fisher_divergence(scalar_model, scalar_guide, LINE, site="y"), ValueError, "got 'y'"),
        (lambda: guide_fisher_divergence(scalar_model, scalar_guide, LINE, num_samples=0), ValueError, "num_samples"),
        (
            lambda: guide_fisher_divergence(mixture_model, mixture_model, LINE, site="y"),
            UnavailableError,
            "site 'y' to be continuous, got a Categorical",
        ),
        (
            lambda: guide_fisher_divergence(dirichlet_model, dirichlet_guide, LINE),
            UnavailableError,
            "site 'z' to have a support with interior",
        ),
        (
            lambda: guide_fisher_divergence(scalar_model, auto(AutoDelta, scalar_model), LINE),
            UnavailableError,
            "got a Delta",
        ),
        (
            lambda: guide_fisher_divergence(chain_model, auto(AutoMultivariateNormal, chain_model), LINE, site="z"),
            UnavailableError,
            "draws site 'z' by itself, got a joint draw",
        ),
        (
            lambda: guide_fisher_divergence(chain_model, reversed_guide, LINE, site="z"),
            UnavailableError,
            r"draws \['a'\] before site 'z', as the model does, got the order \['z', 'a'\]",
        ),
        (
            lambda: guide_fisher_divergence(two_dim_model, auto(AutoIAFNormal, two_dim_model), LINE),
            UnavailableError,
            "joint draw is not Gaussian",
        ),
        (lambda: guide_fisher_divergence(two_dim_model, planar_guide, LINE), UnavailableError, "Planar of Normal"),
        (
            lambda: guide_fisher_divergence(mixture_chain, mixture_chain_guide, LINE, site="z"),
            UnavailableError,
            r"sums over \['y'\] and no drawn site but its own, got \['a', 'z'\]",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_guide_form_sums_a_discrete_site_out_of_the_prior():
    x = torch.tensor([-2.0, 0.3, 3.0])
    result = guide_fisher_divergence(mixture_model, mixture_guide, x, num_samples=4000, seed=0)
    z = torch.linspace(-30, 30, 60001, dtype=torch.float64, requires_grad=True)
    for n, datum in enumerate(x):
        _, log_prior = mixture_densities(datum)
        q = dist.StudentT(6.0, datum.double() / 2, 1.0).log_prob(z)
        score = torch.autograd.grad((q - log_prior(z).logsumexp(-1)).sum(), z)[0]
        exact = torch.trapezoid(q.detach().exp() * score**2, z.detach())
        within(result.values[n], exact.float(), result.standard_errors[n])
