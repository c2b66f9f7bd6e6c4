"""The relative Fisher divergence of the true posterior from the prior, against closed forms and grids."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import within
from helpers.fisher_models import (
    CENTERS,
    LINE,
    ODDS,
    SQUARE,
    TALL,
    LinearGaussian,
    N,
    X,
    auto,
    chain_model,
    dirichlet_guide,
    dirichlet_model,
    grid_divergence,
    mixture_densities,
    mixture_guide,
    mixture_model,
    nested_exact,
    nested_guide,
    nested_model,
    normal_pair,
    scalar_guide,
    scalar_model,
    shared_exact,
    shared_guide,
    shared_model,
)
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_ilvae.diagnostics import guide_fisher_divergence, posterior_fisher_divergence
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError
from pyro_ilvae.diagnostics.fisher.posterior_fisher_divergence_of_draws import posterior_fisher_divergence_of_draws


def nan_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.sqrt(z - 1000), 1.0, validate_args=False), obs=x)


def impossible_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", torch.where(z < 1000, -math.inf, z))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: posterior_fisher_divergence(shared_model, shared_guide, LINE, sites=["a"]),
            ValueError,
            "site 'a' in a plate over the 4 data",
        ),
        (
            lambda: posterior_fisher_divergence(scalar_model, scalar_guide, LINE, sites=["x"]),
            ValueError,
            r"among \['z'\], got 'x'",
        ),
        (
            lambda: posterior_fisher_divergence(scalar_model, scalar_guide, LINE, sites="z"),
            ValueError,
            "a sequence of names, got the string 'z'",
        ),
        (
            lambda: posterior_fisher_divergence(scalar_model, scalar_guide, LINE, sites=[]),
            ValueError,
            "a continuous latent site in the plate",
        ),
        (lambda: posterior_fisher_divergence(scalar_model, lambda x: None, LINE), ValueError, "got none for 'z'"),
        (
            lambda: posterior_fisher_divergence(scalar_model, scalar_guide, LINE, num_samples=0),
            ValueError,
            "num_samples",
        ),
        (
            lambda: posterior_fisher_divergence(scalar_model, scalar_guide, LINE, samples_per_pass=0),
            ValueError,
            "samples_per_pass",
        ),
        (
            lambda: posterior_fisher_divergence(nan_model, scalar_guide, LINE, num_samples=9),
            ValueError,
            r"numbers, got NaN at sites \['x'\]",
        ),
        (
            lambda: posterior_fisher_divergence(impossible_model, scalar_guide, LINE, num_samples=9),
            ValueError,
            "draws that the model allows, got none for 4 data",
        ),
        (
            lambda: posterior_fisher_divergence(dirichlet_model, dirichlet_guide, LINE),
            UnavailableError,
            "site 'z' to have a support with interior",
        ),
        (
            lambda: posterior_fisher_divergence(scalar_model, auto(AutoDelta, scalar_model), LINE),
            UnavailableError,
            r"a point for each of \['z'\]",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("weight", [SQUARE, TALL], ids=["K=D", "K<D"])
def test_posterior_form_at_the_exact_posterior(weight):
    linear = LinearGaussian(weight)
    result = posterior_fisher_divergence(linear.model, linear.guide, X, num_samples=400, batch_size=4, seed=0)
    exact, _ = linear.divergence(X)
    within(result.values, exact, result.standard_errors)
    torch.testing.assert_close(result.effective_sample_sizes, torch.full((N,), 400.0), rtol=1e-3, atol=0)
    assert (result.pareto_k == -math.inf).all()
    # Closed forms that the exact value obeys, as a check of the check.
    identity = torch.eye(weight.shape[1])
    closed = (
        linear.mean(X).square().sum(-1)
        + ((linear.precision - identity) @ linear.covariance @ (linear.precision - identity)).trace()
    )
    torch.testing.assert_close(exact, closed, rtol=1e-4, atol=1e-4)
    posterior = dist.MultivariateNormal(linear.mean(X), linear.covariance)
    kl = torch.distributions.kl_divergence(posterior, dist.MultivariateNormal(0 * linear.mean(X), identity))
    assert (kl <= result.values / 2 + 5 * result.standard_errors).all()
    assert (linear.mean(X).square().sum(-1) <= result.values + 5 * result.standard_errors).all()


@pytest.mark.parametrize("num_samples", [20, 2000])
def test_posterior_form_at_a_guide_that_is_off(num_samples):
    linear = LinearGaussian(TALL, widen=1.4, shift=0.1)
    result = posterior_fisher_divergence(linear.model, linear.guide, X, num_samples=num_samples, seed=0)
    exact, _ = linear.divergence(X)
    within(result.values, exact, result.standard_errors)
    assert (result.effective_sample_sizes < 0.9 * num_samples).all()
    assert result.pareto_k.isnan().all() if num_samples < 30 else (result.pareto_k < 0.7).all()


def test_standard_errors_are_the_spread_of_repetitions():
    linear = LinearGaussian(TALL, widen=1.3, shift=0.1)
    x = X[:1].expand(800, 3)
    result = posterior_fisher_divergence(linear.model, linear.guide, x, num_samples=150, seed=0)
    spread = result.values.std()
    assert 0.85 * spread < result.standard_errors.square().mean().sqrt() < 1.15 * spread
    within(result.values.mean(), linear.divergence(X[:1])[0][0], spread / 800**0.5, slack=0.02)


def test_a_narrow_guide_is_reported():
    linear = LinearGaussian(SQUARE, widen=0.3)
    result = posterior_fisher_divergence(linear.model, linear.guide, X, num_samples=500, seed=0)
    assert result.pareto_k.median() > 0.7
    assert (result.effective_sample_sizes < 100).all()


def test_weights_are_right_where_the_guide_is_the_prior():
    """Against a grid, where unweighted draws or those of the guide would give another number."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x", dist.Bernoulli(logits=(2 * z + z**2 - 1)[..., None].expand(*z.shape, 3)).to_event(1), obs=x
            )

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.2))

    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    result = posterior_fisher_divergence(model, guide, x, num_samples=3000, seed=0)
    prior = dist.Normal(0.0, 1.0)
    for n, datum in enumerate(x):

        def log_joint(z, datum=datum):
            likelihood = dist.Bernoulli(logits=(2 * z + z**2 - 1)[:, None])
            return prior.log_prob(z) + likelihood.log_prob(datum.double()).sum(-1)

        exact, mean, kl = grid_divergence(log_joint, prior.log_prob)
        within(result.values[n], torch.tensor(exact), result.standard_errors[n])
        assert mean**2 <= exact
        assert kl <= exact / 2


@pytest.mark.parametrize("samples_per_pass", [None, 7])
def test_posterior_form_in_nested_plates(samples_per_pass):
    x = torch.randn(5, 2, 4)
    result = posterior_fisher_divergence(
        nested_model,
        nested_guide,
        x,
        num_samples=300,
        batch_size=3,
        samples_per_pass=samples_per_pass,
        seed=0,
        plate="data",
    )
    within(result.values, nested_exact(x), result.standard_errors)
    torch.testing.assert_close(result.effective_sample_sizes, torch.full((5,), 300.0), rtol=1e-3, atol=0)


def test_a_factor_is_observed():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("rate", z.exp())
            pyro.factor("x", dist.Normal(z.exp(), 1.0).log_prob(x))

    x = torch.randn(5)
    for measured, expected in zip(
        *(posterior_fisher_divergence(m, scalar_guide, x, num_samples=50, seed=3) for m in (model, scalar_model)),
        strict=True,
    ):
        torch.testing.assert_close(measured, expected)


def test_masks_and_scales():
    mask = torch.tensor([True, False, True])

    def masked(x):
        with poutine.mask(mask=mask), poutine.scale(scale=7.0):
            scalar_model(x)

    def masked_guide(x):
        with poutine.mask(mask=mask):
            scalar_guide(x)

    x = torch.randn(3)
    values = posterior_fisher_divergence(masked, masked_guide, x, num_samples=50, seed=0).values
    expected = posterior_fisher_divergence(scalar_model, scalar_guide, x, num_samples=50, seed=0).values
    torch.testing.assert_close(values, torch.where(mask, expected, 0.0))


def test_a_discrete_site_is_summed_over_in_both_densities():
    x = torch.tensor([-2.0, 0.3, 3.0])
    result = posterior_fisher_divergence(mixture_model, mixture_guide, x, num_samples=4000, seed=0)
    for n, datum in enumerate(x):
        log_joint, log_prior = mixture_densities(datum)
        exact, *_ = grid_divergence(
            lambda z, f=log_joint: f(z).logsumexp(-1), lambda z, f=log_prior: f(z).logsumexp(-1)
        )
        within(result.values[n], torch.tensor(exact), result.standard_errors[n])


def test_a_discrete_site_of_the_guide_is_given():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("z", dist.StudentT(6.0, x / 2, 1.0))

    x = torch.tensor([-2.0, 0.3, 3.0])
    result = posterior_fisher_divergence(mixture_model, guide, x, num_samples=6000, seed=0)
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    for n, datum in enumerate(x):
        log_joint, _ = mixture_densities(datum)
        density = log_joint(z).exp()
        score = (datum.double() - z[:, None] * torch.tensor([1.0, 2.0])) * torch.tensor([1.0, 2.0])
        exact = torch.trapezoid((density * score**2).sum(-1), z) / torch.trapezoid(density.sum(-1), z)
        within(result.values[n], exact.float(), result.standard_errors[n])


def chain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(0.0, 1.2))
        pyro.sample("z", dist.Normal(0.0, 1.5))


def test_several_sites_add_up():
    x = torch.randn(4)
    options = {"num_samples": 60, "seed": 1}
    both, one, other = (
        posterior_fisher_divergence(chain_model, chain_guide, x, sites=sites, **options)
        for sites in (None, ["a"], ["z"])
    )
    torch.testing.assert_close(both.values, one.values + other.values)
    torch.testing.assert_close(both.effective_sample_sizes, other.effective_sample_sizes)


def test_data_that_share_a_site_are_weighted_together():
    x = torch.randn(5)
    result = posterior_fisher_divergence(shared_model, shared_guide, x, num_samples=1500, seed=0)
    within(result.values, shared_exact(x), result.standard_errors)
    torch.testing.assert_close(result.effective_sample_sizes, torch.full((5,), 1500.0), rtol=1e-3, atol=0)

    def off(x):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    result = posterior_fisher_divergence(shared_model, off, x, num_samples=4000, seed=0)
    within(result.values, shared_exact(x), result.standard_errors)
    with pytest.raises(ValueError, match=r"batch_size=None where data share sites, here \['a'\]"):
        posterior_fisher_divergence(shared_model, off, x, batch_size=2)


def summed_model(x):
    y = pyro.sample("y", dist.Categorical(ODDS))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + CENTERS[y], 1.0), obs=x)


def test_a_discrete_site_that_data_share_is_summed_over_for_all_of_them():
    x = torch.tensor([-1.0, 0.5])
    z = torch.linspace(-7, 7, 401, dtype=torch.float64)
    first, second = torch.meshgrid(z, z, indexing="ij")
    likelihoods = [
        dist.Normal(first[..., None] + CENTERS, 1.0).log_prob(x[0])
        + dist.Normal(second[..., None] + CENTERS, 1.0).log_prob(x[1])
    ]
    log_terms = likelihoods[0] + ODDS.log()
    log_joint = log_terms.logsumexp(-1) + dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(0.0, 1.0).log_prob(second)
    weights = log_joint.exp() / log_joint.exp().sum()
    given = log_terms.softmax(-1)
    scores = [(given * (x[n] - part[..., None] - CENTERS)).sum(-1) for n, part in enumerate((first, second))]
    exact = torch.stack([(weights * score**2).sum() for score in scores]).float()
    result = posterior_fisher_divergence(summed_model, scalar_guide, x, num_samples=4000, seed=0)
    within(result.values, exact, result.standard_errors)
    picked = torch.multinomial(weights.flatten(), 4000, replacement=True)
    draws = torch.stack([first.flatten()[picked], second.flatten()[picked]], 1).float()
    by_draws = posterior_fisher_divergence_of_draws(summed_model, {"z": draws}, x)
    within(by_draws.values, exact, by_draws.standard_errors)


@pytest.mark.parametrize("build", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides(build):
    x = torch.tensor([0.5, 1.0, 2.0])
    guide = build(scalar_model, init_scale=0.8)
    guide(x)
    result = posterior_fisher_divergence(scalar_model, guide, x, num_samples=4000, seed=0)
    for n, datum in enumerate(x.double()):

        def log_joint(z, datum=datum):
            return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.exp(), 1.0).log_prob(datum)

        exact, *_ = grid_divergence(log_joint, dist.Normal(0.0, 1.0).log_prob, -8.0, 4.0)
        within(result.values[n], torch.tensor(exact), result.standard_errors[n])


def test_one_datum_and_one_draw():
    result = posterior_fisher_divergence(scalar_model, scalar_guide, torch.ones(1), num_samples=1)
    assert result.values.shape == (1,)
    assert result.values.isfinite().all()
    assert result.standard_errors.isnan().all()
    assert result.effective_sample_sizes.tolist() == [1.0]
    assert result.pareto_k.isnan().all()
    few = posterior_fisher_divergence(scalar_model, scalar_guide, torch.ones(1), num_samples=2)
    assert few.standard_errors.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_seed_and_modes(dtype):
    x = torch.randn(4, dtype=dtype)
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        results = [posterior_fisher_divergence(scalar_model, scalar_guide, x, num_samples=30, seed=5) for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    for first, second in zip(*results, strict=True):
        assert first.dtype == dtype
        assert torch.equal(first, second)
        assert not first.requires_grad
    by_guide = guide_fisher_divergence(*normal_pair(lambda x: dist.Normal(x, 1.0), dist.Normal(0.0, 1.0)), x)
    assert {part.dtype for part in by_guide if isinstance(part, torch.Tensor)} == {dtype}


def test_draws_in_passes_bound_the_memory(monkeypatch):
    most = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            most.append(z.numel())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.scores._MOST_PAIRS", 7 * N)
    posterior_fisher_divergence(model, scalar_guide, torch.randn(N), num_samples=30)
    assert max(most) == 7 * N


def test_values_that_are_summed_over_count_in_the_bound(monkeypatch):
    most = []

    def model(x):
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z + kind
            most.append(loc.numel())
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.scores._MOST_PAIRS", 12 * N)
    posterior_fisher_divergence(model, scalar_guide, torch.randn(N), num_samples=30)
    assert max(most) == 12 * N


def test_a_model_that_takes_no_extra_dimension_is_run_draw_by_draw():
    def stubborn(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0] + z[:, 1], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            covariance = torch.eye(2) - torch.ones(2, 2) / 3
            pyro.sample("z", dist.MultivariateNormal(x[:, None].expand(-1, 2) / 3, covariance))

    x = torch.randn(4)
    result = posterior_fisher_divergence(stubborn, guide, x, num_samples=200, seed=0)
    within(result.values, 2 * ((x / 3) ** 2 + 2 / 3), result.standard_errors)


def test_a_likelihood_that_ignores_the_site_has_no_divergence():
    def deaf(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    assert not posterior_fisher_divergence(deaf, scalar_guide, torch.randn(3), num_samples=5).values.any()
