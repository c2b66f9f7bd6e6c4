"""The mutual information of vectors, plates, flows, AutoGuides and mixture priors."""

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
    vector_guide,
    vector_model,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import Normal

from pyro_ilvae.diagnostics import mutual_information


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
        assert_near(value, se, truth)


def test_it_adds_over_independent_dimensions():
    # Every pair of two sets of posteriors: the mixture is the product of the two mixtures.
    x = torch.stack([torch.cat([a, b])[[0, 2, 1, 3]] for a in SMALL for b in SMALL[:3]])
    result = mutual_information(vector_model, vector_guide, x, num_samples=500)
    for value, se, one, other in zip(
        result[:6:2], result[1:6:2], quadrature(*SMALL.T), quadrature(*SMALL[:3].T), strict=True
    ):
        assert_near(value, se, one + other)


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
        assert_near(value, se, truth, 1e-4)


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
        assert_near(value, math.hypot(se, other_se), other)
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
    assert_near(result.mutual_information, se, float(values.mean()))
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
        assert_near(value, se, truth)
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
        assert_near(value, math.hypot(se, other_se), other)


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
        assert_near(value, se, truth)
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
    assert_near(result.mutual_information, result.mutual_information_se, quadrature(*x.unbind(1))[0])
    assert all(math.isnan(value) for value in result[2:6])
    assert result.estimator == "sampled, no KL: the prior of 'z' differs between data or with other sites"


def test_refuses_batches_for_a_guide_with_parameters_for_each_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6)
    guide = AutoNormal(model)
    guide(x)
    with pytest.raises(ValueError, match=r"plate .data. to have one size .* got 6 and 1: .*batch_size=None"):
        mutual_information(model, guide, x, batch_size=1)
