"""Mutual information and the aggregate posterior's divergence against quadrature and known bounds."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_near
from helpers.scalar_posteriors import (
    SMALL,
    N,
    estimate,
    gaussian_data,
    quadrature,
    scalar_guide,
    scalar_model,
    vector_guide,
    vector_model,
)
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch.distributions import Normal, kl_divergence

from pyro_ilvae.diagnostics import mutual_information


@pytest.mark.parametrize("num_samples", [1, 2, 50])
@pytest.mark.parametrize("scale", [0.1, 0.7])
def test_exact_posteriors_of_a_gaussian_model(num_samples, scale):
    x = gaussian_data(scale=scale)
    result = estimate(x, num_samples=num_samples)
    information, aggregate, mean = quadrature(*x.unbind(1))
    assert_near(result.mutual_information, result.mutual_information_se, information)
    assert_near(result.aggregate_kl, result.aggregate_kl_se, aggregate)
    assert result.mean_kl == pytest.approx(mean, rel=1e-5)
    assert result.mean_kl == pytest.approx(result.mutual_information + result.aggregate_kl, rel=1e-5)
    assert result.limit == math.log(N)
    assert result.aggregate_size == N
    assert result.estimator == "sampled, analytic mean KL"


def test_the_model_s_own_mutual_information_with_many_data():
    # Of the population: I(x; z) = -log(scale) for the exact posteriors, while the aggregate is the prior.
    # Estimated from either side alone, one of the two would have a standard error of 0.01.
    result = estimate(gaussian_data(2000))
    assert result.mutual_information == pytest.approx(-math.log(0.7), abs=0.04)
    assert abs(result.aggregate_kl) < 5e-3
    assert result.mutual_information_se < 1e-3
    assert result.aggregate_kl_se < 1e-3


def test_standard_errors_are_those_of_the_draws():
    x = gaussian_data(10)
    x[:, 1] *= torch.linspace(0.5, 1.5, 10)
    truth = quadrature(*x.unbind(1))
    results = [estimate(x, num_samples=5, seed=seed) for seed in range(100)]
    for field, expected in zip(("mutual_information", "aggregate_kl"), truth, strict=False):
        scores = torch.tensor([(getattr(r, field) - expected) / getattr(r, f"{field}_se") for r in results])
        assert abs(scores.mean()) < 5 / math.sqrt(100)
        assert scores.std() == pytest.approx(1, abs=0.25)


def test_mean_kl_is_sampled_from_the_same_draws_where_there_is_no_formula():
    def student_model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(5.0, torch.zeros(len(x)), 1.0))

    x = gaussian_data()
    result = mutual_information(student_model, scalar_guide, x, num_samples=200, seed=1)
    truth = quadrature(*x.unbind(1), log_prior=dist.StudentT(torch.tensor(5.0, dtype=torch.float64)).log_prob)
    for value, se, expected in zip(result[:6:2], result[1:6:2], truth, strict=True):
        assert 0 < se < 0.02
        assert_near(value, se, expected)
    assert result.mean_kl == pytest.approx(result.mutual_information + result.aggregate_kl)
    assert result.estimator == "sampled"


def test_a_guide_that_ignores_the_data_has_none():
    x = torch.tensor([[0.0, 1.0]]).expand(N, 2)
    result = estimate(x)
    assert result[:6] == pytest.approx((0.0,) * 6, abs=1e-6)
    still = estimate(torch.tensor([[1.0, 0.5]]).expand(N, 2))
    assert still.mutual_information == pytest.approx(0, abs=1e-6)
    assert still.aggregate_kl == pytest.approx(float(kl_divergence(Normal(1.0, 0.5), Normal(0.0, 1.0))), rel=1e-5)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_posteriors_far_apart_reach_the_limit_and_never_exceed_it(batch_size):
    x = torch.stack([torch.arange(N) * 100.0, torch.ones(N)], -1)
    result = estimate(x, batch_size=batch_size)
    assert result.mutual_information == pytest.approx(math.log(N), abs=1e-6)
    assert result.mutual_information <= result.limit
    assert result.mutual_information_se == pytest.approx(0, abs=1e-6)
    assert result.aggregate_kl == pytest.approx(result.mean_kl - math.log(N))


def test_supports_that_depend_on_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x)), 10.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x, x + 2))

    apart = mutual_information(model, guide, torch.tensor([0.0, 3.0, 6.0]))
    assert apart.mutual_information == pytest.approx(math.log(3))
    assert apart.mean_kl == pytest.approx(math.log(5))
    assert apart.aggregate_kl == pytest.approx(math.log(10 / 6))
    # Half of each overlaps with the other.
    half = mutual_information(model, guide, torch.tensor([0.0, 1.0]), num_samples=2000)
    assert_near(half.mutual_information, half.mutual_information_se, math.log(2) / 2)
    # Where the prior has no density, its divergences are infinite.
    outside = mutual_information(model, guide, torch.tensor([0.0, 9.0]))
    assert outside.mutual_information == pytest.approx(math.log(2))
    assert outside.aggregate_kl == outside.mean_kl == math.inf


@pytest.mark.parametrize(
    "posterior",
    [
        lambda x: dist.Pareto(x, 500.0),
        lambda x: dist.TransformedDistribution(dist.Exponential(100.0), dist.transforms.AffineTransform(x, 1.0)),
        lambda x: dist.TransformedDistribution(
            dist.Beta(2.0, 3.0).expand([len(x), 1]), dist.transforms.AffineTransform(x[:, None], 0.5)
        ).to_event(1),
    ],
    ids=["pareto", "shifted-exponential", "scaled-beta"],
)
def test_densities_outside_of_the_support_are_zero(posterior):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Exponential(torch.ones(posterior(x).event_shape)).to_event(posterior(x).event_dim))

    result = mutual_information(model, guide, torch.tensor([1.0, 2.0, 3.0, 4.0]), batch_size=3)
    assert result.mutual_information == pytest.approx(math.log(4), abs=1e-4)


@given(
    parameters=st.lists(st.tuples(st.floats(-3, 3), st.floats(0.05, 3)), min_size=1, max_size=6),
    aggregate_size=st.integers(1, 6),
    num_samples=st.integers(2, 5),
)
def test_between_zero_and_the_limit(parameters, aggregate_size, num_samples):
    x = torch.tensor(parameters, dtype=torch.float64)
    size = min(aggregate_size, len(x))
    result = estimate(x, aggregate_size=size, num_samples=20 * num_samples)
    # Few data have few draws, and a standard error that can miss the tails.
    assert -6 * result.mutual_information_se - 1e-3 <= result.mutual_information <= math.log(size)
    if size == len(x):
        assert_near(result.mutual_information, 1.2 * result.mutual_information_se, quadrature(*x.unbind(1))[0], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
def test_subsamples_underestimate_by_a_known_amount(size):
    subsets = [list(subset) for subset in itertools.combinations(range(len(SMALL)), size)]
    parts = [quadrature(*SMALL[subset].unbind(1)) for subset in subsets]
    expected = sum(part[0] for part in parts) / len(parts)
    expected_kl = sum(part[1] for part in parts) / len(parts)
    whole, whole_kl, _ = quadrature(*SMALL.unbind(1))

    results = [estimate(SMALL, aggregate_size=size, num_samples=50, seed=seed) for seed in range(60)]
    assert all(result.mutual_information <= result.limit == math.log(size) for result in results)
    assert all(result.aggregate_size == size for result in results)
    values = torch.tensor([result.mutual_information for result in results])
    assert_near(values.mean(), values.std() / math.sqrt(60), expected)
    values = torch.tensor([result.aggregate_kl for result in results])
    assert_near(values.mean(), values.std() / math.sqrt(60), expected_kl)
    # The bias: to either side of it by the same amount, and no more than the log of what is left out.
    assert 0 < whole - expected < math.log(len(SMALL) / size)
    assert expected_kl - whole_kl == pytest.approx(whole - expected, abs=1e-6)


def test_each_subsample_bounds_the_whole_from_below_up_to_its_share():
    x = gaussian_data(200, scale=0.05)
    whole = estimate(x, num_samples=10)
    for seed in range(5):
        part = estimate(x, num_samples=10, aggregate_size=20, seed=seed)
        slack = 5 * (whole.mutual_information_se + part.mutual_information_se)
        assert whole.mutual_information <= part.mutual_information + math.log(10) + slack
        assert part.mutual_information < whole.mutual_information


def test_a_subsample_of_all_data_is_the_whole():
    x = gaussian_data()
    assert estimate(x, aggregate_size=N, seed=3) == estimate(x, seed=3)
    assert estimate(x, aggregate_size=1).mutual_information == 0


def test_several_arguments():
    def model(locs, scales):
        scalar_model(torch.stack([locs, scales], -1))

    def guide(locs, scales):
        scalar_guide(torch.stack([locs, scales], -1))

    x = gaussian_data()
    options = {"batch_size": 7, "aggregate_size": 15, "seed": 1}
    assert mutual_information(model, guide, tuple(x.unbind(1)), **options) == estimate(x, **options)


def test_wrong_estimators_are_told_apart():
    x = gaussian_data(200, scale=0.1)
    result = estimate(x, num_samples=20, batch_size=10)
    information, _, _ = quadrature(*x.unbind(1))
    assert_near(result.mutual_information, result.mutual_information_se, information)
    draws = Normal(*x.unbind(1)).sample((20,))
    pairs = Normal(*x.unbind(1)).log_prob(draws[..., None])  # draw, its datum, component
    own = pairs.diagonal(dim1=1, dim2=2)
    far = 20 * result.mutual_information_se
    # The average of the logs in place of the log of the average.
    assert (own - pairs.mean(-1)).mean() > information + far
    # The log of the sum, and not of the average.
    assert (own - pairs.logsumexp(-1)).mean() < information - far
    # The components of the draw's batch alone, capped at its log size.
    blocks = torch.stack([pairs[:, i : i + 10, i : i + 10] for i in range(0, 200, 10)])
    by_batch = blocks.diagonal(dim1=2, dim2=3) - blocks.logsumexp(-1) + math.log(10)
    assert by_batch.mean() < information - far
    # Other data's components alone: too large here, over the limit where the posteriors are far apart.
    others = pairs.masked_fill(torch.eye(200, dtype=torch.bool), -math.inf).logsumexp(-1) - math.log(199)
    assert (own - others).mean() > information + far
    # Analytic entropy against sampled log q(z): not negative here where nothing depends on the data.
    still = estimate(torch.tensor([[0.0, 1.0]]).expand(N, 2), num_samples=1)
    assert still.mutual_information == pytest.approx(0, abs=1e-6)


def test_draws_do_not_depend_on_the_passes():
    x = gaussian_data()
    whole = estimate(x, seed=5)
    for samples_per_pass in (1, 7, 1000):
        assert estimate(x, seed=5, samples_per_pass=samples_per_pass)[:7] == pytest.approx(whole[:7], rel=1e-5)
    state = torch.get_rng_state()
    assert estimate(x, seed=5) == whole
    assert torch.equal(state, torch.get_rng_state())
    assert estimate(x, seed=6) != whole


@pytest.mark.parametrize("aggregate_size", [None, 15])
@pytest.mark.parametrize("batch_size", [1, 7, N, 1000])
def test_batches_change_nothing_but_the_draws(batch_size, aggregate_size):
    x = gaussian_data()
    options = {"num_samples": 50, "seed": 2}
    result = estimate(x, batch_size=batch_size, aggregate_size=aggregate_size, **options)
    if aggregate_size is None:
        assert_near(result.mutual_information, result.mutual_information_se, quadrature(*x.unbind(1))[0])
    assert result.mean_kl == pytest.approx(quadrature(*x.unbind(1))[2], rel=1e-5)
    assert result.mutual_information <= result.limit


@pytest.mark.slow
def test_memory_is_bounded(monkeypatch):
    most = []

    class Watched(dist.Normal):
        def log_prob(self, value):
            most.append(value.numel())
            return super().log_prob(value)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Watched(x[:, 0], x[:, 1]))

    # Imported by name, since the function of the same name hides it in the package.
    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.data_posteriors._MOST_NUMBERS", 100)
    x = gaussian_data()
    result = mutual_information(scalar_model, guide, x, num_samples=2, batch_size=20, seed=1)
    assert max(most) <= 100
    assert result[:6] == pytest.approx(estimate(x, num_samples=2, batch_size=20, seed=1)[:6], rel=1e-5)


def test_one_datum_says_nothing():
    result = estimate(torch.tensor([[1.0, 0.5]]))
    assert result.mutual_information == result.mutual_information_se == result.limit == 0
    assert result.aggregate_kl == pytest.approx(result.mean_kl)
    alone = estimate(torch.tensor([[1.0, 0.5]]), num_samples=1)
    assert alone.mutual_information == 0
    assert math.isnan(alone.mutual_information_se)


def test_handlers_and_subsampling_do_not_enter():
    x = gaussian_data()
    with poutine.scale(scale=0.1), poutine.trace() as outer:
        result = mutual_information(poutine.scale(scalar_model, 3.0), scalar_guide, x, seed=1)
    assert result[:6] == pytest.approx(estimate(x, seed=1)[:6])
    assert not outer.trace.nodes.keys() - {"_INPUT", "_OUTPUT", "_RETURN"}
    subsampled = mutual_information(vector_model, vector_guide, x, seed=1)
    assert subsampled.limit == math.log(N)

    class WithParameter(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) + pyro.param("shift", torch.tensor(0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", WithParameter(x[:, 0], x[:, 1]))

    with poutine.trace() as outer:
        mutual_information(scalar_model, guide, x)
    assert "shift" not in outer.trace


def test_modules_are_evaluated_and_left_as_they_were():
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = dist.transforms.batchnorm(2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.TransformedDistribution(dist.Normal(*x.chunk(2, 1)).to_event(1), [self.flow]))

    guide = Guide()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    in_training = mutual_information(vector_model, guide, X, seed=1)
    assert guide.flow.training
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert mutual_information(vector_model, guide.eval(), X, seed=1) == in_training


def dependent_guide(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(y, 1.0))


def dependent_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))


PLANAR = dist.transforms.planar(2)


def planar_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(*x.chunk(2, 1)).to_event(1), [PLANAR]))


def masked_guide(x):
    with poutine.mask(mask=torch.arange(len(x)) > 0):
        scalar_guide(x)


def broken_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0] * math.nan, 1.0, validate_args=False))


def correlated(x):
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 2, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoMultivariateNormal(model)
    guide(x)
    return mutual_information(model, guide, x)


X = torch.cat([torch.randn(6, 2), 0.2 + torch.rand(6, 2)], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate(X, site="y"), r"Expected site to be a latent site of the guide, one of \['z'\], got 'y'"),
        (lambda: estimate(X, site="x"), "got 'x'"),
        (lambda: mutual_information(lambda x: None, scalar_guide, X), "latent sites? of the model"),
        (
            lambda: mutual_information(dependent_model, dependent_guide, X, site="z"),
            r"a density q\(z \| x\) of its own",
        ),
        (lambda: mutual_information(vector_model, planar_guide, X), "draws of other data's posteriors"),
        (lambda: mutual_information(scalar_model, masked_guide, X), "to mask site 'z' only where the model does"),
        (lambda: mutual_information(scalar_model, broken_guide, X), "draws of site 'z' a finite density"),
        (lambda: mutual_information(scalar_model, AutoDelta(scalar_model), X), "Expected a guide that draws site 'z'"),
        (lambda: correlated(X), "the marginals of 2 correlated values"),
        (lambda: estimate(X, aggregate_size=7), "aggregate_size to be at most the number 6 of data, got 7"),
        (lambda: estimate(X, aggregate_size=0), "aggregate_size"),
        (lambda: estimate(X, num_samples=0), "num_samples"),
        (lambda: estimate(X, samples_per_pass=0), "samples_per_pass"),
        (lambda: estimate(X, batch_size=0), "batch_size"),
        (lambda: estimate(X, plate="rows"), "plate"),
        (lambda: estimate(X[:0]), "at least one datum in model_args, got none"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
