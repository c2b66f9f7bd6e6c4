"""Mutual information and the aggregate posterior's divergence against quadrature, enumeration and known bounds."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import Normal, kl_divergence

from pyro_ilvae.diagnostics import mutual_information

GRID = torch.linspace(-30.0, 30.0, 8_001, dtype=torch.float64)
STANDARD = Normal(0.0, 1.0)
N = 40


def quadrature(locs, scales, log_prior=STANDARD.log_prob):
    """Mutual information, KL of the mixture from the prior, and mean KL, for Normal posteriors of a scalar."""
    locs, scales = locs.detach().double(), scales.detach().double()
    log_q = Normal(locs, scales).log_prob(GRID[:, None])
    log_mixture = log_q.logsumexp(1) - math.log(len(locs))
    log_p = log_prior(GRID)
    information = torch.trapezoid(log_q.exp() * (log_q - log_mixture[:, None]), GRID, dim=0).mean()
    aggregate = torch.trapezoid(log_mixture.exp() * (log_mixture - log_p), GRID)
    mean = torch.trapezoid(log_q.exp() * (log_q - log_p[:, None]), GRID, dim=0).mean()
    return float(information), float(aggregate), float(mean)


def scalar_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x[..., 0]), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[..., 0])


def scalar_guide(x):
    """A datum is the mean and the standard deviation of its posterior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], x[:, 1]))


def estimate(x, **options):
    return mutual_information(scalar_model, scalar_guide, x, **options)


def gaussian_data(n=N, scale=0.7):
    """The exact posteriors of z ~ N(0, 1), x ~ N(z, variance) at draws from that model."""
    variance = scale**2 / (1 - scale**2)
    draws = torch.randn(n) * math.sqrt(1 + variance)
    return torch.stack([draws / (1 + variance), torch.full((n,), scale)], -1)


def within(value, se, expected, floor=1e-5):
    assert abs(value - expected) <= 5 * se + floor, (value, se, expected)


@pytest.mark.parametrize("num_samples", [1, 2, 50])
@pytest.mark.parametrize("scale", [0.1, 0.7])
def test_exact_posteriors_of_a_gaussian_model(num_samples, scale):
    x = gaussian_data(scale=scale)
    result = estimate(x, num_samples=num_samples)
    information, aggregate, mean = quadrature(*x.unbind(1))
    within(result.mutual_information, result.mutual_information_se, information)
    within(result.aggregate_kl, result.aggregate_kl_se, aggregate)
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
        within(value, se, expected)
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
    within(half.mutual_information, half.mutual_information_se, math.log(2) / 2)
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
        within(result.mutual_information, 1.2 * result.mutual_information_se, quadrature(*x.unbind(1))[0], 1e-3)


SMALL = torch.tensor([[-2.0, 0.3], [-0.5, 0.6], [0.0, 1.0], [0.3, 0.2], [1.0, 0.5], [2.5, 0.1]])


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
    within(values.mean(), values.std() / math.sqrt(60), expected)
    values = torch.tensor([result.aggregate_kl for result in results])
    within(values.mean(), values.std() / math.sqrt(60), expected_kl)
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
    within(result.mutual_information, result.mutual_information_se, information)
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


CATEGORICAL = torch.softmax(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), -1)
PRIOR = torch.tensor([0.1, 0.2, 0.3, 0.4])


def brute_force(probs, prior):
    """Mutual information and divergences of a table of probabilities (N, V) and a prior (V,)."""
    mean = probs.mean(0)
    information = (probs * (probs / mean).log()).sum(-1).mean()
    return information, (mean * (mean / prior).log()).sum(), (probs * (probs / prior).log()).sum(-1).mean()


def product(probs):
    """The probabilities of all outcomes of independent Bernoullis: (..., K) to (..., 2^K)."""
    table = torch.ones(*probs.shape[:-1], 1)
    for p in probs.unbind(-1):
        table = torch.stack([table * (1 - p[..., None]), table * p[..., None]], -1).flatten(-2)
    return table


def discrete(prior, posterior):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", prior)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", posterior(x))

    return model, guide


BITS = torch.rand(8, 3, generator=torch.Generator().manual_seed(1))
DISCRETE = {
    "categorical": (*discrete(dist.Categorical(PRIOR), dist.Categorical), CATEGORICAL, CATEGORICAL, PRIOR),
    "one-hot": (*discrete(dist.OneHotCategorical(PRIOR), dist.OneHotCategorical), CATEGORICAL, CATEGORICAL, PRIOR),
    "bernoulli": (
        *discrete(dist.Bernoulli(0.3), dist.Bernoulli),
        BITS[:, 0],
        product(BITS[:, :1]),
        torch.tensor([0.7, 0.3]),
    ),
    "bernoulli-vector": (
        *discrete(dist.Bernoulli(torch.full((3,), 0.3)).to_event(1), lambda x: dist.Bernoulli(x).to_event(1)),
        BITS,
        product(BITS),
        product(torch.full((3,), 0.3)),
    ),
}


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "samples_per_pass": 1, "aggregate_size": 3}])
def test_discrete_sites_are_exact(name, options):
    model, guide, x, probs, prior = DISCRETE[name]
    result = mutual_information(model, guide, x, **options)
    assert result[:6:2] == pytest.approx([float(value) for value in brute_force(probs, prior)], abs=1e-5)
    assert result[1:6:2] == (0, 0, 0)
    assert result.estimator == "exact"
    assert result.limit == math.log(min(probs.shape))
    assert result.aggregate_size == len(x)


def test_discrete_sites_in_inner_plates_are_exact():
    def model(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("bits", 3, dim=-2):
            pyro.sample("z", dist.Bernoulli(0.3))

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("bits", 3, dim=-2):
            pyro.sample("z", dist.Bernoulli(x.mT))

    expected = brute_force(product(BITS), product(torch.full((3,), 0.3)))
    result = mutual_information(model, guide, BITS, batch_size=5, plate="data")
    assert result[:6:2] == pytest.approx([float(value) for value in expected], abs=1e-5)
    assert result.estimator == "exact"


def test_discrete_sites_of_many_values_are_sampled():
    bits = torch.rand(5, 9)
    model, guide = discrete(dist.Bernoulli(torch.full((9,), 0.3)).to_event(1), lambda x: dist.Bernoulli(x).to_event(1))
    result = mutual_information(model, guide, bits, num_samples=1000)
    expected = brute_force(product(bits), product(torch.full((9,), 0.3)))
    for value, se, truth in zip(result[:6:2], result[1:6:2], expected, strict=True):
        within(value, se, float(truth))
    assert result.mean_kl_se == pytest.approx(0, abs=1e-9)
    assert result.estimator == "sampled, analytic mean KL"


def test_discrete_certainty_reaches_the_limit():
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    model, guide = discrete(dist.OneHotCategorical(torch.tensor([0.5, 0.5])), dist.OneHotCategorical)
    result = mutual_information(model, guide, probs)
    assert result[:6] == pytest.approx((math.log(2), 0, 0, 0, math.log(2), 0), abs=1e-5)
    assert result.limit == math.log(2)


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
        within(result.mutual_information, result.mutual_information_se, quadrature(*x.unbind(1))[0])
    assert result.mean_kl == pytest.approx(quadrature(*x.unbind(1))[2], rel=1e-5)
    assert result.mutual_information <= result.limit


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


def vector_model(x):
    with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
        z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1] // 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=z.detach())


def vector_guide(x):
    with pyro.plate("data", 1000, subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(*x.chunk(2, 1)).to_event(1))


def test_vectors_of_one_dimension_are_scalars():
    x = gaussian_data()
    assert mutual_information(vector_model, vector_guide, x, seed=1)[:6] == pytest.approx(
        estimate(x, seed=1)[:6], rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dimensions_that_are_the_prior_add_nothing(dtype):
    x = gaussian_data().to(dtype)
    padded = torch.stack([x[:, 0], torch.zeros(N), x[:, 1], torch.ones(N)], -1).to(dtype)
    result = mutual_information(vector_model, vector_guide, padded, num_samples=100, batch_size=9)
    for value, se, truth in zip(result[:6:2], result[1:6:2], quadrature(*x.unbind(1)), strict=True):
        within(value, se, truth)


def test_it_adds_over_independent_dimensions():
    # Every pair of two sets of posteriors: the mixture is the product of the two mixtures.
    x = torch.stack([torch.cat([a, b])[[0, 2, 1, 3]] for a in SMALL for b in SMALL[:3]])
    result = mutual_information(vector_model, vector_guide, x, num_samples=500)
    for value, se, one, other in zip(
        result[:6:2], result[1:6:2], quadrature(*SMALL.T), quadrature(*SMALL[:3].T), strict=True
    ):
        within(value, se, one + other)


def test_full_covariances():
    rotation = torch.linalg.qr(torch.randn(2, 2)).Q

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))

    def guide(x):
        loc = torch.stack([x[:, 0], torch.zeros(len(x))], -1) @ rotation.mT
        scale_tril = rotation @ torch.diag_embed(torch.stack([x[:, 1], torch.ones(len(x))], -1)) @ rotation.mT
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril @ scale_tril.mT))

    x = gaussian_data()
    result = mutual_information(model, guide, x, num_samples=100, batch_size=11)
    for value, se, truth in zip(result[:6:2], result[1:6:2], quadrature(*x.unbind(1)), strict=True):
        within(value, se, truth, 1e-4)


@pytest.mark.parametrize(("data_dim", "shape"), [(-1, (3, N)), (-2, (N, 3)), (-3, (N, 1, 3))])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_all_values_of_a_datum_are_one_variable(data_dim, shape, batch_size):
    inner_dim = -2 if data_dim == -1 else -1
    locs, scales = torch.randn(N, 3), 0.2 + torch.rand(N, 3)

    def plates(x):
        return pyro.plate("data", len(x), dim=data_dim), pyro.plate("inner", 3, dim=inner_dim)

    def place(x):
        return x.mT if data_dim == -1 else x.reshape(-1, *shape[1:])

    def model(x):
        data, inner = plates(x)
        with data, inner:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        data, inner = plates(x)
        loc, scale = x.chunk(2, 1)
        with data, inner:
            pyro.sample("z", dist.Normal(place(loc), place(scale)))

    x = torch.cat([locs, scales], 1)
    options = {"num_samples": 20, "batch_size": batch_size}
    nested = mutual_information(model, guide, x, **options)
    vector = mutual_information(vector_model, vector_guide, x, **options)
    for value, se, other, other_se in zip(nested[:6:2], nested[1:6:2], vector[:6:2], vector[1:6:2], strict=True):
        within(value, math.hypot(se, other_se), other)
    small = mutual_information(model, guide, x, aggregate_size=5, **options)
    assert small.mutual_information <= small.limit == math.log(5)


def test_a_bijection_of_the_latent_space_changes_nothing():
    flow = dist.transforms.spline_coupling(2, hidden_dims=[8])

    def flow_model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    def flow_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(*x.chunk(2, 1)).to_event(1), [flow]))

    x = torch.cat([torch.randn(N, 2), 0.2 + torch.rand(N, 2)], 1)
    plain = mutual_information(vector_model, vector_guide, x, seed=1)
    result = mutual_information(flow_model, flow_guide, x, seed=1)
    assert result[:6] == pytest.approx(plain[:6], abs=1e-3)


def test_flows_that_depend_on_the_data():
    flow = dist.transforms.conditional_affine_autoregressive(2, 2, hidden_dims=[8])

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.ConditionalTransformedDistribution(base, [flow]).condition(x[:, :2]))

    x = torch.randn(6, 4)
    result = mutual_information(vector_model, guide, x, num_samples=500, batch_size=4)
    with torch.no_grad():
        fns = [
            dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow.condition(row[:2])])
            for row in x
        ]
        draws = torch.stack([fn.sample((500,)) for fn in fns])
        log_q = torch.stack([fn.log_prob(draws) for fn in fns], -1)
    values = log_q[range(6), :, range(6)] - log_q.logsumexp(-1) + math.log(6)
    se = math.hypot(result.mutual_information_se, float(values.var(1).mean() / values.numel()) ** 0.5)
    within(result.mutual_information, se, float(values.mean()))
    assert result.estimator == "sampled"


@pytest.mark.parametrize("build", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("positive", [False, True])
def test_automatic_guides(build, positive):
    prior = dist.LogNormal(0.0, 1.0) if positive else dist.Normal(0.0, 1.0)

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(a + z, 1.0), obs=x)

    x = torch.randn(12)
    guide = build(model, init_scale=0.3)
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if build is AutoNormal:
        locs, scales = guide.locs.z, guide.scales.z
    else:
        joint = guide.get_posterior()
        locs, scales = joint.mean[1:], joint.stddev[1:]
    result = mutual_information(model, guide, x, site="z", num_samples=300)
    for value, se, truth in zip(result[:6:2], result[1:6:2], quadrature(locs, scales), strict=True):
        within(value, se, truth)
    with pytest.raises(ValueError, match="Expected site 'a' in a plate over the 12 data, got plates"):
        mutual_information(model, guide, x, site="a")


def test_automatic_guides_with_correlated_vectors():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    guide = AutoMultivariateNormal(model, init_scale=0.5)
    guide(x)
    with torch.no_grad():
        guide.scale_tril_unconstrained.add_(0.7 * torch.randn(10, 10).tril(-1))
    covariance = guide.get_posterior().covariance_matrix.detach().reshape(5, 2, 5, 2)
    blocks = torch.stack([covariance[n, :, n] for n in range(5)])

    def written(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.MultivariateNormal(guide.loc.detach().reshape(5, 2), blocks))

    result, expected = (mutual_information(model, fn, x, num_samples=2000) for fn in (guide, written))
    for value, se, other, other_se in zip(result[:6:2], result[1:6:2], expected[:6:2], expected[1:6:2], strict=True):
        within(value, math.hypot(se, other_se), other)


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


def test_a_mixture_prior_is_summed_out():
    weights, centers = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(centers[y], 0.5))
            w = pyro.sample("w", dist.Bernoulli(torch.sigmoid(z)))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x[:, 0])

    def log_prior(z):
        parts = Normal(centers.double(), 0.5).log_prob(z[:, None]) + weights.double().log()
        return parts.logsumexp(-1)

    x = gaussian_data(20)
    result = mutual_information(model, scalar_guide, x, num_samples=100, batch_size=8)
    for value, se, truth in zip(result[:6:2], result[1:6:2], quadrature(*x.T, log_prior), strict=True):
        within(value, se, truth)
    assert result.estimator == "sampled"


def prior_by_datum(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def prior_by_other_sites(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a, 1.0))


def guide_with_global(x):
    pyro.sample("a", dist.Normal(0.0, 1.0))
    scalar_guide(x)


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize(
    ("model", "guide"), [(prior_by_datum, scalar_guide), (prior_by_other_sites, guide_with_global)]
)
def test_without_one_prior_there_is_no_divergence_but_there_is_information(model, guide, batch_size):
    x = gaussian_data()
    result = mutual_information(model, guide, x, site="z", num_samples=20, batch_size=batch_size)
    within(result.mutual_information, result.mutual_information_se, quadrature(*x.unbind(1))[0])
    assert all(math.isnan(value) for value in result[2:6])
    assert result.estimator == "sampled, no KL: the prior of 'z' differs between data or with other sites"


def test_a_discrete_site_without_one_prior_has_information():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(x.flip(0)))

    _, guide = discrete(dist.Categorical(PRIOR), dist.Categorical)
    result = mutual_information(model, guide, CATEGORICAL)
    assert result.mutual_information == pytest.approx(float(brute_force(CATEGORICAL, PRIOR)[0]), abs=1e-5)
    assert math.isnan(result.aggregate_kl)
    assert math.isnan(result.mean_kl)
    assert "exact, no KL" in result.estimator


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
        (lambda: mutual_information(dependent_model, dependent_guide, X, site="z"), r"a density q\(z \| x\) of its own"),
        (lambda: mutual_information(vector_model, planar_guide, X), "draws of other data's posteriors"),
        (lambda: mutual_information(scalar_model, masked_guide, X), "got one with a mask"),
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


def test_refuses_batches_for_a_guide_with_parameters_for_each_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6)
    guide = AutoNormal(model)
    guide(x)
    with pytest.raises(ValueError, match="in a plate over the 1 data, got plates"):
        mutual_information(model, guide, x, batch_size=1)
