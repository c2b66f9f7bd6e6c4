"""The Fisher divergence averaged over the model's own data: its definition, its exact cases and its floor."""

import itertools
import math
import sys

import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import DECODERS, EVENT, INVERSE_LIPSCHITZ_DECODERS, LATENT, jacobian, perturb
from pyro.infer import Trace_ELBO

from pyro_ilvae import VAE, InverseLipschitzDecoder, MLPDecoder, MLPEncoder, likelihoods, mlp
from pyro_ilvae.diagnostics.fisher.mean_fisher_divergence import mean_fisher_divergence

LIKELIHOODS = {
    "normal": lambda: likelihoods.Normal(0.5),
    "bernoulli": likelihoods.Bernoulli,
    "continuous_bernoulli": likelihoods.ContinuousBernoulli,
    "poisson": likelihoods.Poisson,
    "negative_binomial": lambda: likelihoods.NegativeBinomial(3.0),
    "zero_inflated_poisson": lambda: likelihoods.ZeroInflatedPoisson(0.3),
    "zero_inflated_negative_binomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(3.0, 0.3),
    "categorical": lambda: likelihoods.Categorical(EVENT[-1]),
}


class Linear(torch.nn.Module):
    """f(z) = L Q z."""

    def __init__(self, latent_dim, features, constant, dtype=torch.float64):
        super().__init__()
        self.latent_dim, self.inverse_lipschitz = latent_dim, constant
        self.register_buffer("frame", torch.linalg.qr(torch.randn(features, latent_dim, dtype=dtype)).Q)

    def forward(self, z):
        return self.inverse_lipschitz * z @ self.frame.mT


class WithoutForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


def opaque(likelihood):
    """The same likelihood, without its Fisher information."""
    return lambda eta: likelihood(eta)


def z_scores(value, error, other, other_error):
    return (value - other).abs() / (error.square() + other_error.square()).sqrt()


def assert_same(first, second, rtol):
    for value, other in zip(first[:5], second[:5], strict=True):
        torch.testing.assert_close(value, other, rtol=rtol, atol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("latent_dim", "features"), [(1, 1), (2, 9), (4, 4)])
def test_is_exact_for_a_linear_decoder_and_normal_noise(latent_dim, features, dtype):
    decoder = Linear(latent_dim, features, 0.7, dtype)
    result = mean_fisher_divergence(decoder, likelihoods.Normal(0.1).to(dtype), num_samples=20)
    each = 0.7**2 / 0.1**2
    tolerance = 20 * torch.finfo(dtype).eps + 2e-7  # the logarithm of the scale was rounded to single precision
    assert result.per_dimension.dtype == result.per_dimension_se.dtype == dtype
    torch.testing.assert_close(
        result.per_dimension, torch.full((latent_dim,), each, dtype=dtype), rtol=tolerance, atol=0
    )
    assert result.total == pytest.approx(latent_dim * each, rel=tolerance)
    assert result.floor == pytest.approx(latent_dim * each, rel=tolerance)
    assert result.per_dimension_floor == pytest.approx(each, rel=tolerance)
    assert result.total_se < 1e-5 * each
    assert result.estimator == "analytic"


@pytest.mark.parametrize("estimator", ["analytic", "sampled"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_is_the_mean_square_of_the_posterior_score_without_the_prior(name, estimator):
    likelihood = LIKELIHOODS[name]().double()
    decoder = perturb(MLPDecoder(latent_dim=LATENT, event_shape=EVENT, hidden_features=(16,)).double(), 0.3)
    result = mean_fisher_divergence(
        decoder, opaque(likelihood) if estimator == "sampled" else likelihood, latent_dim=LATENT, num_samples=3000
    )
    assert result.estimator == estimator
    assert result.floor is None
    assert result.per_dimension_floor is None
    z = torch.randn(30_000, LATENT, dtype=torch.float64, requires_grad=True)
    distribution = likelihood(decoder(z))
    log_prob = distribution.log_prob(distribution.sample())
    squares = torch.autograd.grad(log_prob.sum(), z)[0].square()
    error = squares.std(0) / len(z) ** 0.5
    assert (z_scores(result.per_dimension, result.per_dimension_se, squares.mean(0), error) < 5).all()
    total = squares.sum(1)
    values = [torch.tensor(value) for value in (result.total, result.total_se)]
    assert z_scores(*values, total.mean(), total.std() / len(z) ** 0.5) < 5
    assert result.total == pytest.approx(float(result.per_dimension.sum()))


@pytest.mark.parametrize("estimator", ["analytic", "sampled"])
def test_is_the_divergence_of_posteriors_on_a_grid_averaged_over_data(estimator):
    decoder = perturb(MLPDecoder(latent_dim=1, event_shape=2, hidden_features=(4,)).double())
    likelihood = likelihoods.Bernoulli()
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    step = 18 / 20_000
    log_prior = dist.Normal(0, 1).log_prob(z)
    exact = 0.0
    with torch.no_grad():
        eta = decoder(z[:, None])
    for x in itertools.product([0.0, 1.0], repeat=2):
        log_joint = log_prior + likelihood(eta).log_prob(torch.tensor(x, dtype=torch.float64)).sum(-1)
        evidence = float(log_joint.exp().sum() * step)
        log_posterior = log_joint - math.log(evidence)
        scores = [torch.gradient(values, spacing=step)[0] for values in (log_posterior, log_prior)]
        exact += evidence * float((log_posterior.exp() * (scores[0] - scores[1]).square()).sum() * step)
    given = opaque(likelihood) if estimator == "sampled" else likelihood
    result = mean_fisher_divergence(decoder, given, num_samples=4000)
    assert abs(result.total - exact) < 5 * result.total_se
    assert result.total_se < 0.1 * exact


def test_other_priors():
    decoder = perturb(MLPDecoder(latent_dim=2, event_shape=3, hidden_features=(8,)).double())
    likelihood = likelihoods.Normal(1.0).double()
    z = 3 + torch.rand(50, 2, dtype=torch.float64)
    exact = jacobian(decoder, z).square().sum((1, 2)).detach()
    result = mean_fisher_divergence(decoder, likelihood, sampler=lambda n: z[:n], num_samples=50)
    assert result.total == pytest.approx(float(exact.mean()))
    assert result.total_se == pytest.approx(float(exact.std()) / 50**0.5)
    wide = mean_fisher_divergence(decoder, likelihood, scale=4.0, seed=0)
    same = mean_fisher_divergence(
        decoder, likelihood, sampler=lambda n: 4 * torch.randn(n, 2, dtype=torch.float64), seed=0
    )
    assert_same(wide, same, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
def test_is_not_below_its_floor(name, likelihood, dtype):
    decoder = perturb(INVERSE_LIPSCHITZ_DECODERS[name]().to(dtype), 0.5)
    for num_samples in (1, 30):
        result = mean_fisher_divergence(decoder, LIKELIHOODS[likelihood]().to(dtype), num_samples=num_samples)
        assert result.floor == pytest.approx(LATENT * result.per_dimension_floor)
        assert (result.floor > 0) == (likelihood != "categorical")
        assert result.total >= result.floor * (1 - 1e-5)
        assert (result.per_dimension >= result.per_dimension_floor * (1 - 1e-5) - 1e-6 * result.total).all()


def test_floor_is_the_constant_squared_times_the_mean_smallest_information():
    decoder = perturb(
        InverseLipschitzDecoder(latent_dim=2, event_shape=5, inverse_lipschitz=(0.5, 0.8), map_features=(16,)).double(),
        0.5,
    )
    z = torch.randn(40, 2, dtype=torch.float64)
    result = mean_fisher_divergence(decoder, likelihoods.Bernoulli(), sampler=lambda n: z[:n], num_samples=40)
    p = torch.sigmoid(decoder(z)).detach()
    assert result.floor == pytest.approx(2 * 0.4**2 * float((p * (1 - p)).min(1).values.mean()))


@pytest.mark.parametrize("estimator", ["analytic", "sampled"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_ignored_coordinate_has_none(name, estimator):
    network = perturb(mlp(2, (16,), 8), 0.3)
    likelihood = LIKELIHOODS[name]()
    result = mean_fisher_divergence(
        lambda z: network(z[:, [0, 2]]).reshape(-1, *EVENT),
        opaque(likelihood) if estimator == "sampled" else likelihood,
        latent_dim=3,
        num_samples=50,
    )
    assert result.per_dimension[1] == result.per_dimension_se[1] == 0
    assert (result.per_dimension[[0, 2]] > 0).all()


def test_a_shift_of_all_categories_has_none():
    decoder = Linear(2, 4, 0.7)
    decoder.frame = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.randn(4, 1)], 1).double()).Q
    result = mean_fisher_divergence(decoder, likelihoods.Categorical(4), num_samples=50)
    assert result.floor == 0
    assert abs(float(result.per_dimension[0])) < 1e-12
    assert result.per_dimension[1] > 0.01


@pytest.mark.parametrize("name", DECODERS)
def test_batches_change_nothing(name):
    decoder = perturb(DECODERS[name]().double(), 0.5)
    largest = []
    decoder.register_forward_hook(lambda module, inputs, output: largest.append(len(inputs[0])))
    options = {"num_samples": 30, "seed": 3}
    state = torch.get_rng_state()
    whole = mean_fisher_divergence(decoder, likelihoods.Bernoulli(), **options)
    largest.clear()
    parts = mean_fisher_divergence(decoder, likelihoods.Bernoulli(), samples_per_pass=7, **options)
    assert max(largest) == 7
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(whole, parts, 1e-10)
    again = mean_fisher_divergence(decoder, opaque(likelihoods.Bernoulli()), **options)
    assert again.total == mean_fisher_divergence(decoder, opaque(likelihoods.Bernoulli()), **options).total


def test_memory_is_bounded_by_default(monkeypatch):
    decoder = MLPDecoder(latent_dim=4, event_shape=50, hidden_features=(8,))
    largest = []
    decoder.register_forward_hook(lambda module, inputs, output: largest.append(len(inputs[0])))
    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.decoding._MOST_NUMBERS", 4 * 50 * 6)
    mean_fisher_divergence(decoder, likelihoods.Bernoulli(), num_samples=20)
    assert max(largest) == 6


@pytest.mark.parametrize("name", DECODERS)
def test_precisions_agree(name):
    decoder = perturb(DECODERS[name](), 0.5)
    z = torch.randn(30, LATENT)
    single = mean_fisher_divergence(decoder, likelihoods.ContinuousBernoulli(), sampler=lambda n: z[:n], num_samples=30)
    double = mean_fisher_divergence(
        decoder.double(), likelihoods.ContinuousBernoulli(), sampler=lambda n: z[:n].double(), num_samples=30
    )
    assert_same(single, double, 1e-3)


@pytest.mark.parametrize("estimator", ["analytic", "sampled"])
def test_decoders_with_backward_derivatives_only(estimator):
    network = mlp(2, (16,), 5)
    likelihood = likelihoods.Normal(1.0)
    given = opaque(likelihood) if estimator == "sampled" else likelihood
    with torch.inference_mode():
        forward, backward = (
            mean_fisher_divergence(lambda z, wave=wave: wave(network(z)), given, latent_dim=2, seed=0)
            for wave in (torch.sin, WithoutForwardDerivative.apply)
        )
    torch.testing.assert_close(forward.per_dimension, backward.per_dimension, rtol=1e-5, atol=0)


def test_modules_and_events_without_a_dimension():
    # One number for each datum, and a decoder that normalizes by the batch unless it is evaluated.
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )
    decoder = torch.nn.Sequential(network, torch.nn.Flatten(0))
    z = torch.randn(30, 2)
    result = mean_fisher_divergence(decoder, likelihoods.Poisson(), sampler=lambda n: z[:n], num_samples=30)
    assert all(module.training for module in decoder.modules())
    decoder.eval()
    gradient = torch.autograd.functional.jacobian(lambda at: decoder(at).sum(), z)
    exact = (decoder(z).exp()[:, None] * gradient.square()).mean(0).detach()
    torch.testing.assert_close(result.per_dimension, exact)
    assert not result.per_dimension.requires_grad


def test_of_a_fitted_model(local_params):
    x = torch.rand(40, *EVENT)
    decoder = DECODERS["projected-conv"]()
    likelihood = likelihoods.Normal(0.5, "learned")
    fresh = mean_fisher_divergence(decoder, likelihood, seed=0)
    vae = VAE(decoder, MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,)), likelihood)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
        optimizer.step()
    fitted = mean_fisher_divergence(vae.decoder, vae.likelihood, seed=0)
    assert fresh.floor == pytest.approx(LATENT * 0.7**2 / 0.5**2, rel=1e-5)
    assert fitted.floor == pytest.approx(LATENT * 0.7**2 / float(vae.likelihood.scale.detach()) ** 2, rel=1e-5)
    assert fitted.floor != pytest.approx(fresh.floor, rel=1e-2)
    assert fitted.total > fitted.floor
    with torch.inference_mode():
        assert mean_fisher_divergence(vae.decoder, vae.likelihood, seed=0).total == pytest.approx(fitted.total)


def test_half_of_it_bounds_the_mutual_information():
    # For f(z) = L Q z and Normal noise the mutual information of the latent variable and the data is known.
    for constant in (0.1, 1.0, 5.0):
        result = mean_fisher_divergence(Linear(3, 5, constant), likelihoods.Normal(1.0).double(), num_samples=10)
        assert 1.5 * math.log1p(constant**2) <= 0.5 * result.total


def test_likelihoods_of_users():
    class Exponential:
        """Rate e^eta: the information of each entry is one."""

        def __call__(self, eta):
            return dist.Exponential(eta.exp()).to_event(1)

    class Informed(Exponential):
        def information_product(self, eta, tangent):
            return tangent

        def smallest_information(self, eta):
            return torch.ones_like(eta)

    decoder = Linear(2, 5, 0.5)
    exact = mean_fisher_divergence(decoder, Informed(), num_samples=10)
    assert exact.floor == pytest.approx(0.5)
    assert exact.total == pytest.approx(0.5)
    sampled = mean_fisher_divergence(decoder, Exponential())
    assert (sampled.estimator, sampled.floor) == ("sampled", None)
    assert abs(sampled.total - 0.5) < 5 * sampled.total_se


def test_one_draw_has_no_standard_error():
    result = mean_fisher_divergence(Linear(2, 3, 0.5), likelihoods.Bernoulli(), num_samples=1)
    assert math.isnan(result.total_se)
    assert result.per_dimension_se.isnan().all()
    assert math.isfinite(result.total)


def test_more_data_for_each_draw_have_a_smaller_error(monkeypatch):
    likelihood = opaque(likelihoods.Normal(1.0).double())
    ten = mean_fisher_divergence(Linear(1, 1, 1.0), likelihood, num_samples=2000)
    monkeypatch.setattr(sys.modules[mean_fisher_divergence.__module__], "_NUM_DATA", 1)
    one = mean_fisher_divergence(Linear(1, 1, 1.0), likelihood, num_samples=2000)
    assert ten.total_se == pytest.approx((2 / 10 / 2000) ** 0.5, rel=0.2)
    assert one.total_se == pytest.approx((2 / 2000) ** 0.5, rel=0.2)


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        (lambda z: z, {}, "Expected latent_dim or a sampler"),
        (lambda z: z, {"latent_dim": 2, "num_samples": 0}, "Expected num_samples to be an int >= 1"),
        (lambda z: z, {"latent_dim": 2, "samples_per_pass": 0}, "Expected samples_per_pass to be an int >= 1"),
        (lambda z: z / 0, {"latent_dim": 2}, "Expected decoder to return finite values"),
        (lambda z: z + torch.rand(2), {"latent_dim": 2}, "Expected decoder to be one function"),
        (lambda z: z[:1], {"latent_dim": 2}, "Expected decoder to return shape"),
        (lambda z: z + 1000, {"latent_dim": 2}, "Expected a finite Fisher information, got 1000 z where it is not"),
    ],
)
def test_refuses(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        mean_fisher_divergence(decoder, likelihoods.Poisson(), **options)
