"""Diagnostics of collapse against closed forms, on models where every number is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    init_to_sample,
)
from torch.distributions import Normal, kl_divergence

from pyro_ilvae import anneal
from pyro_ilvae.diagnostics import (
    UnavailableError,
    active_units,
    active_units_of_draws,
    bits_per_dimension,
    collapse_summary,
    collapsed_dimensions,
    collapsed_fraction,
    evidence,
    kl_per_dimension,
    perplexity,
)
from pyro_ilvae.diagnostics import (
    kl_divergence as kl_divergence_of,
)

W = torch.tensor([[2.0, 0.0, 0.3], [0.0, 1.0, 0.5]])  # K = 2 to D = 3
NOISE = 0.7
LOADING = torch.tensor([1.5, -0.5, 0.0])
SCALE = torch.tensor([0.3, 0.8, 1.0])
N = 60


def linear_model(x, data_size=None):
    """Probabilistic PCA: x = W^T z + noise, for which everything is Gaussian."""
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=x)


def exact_guide(x, data_size=None):
    precision = torch.eye(2) + W @ W.mT / NOISE**2
    loc = torch.linalg.solve(precision, W @ x.mT / NOISE**2).mT
    with pyro.plate("data", data_size or len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def mean_field_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] * LOADING, SCALE).to_event(1))


def expected_kl(x):
    return kl_divergence(Normal(x[:, None] * LOADING, SCALE.expand(len(x), 3)), Normal(0.0, 1.0))


@pytest.mark.parametrize("batch_size", [None, 1, 7, 1000])
def test_kl_is_analytic(batch_size):
    x = torch.randn(N)
    kl = kl_per_dimension(model, mean_field_guide, x, batch_size=batch_size)
    assert kl.estimator == "analytic"
    torch.testing.assert_close(kl.values, expected_kl(x))


def test_kl_is_sampled_where_there_is_no_formula():
    def student_prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, torch.zeros(3), 1.0).to_event(1))

    x = torch.randn(4)
    kl = kl_per_dimension(student_prior, mean_field_guide, x, num_samples=20000)
    assert kl.estimator == "sampled"
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None, None]
    q = Normal((x[:, None] * LOADING).double(), SCALE.double().expand(4, 3))
    integrand = q.log_prob(grid).exp() * (q.log_prob(grid) - dist.StudentT(5.0).log_prob(grid))
    torch.testing.assert_close(kl.values, torch.trapezoid(integrand, grid, dim=0).float(), atol=0.03, rtol=0)


def test_kl_ignores_subsampling_and_handlers_around_the_call():
    x = torch.randn(N)

    def scaled(x):
        with pyro.plate("data", 100 * len(x), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with anneal(beta=0.1), poutine.trace() as outer:
        kl = kl_per_dimension(scaled, mean_field_guide_scaled, x)
    torch.testing.assert_close(kl.values, expected_kl(x))
    assert not [name for name, site in outer.trace.nodes.items() if site["type"] == "sample"]


def mean_field_guide_scaled(x):
    with pyro.plate("data", 100 * len(x), subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(x[:, None] * LOADING, SCALE).to_event(1))


@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_active_units(batch_size):
    x = torch.randn(N)
    units = active_units(model, mean_field_guide, x, batch_size=batch_size)
    torch.testing.assert_close(units.variances, LOADING**2 * x.var())
    assert units.active.tolist() == [True, True, False]
    assert units.num_active == 2
    assert active_units(model, mean_field_guide, x, threshold=1.0).active.tolist() == [True, False, False]


def test_active_units_by_draws_where_the_mean_has_no_formula():
    def flow_guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None] * LOADING, SCALE).to_event(1)
            transform = dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    x = torch.randn(N)
    units = active_units(model, flow_guide, x, num_samples=2000)
    torch.testing.assert_close(units.variances, 4 * LOADING**2 * x.var(), rtol=0.03, atol=5e-3)


@pytest.mark.parametrize("data_size", [None, 1000])
@pytest.mark.parametrize(("batch_size", "samples_per_pass"), [(None, 100), (7, 3)])
def test_evidence_is_exact_at_the_exact_posterior(data_size, batch_size, samples_per_pass):
    x = torch.randn(N, 3)
    covariance = W.mT @ W + NOISE**2 * torch.eye(3)
    marginal = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    bounds = evidence(
        lambda batch: linear_model(batch, data_size),
        lambda batch: exact_guide(batch, data_size),
        x,
        num_samples=10,
        batch_size=batch_size,
        samples_per_pass=samples_per_pass,
    )
    torch.testing.assert_close(bounds.log_likelihood, marginal, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bounds.elbo, marginal, atol=1e-4, rtol=1e-4)


def test_draws_in_passes_bound_the_memory_and_change_nothing(monkeypatch):
    x = torch.randn(N, 3)
    most = []

    def model_that_looks(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            most.append(z[..., 0].numel())
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=batch)

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batches._MOST_PAIRS", 7 * N)
    bounds = evidence(model_that_looks, exact_guide, x, num_samples=30)
    assert max(most) == 7 * N
    torch.testing.assert_close(bounds.elbo, evidence(linear_model, exact_guide, x).elbo, atol=1e-4, rtol=1e-4)


def test_kl_of_a_site_without_factors_is_that_of_its_marginals_and_in_total():
    x = torch.randn(N, 3)
    posterior = poutine.trace(exact_guide).get_trace(x).nodes["z"]["fn"]
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    marginals = kl_per_dimension(linear_model, exact_guide, x)
    expected = kl_divergence(Normal(posterior.mean, posterior.stddev), Normal(0.0, 1.0))
    torch.testing.assert_close(marginals.values, expected)
    total = kl_divergence_of(linear_model, exact_guide, x, num_samples=2000)
    exact = kl_divergence(posterior, prior)
    assert ((total.values - exact).abs() < 5 * total.standard_errors).all()
    assert (exact > marginals.values.sum(-1)).all()  # the dependence is lost in the marginals


def test_kl_of_a_flow():
    x = torch.randn(N)
    kl = kl_divergence_of(model, flow_guide, x, num_samples=3000, seed=1)
    assert kl.estimator == "sampled"
    exact = kl_divergence(
        dist.MultivariateNormal((x[:, None] * LOADING) @ L.mT, L @ torch.diag(SCALE**2) @ L.mT),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    )
    assert ((kl.values - exact).abs() < 5 * kl.standard_errors).all()
    state = torch.get_rng_state()
    again = kl_divergence_of(model, flow_guide, x, num_samples=3000, seed=1)
    assert torch.equal(kl.values, again.values)
    assert torch.equal(state, torch.get_rng_state())


def test_standard_errors_of_the_evidence():
    x = torch.randn(8, 3)
    repeats = [evidence(linear_model, prior_guide, x, num_samples=400) for _ in range(200)]
    for value, error in (("elbo", "elbo_standard_errors"), ("log_likelihood", "log_likelihood_standard_errors")):
        spread = torch.stack([getattr(bounds, value) for bounds in repeats]).std(0)
        stated = torch.stack([getattr(bounds, error) for bounds in repeats]).mean(0)
        # The delta method is for many effective draws.
        enough = torch.stack([bounds.effective_sample_sizes for bounds in repeats]).mean(0) > 20
        assert enough.any()
        assert ((spread / stated)[enough] > 0.7).all()
        assert ((spread / stated)[enough] < 1.4).all()
    sizes = evidence(linear_model, exact_guide, x, num_samples=50).effective_sample_sizes
    torch.testing.assert_close(sizes, torch.full((8,), 50.0), rtol=1e-3, atol=0)
    assert evidence(linear_model, exact_guide, x, num_samples=1).elbo_standard_errors.isnan().all()


def test_active_units_of_draws():
    means = torch.randn(200, 3) * torch.tensor([1.0, 0.3, 0.0])
    draws = means + torch.randn(50, 200, 3)
    units = active_units_of_draws(draws)
    # Without the correction the sampling of the means alone, 1 / 50, would pass the threshold.
    assert draws.mean(0).var(0)[2] > 0.01
    assert ((units.variances - means.var(0)).abs() < 5 * (units.standard_errors + 0.002)).all()
    assert units.active.tolist() == [True, True, False]
    assert active_units_of_draws(torch.ones(1, 4, 2)).variances.tolist() == [0.0, 0.0]


def test_standard_errors_of_the_variances():
    x = torch.randn(400, 500)
    units = [active_units_of_draws(batch[None, :, None]) for batch in x]
    variances = torch.stack([unit.variances for unit in units])
    errors = torch.stack([unit.standard_errors for unit in units])
    assert float(errors.mean() / variances.std()) == pytest.approx(1.0, abs=0.2)


def test_collapsed_fraction_is_the_distribution_function():
    kl = torch.rand(500) * 3
    curve = collapsed_fraction(kl)
    torch.testing.assert_close(curve.epsilons, kl.sort().values)
    torch.testing.assert_close(curve.fractions, torch.arange(1, 501) / 500)
    per_dimension = collapsed_fraction(torch.rand(500, 2) * torch.tensor([1.0, 0.0]), [0.0, 0.5])
    assert per_dimension.fractions[:, 1].tolist() == [1.0, 1.0]
    assert abs(per_dimension.fractions[1, 0] - 0.5) < 5 * per_dimension.standard_errors[1, 0]


def test_collapsed_dimensions():
    kl = torch.tensor([[0.0, 0.02]] * 99 + [[1.0, 0.0]])
    assert collapsed_dimensions(kl, epsilon=0.01, delta=0.01).tolist() == [True, False]
    assert collapsed_dimensions(kl, epsilon=0.01, delta=0.005).tolist() == [False, False]


def test_units_of_the_evidence():
    log_likelihood = torch.tensor([-5.0, -7.0])
    torch.testing.assert_close(bits_per_dimension(log_likelihood, 4), log_likelihood / -4 / math.log(2))
    # Tokens count alike, also where one sequence is longer.
    assert float(perplexity(log_likelihood, torch.tensor([1, 5]))) == pytest.approx(math.exp(2.0))
    with pytest.raises(ValueError, match="num_tokens of the shape"):
        perplexity(log_likelihood, torch.tensor([3]))


def prior_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_bounds_are_ordered_and_tighten():
    x = torch.randn(N, 3)
    covariance = W.mT @ W + NOISE**2 * torch.eye(3)
    marginal = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).mean()
    few = evidence(linear_model, prior_guide, x, num_samples=5)
    many = evidence(linear_model, prior_guide, x, num_samples=5000)
    assert many.elbo.mean() < few.log_likelihood.mean() < many.log_likelihood.mean() < marginal + 0.05
    # Averaging before the log-sum-exp, a mistake that is seen in the wild, would give the ELBO here.
    torch.testing.assert_close(many.log_likelihood.mean(), marginal, atol=0.05, rtol=0)
    elbo = -Trace_ELBO(num_particles=5000, vectorize_particles=True).loss(linear_model, prior_guide, x) / N
    assert many.elbo.mean() == pytest.approx(elbo, abs=0.2)


def test_evidence_respects_masks():
    x = torch.randn(N, 3)
    mask = torch.rand(N) > 0.5

    def masked(batch):
        with pyro.plate("data", len(batch)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=batch)

    def masked_guide(batch):
        with poutine.mask(mask=mask):
            exact_guide(batch)

    log_likelihood = evidence(masked, masked_guide, x, num_samples=3).log_likelihood
    assert not log_likelihood[~mask].any()
    torch.testing.assert_close(
        log_likelihood[mask], evidence(linear_model, exact_guide, x).log_likelihood[mask], atol=1e-4, rtol=1e-4
    )


def scalar_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("build", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_guides_whose_density_is_at_an_auxiliary_site(build):
    x = torch.randn(N)
    guide = build(scalar_model, init_loc_fn=init_to_sample, init_scale=0.5)
    guide(x)
    with torch.no_grad():
        loc = guide.median(x)["z"]
    kl = kl_per_dimension(scalar_model, guide, x)
    assert kl.estimator == "analytic"
    torch.testing.assert_close(kl.values, kl_divergence(Normal(loc, 0.5), Normal(0.0, 1.0)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(active_units(scalar_model, guide, x).variances, loc.var(), rtol=1e-4, atol=1e-4)


def test_points_are_refused():
    x = torch.randn(N)
    guide = AutoDelta(scalar_model)
    guide(x)
    for measure in (kl_per_dimension, kl_divergence_of, active_units):
        with pytest.raises(UnavailableError, match="got a Delta"):
            measure(scalar_model, guide, x)


def test_guide_with_parameters_of_its_own():
    guide = AutoNormalMessenger(scalar_model)
    x = torch.randn(N)
    svi = SVI(scalar_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    kl = kl_per_dimension(scalar_model, guide, x)
    draws = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].sample((20_000,))
    expected = kl_divergence(Normal(draws.mean(0), draws.std(0)), Normal(0.0, 1.0))
    torch.testing.assert_close(kl.values.mean(), expected.mean(), atol=0.05, rtol=0)
    assert not kl.values.requires_grad
    assert not active_units(scalar_model, guide, x).variances.requires_grad


@pytest.mark.parametrize(("delta", "verdict"), [(0.0, "active"), (0.3, "active"), (0.7, "collapsed")])
def test_delta_is_the_part_of_the_data_that_may_differ(delta, verdict):
    def half_guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.where(torch.arange(len(x)) % 2 == 0, 3.0, 0.0)
            pyro.sample("z", dist.Normal(loc[:, None].expand(-1, 3), 1.0).to_event(1))

    summary = collapse_summary(model, half_guide, torch.randn(N), delta=delta, measures=("kl", "active_units"))
    assert summary.verdict[0] == verdict


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


def global_model(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_guide(x):
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def flow_guide(x):
    with pyro.plate("data", len(x)):
        base = dist.Normal(x[:, None] * LOADING, SCALE).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.LowerCholeskyAffine(torch.zeros(3), L)]))


L = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.3, 1.0]])
X = torch.linspace(-1.0, 1.0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_per_dimension(model, mean_field_guide, X, site="y"), r"latent site of the guide, one of \['z'\]"),
        (lambda: kl_per_dimension(model, mean_field_guide, X, site="x"), "got 'x'"),
        (lambda: kl_per_dimension(model, flow_guide, X), "site 'z' to factorize"),
        (lambda: kl_per_dimension(global_model, global_guide, X, site="a", batch_size=2), r"batch_size=None where data share sites, here \[.a.\], got 2"),
        (lambda: evidence(global_model, global_guide, X, batch_size=2), r"batch_size=None where data share .*\['a'"),
        (lambda: active_units(global_model, global_guide, X, site="a"), "site 'a' in a plate over the 5 data"),
        (lambda: evidence(model, lambda x: None, X), "latent site of the model in the guide, .* got none for 'z'"),
        (lambda: active_units(model, mean_field_guide, X[:1]), "at least two data"),
        (lambda: active_units(model, mean_field_guide, X, threshold=-1.0), "threshold"),
        (lambda: collapse_summary(model, mean_field_guide, X, delta=2.0), r"delta to be a number in \[0, 1\]"),
        (lambda: collapse_summary(model, mean_field_guide, X, epsilon=-1.0), "epsilon"),
        (lambda: collapse_summary(model, mean_field_guide, X, num_samples=0), "num_samples"),
        (lambda: collapse_summary(model, mean_field_guide, X, batch_size=0), "batch_size"),
        (lambda: kl_per_dimension(model, mean_field_guide, X[:0]), "at least one datum in model_args, got none"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ([1.0], "model_args to be a tensor or a tuple, got list"),
        ((X, [1.0] * 5), r"model_args\[1\] to be a tensor over the 5 data or something that all data share, got list"),
    ],
)
def test_refuses_arguments_of_another_kind(model_args, message):
    with pytest.raises(TypeError, match=message):
        kl_per_dimension(model, mean_field_guide, model_args)
