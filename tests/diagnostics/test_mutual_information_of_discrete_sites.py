"""The mutual information of discrete sites, against enumeration."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_near

from pyro_ilvae.diagnostics import mutual_information

CATEGORICAL = torch.softmax(torch.randn(7, 4, generator=torch.Generator(torch.get_default_device()).manual_seed(0)), -1)


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


BITS = torch.rand(8, 3, generator=torch.Generator(torch.get_default_device()).manual_seed(1))


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
        assert_near(value, se, float(truth))
    assert result.mean_kl_se == pytest.approx(0, abs=1e-9)
    assert result.estimator == "sampled, analytic mean KL"


def test_discrete_certainty_reaches_the_limit():
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    model, guide = discrete(dist.OneHotCategorical(torch.tensor([0.5, 0.5])), dist.OneHotCategorical)
    result = mutual_information(model, guide, probs)
    assert result[:6] == pytest.approx((math.log(2), 0, 0, 0, math.log(2), 0), abs=1e-5)
    assert result.limit == math.log(2)


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
