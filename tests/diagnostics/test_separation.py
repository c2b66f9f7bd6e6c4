"""Separation of p(x | z): never below the guarantee, exact in the linear case, 0 for a decoder that ignores z."""

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import INVERSE_LIPSCHITZ_DECODERS, LATENT, perturb

from pyro_ilvae import MLPDecoder, likelihoods
from pyro_ilvae.diagnostics.separation import separation

NAMES = list(INVERSE_LIPSCHITZ_DECODERS)
NOISE, CONSTANT = 0.3, 1.7


class LinearDecoder(torch.nn.Module):
    """f(z) = L Q z."""

    def __init__(self, latent_dim=LATENT, dtype=torch.float32):
        super().__init__()
        self.latent_dim, self.inverse_lipschitz = latent_dim, CONSTANT
        self.register_buffer("frame", torch.linalg.qr(torch.randn(8, latent_dim, dtype=dtype)).Q)

    def forward(self, z):
        return CONSTANT * z @ self.frame.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_measured_is_never_below_guaranteed(name, dtype):
    decoder = perturb(INVERSE_LIPSCHITZ_DECODERS[name]().to(dtype))
    result = separation(decoder, likelihoods.Normal(NOISE).to(dtype), num_pairs=200)
    assert result.estimator == "analytic"
    assert {value.dtype for value in result[:3]} == {dtype}
    slack = 1e-6 if dtype is torch.float64 else 1e-3
    assert (result.kl >= result.guaranteed * (1 - slack)).all()
    assert result.smallest_ratio == pytest.approx(float((result.kl / result.guaranteed).min()), rel=1e-5)
    assert result.smallest_ratio >= 1 - slack


@pytest.mark.parametrize("latent_dim", [1, 4])
def test_measured_is_the_guarantee_for_the_linear_decoder(latent_dim):
    decoder, likelihood = LinearDecoder(latent_dim, torch.float64), likelihoods.Normal(NOISE).double()
    result = separation(decoder, likelihood, num_pairs=2000)
    torch.testing.assert_close(result.kl, result.guaranteed, rtol=1e-9, atol=0)
    torch.testing.assert_close(result.kl, 0.5 * (CONSTANT * result.distances / NOISE) ** 2, rtol=1e-6, atol=0)
    assert result.smallest_ratio == pytest.approx(1, rel=1e-6)
    # E ||z - z'||^2 = 2 K.
    assert result.spread == pytest.approx(latent_dim * (CONSTANT / NOISE) ** 2, abs=5 * result.spread_se)


def test_standard_error_is_that_of_the_spread():
    decoder, likelihood = LinearDecoder(), likelihoods.Normal(NOISE)
    results = [separation(decoder, likelihood, num_pairs=40) for _ in range(300)]
    spreads = torch.tensor([result.spread for result in results])
    average = torch.tensor([result.spread_se for result in results]).square().mean().sqrt()
    assert float(average / spreads.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * 300))


LIKELIHOODS = {
    "normal": likelihoods.Normal(NOISE),
    "bernoulli": likelihoods.Bernoulli(),
    "continuous-bernoulli": likelihoods.ContinuousBernoulli(),
    "poisson": likelihoods.Poisson(),
    "negative-binomial": likelihoods.NegativeBinomial(2.5),
    "zero-inflated-poisson": likelihoods.ZeroInflatedPoisson(0.3),
    "zero-inflated-negative-binomial": likelihoods.ZeroInflatedNegativeBinomial(2.5, 0.3),
    "categorical": likelihoods.Categorical(4),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_spread_is_zero_for_a_decoder_that_ignores_z(name):
    decoder = MLPDecoder(latent_dim=3, event_shape=(2, 4), hidden_features=(16,))
    with torch.no_grad():
        decoder.network[-1].weight.zero_()
    result = separation(decoder, LIKELIHOODS[name], num_pairs=20)
    assert (result.spread, result.spread_se) == (0, 0)
    assert not result.kl.any()
    assert (result.guaranteed, result.smallest_ratio) == (None, None)


def brute_force(name, eta, other):
    """KL(p || q) per entry, by sums and integrals over x."""
    likelihood = LIKELIHOODS[name]
    if name == "categorical":
        p, q = eta.log_softmax(-1), other.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)
    grids = {"normal": torch.linspace(-9, 9, 20_001), "continuous-bernoulli": torch.linspace(0, 1, 20_001)}
    x = grids.get(name, torch.arange(2 if name == "bernoulli" else 3000)).double()
    x = x.reshape(-1, *(1,) * eta.dim())
    log_p, log_q = likelihood(eta).log_prob(x), likelihood(other).log_prob(x)
    integrand = log_p.exp() * (log_p - log_q)
    return torch.trapezoid(integrand, x, dim=0) if name in grids else integrand.sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_divergence_is_exact_for_every_likelihood(name, dtype):
    z = torch.randn(40, 3)
    decoder = perturb(MLPDecoder(latent_dim=3, event_shape=(2, 4), hidden_features=(16,)), 0.3)
    result = separation(decoder.to(dtype), LIKELIHOODS[name], sampler=lambda n: z[:n].to(dtype), num_pairs=20)
    assert result.estimator == "analytic"
    with torch.no_grad():
        eta, other = decoder(z.to(dtype)).double().chunk(2)
        expected = brute_force(name, eta, other).flatten(1).sum(1)
    torch.testing.assert_close(result.kl.double(), expected, rtol=1e-4, atol=1e-5)
    assert result.spread == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "continuous-bernoulli"])
def test_divergence_stays_finite_where_probabilities_round_to_one(name):
    z = torch.tensor([[-1.0], [1.0]])
    directions = torch.tensor([[300.0, 0.0, 0.0, 0.0]])
    result = separation(lambda z: z @ directions, LIKELIHOODS[name], sampler=lambda n: z, num_pairs=1)
    # p(x = 0) falls from 1 to exp(-300); each of three categories from 1/3; 300 exp(-300 x) becomes its mirror image.
    expected = {"bernoulli": 300.0, "categorical": 300.0 - math.log(3), "continuous-bernoulli": 300.0 - 2}[name]
    assert result.spread == pytest.approx(expected, abs=1e-2)


def student(eta):
    return dist.StudentT(4.0, eta, 1.0).to_event(1)


def test_divergence_is_sampled_where_there_is_no_formula():
    result = separation(LinearDecoder(), student, num_pairs=300, num_samples=50, seed=0)
    exact_z = separation(LinearDecoder(), student, num_pairs=300, num_samples=50, seed=0)
    assert result.estimator == "sampled"
    assert result.guaranteed is None
    assert torch.equal(result.distances, exact_z.distances)
    # For one coordinate, against the integral.
    z = torch.tensor([[0.0]] * 2000 + [[1.5]] * 2000)
    sampled = separation(lambda z: z, student, sampler=lambda n: z, num_pairs=2000, num_samples=20)
    x = torch.linspace(-400, 400, 400_001, dtype=torch.float64)
    p, q = (dist.StudentT(4.0, loc, 1.0).log_prob(x) for loc in (0.0, 1.5))
    expected = float(torch.trapezoid(p.exp() * (p - q), x))
    assert sampled.spread == pytest.approx(expected, abs=5 * sampled.spread_se)
    assert sampled.spread_se < 0.02


@pytest.mark.parametrize(
    ("likelihood", "function"),
    [
        (likelihoods.Bernoulli(), lambda eta: dist.Bernoulli(logits=eta)),
        (likelihoods.NegativeBinomial(3.0, "fixed"), lambda eta: dist.NegativeBinomial(3.0, logits=eta).to_event(1)),
        (likelihoods.Normal(NOISE), lambda eta: dist.Normal(eta, NOISE)),
        (likelihoods.Categorical(8), lambda eta: dist.Categorical(logits=eta)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 40.0])  # probabilities round to one at the larger scale
def test_a_function_that_returns_the_distribution_is_as_good_as_the_likelihood(likelihood, function, scale):
    decoder = LinearDecoder()
    own, plain = (
        separation(lambda z: scale * decoder(z), kind, latent_dim=LATENT, seed=0) for kind in (likelihood, function)
    )
    assert own.estimator == plain.estimator == "analytic"
    torch.testing.assert_close(plain.kl, own.kl)


def test_divergences_of_vectors():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    result = separation(lambda z: z, lambda eta: dist.MultivariateNormal(eta, covariance), latent_dim=2, seed=1)
    isotropic = separation(
        lambda z: z @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT, likelihoods.Normal(), latent_dim=2, seed=1
    )
    torch.testing.assert_close(result.kl, isotropic.kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda eta: dist.Normal(eta, NOISE),
        lambda eta: dist.Normal(eta, NOISE).to_event(1),
        lambda eta: torch.distributions.Independent(torch.distributions.Normal(eta, NOISE), 1),
        likelihoods.Normal(NOISE, "learned"),
        likelihoods.Normal(NOISE, "optimal"),
    ],
)
def test_any_normal_around_the_decoder_with_one_scale_has_the_guarantee(likelihood):
    result = separation(LinearDecoder(), likelihood, num_pairs=50)
    torch.testing.assert_close(result.kl, result.guaranteed, rtol=1e-4, atol=1e-4)
    assert not result.kl.requires_grad


@pytest.mark.parametrize(
    ("decoder", "likelihood"),
    [
        (MLPDecoder(latent_dim=LATENT, event_shape=8, hidden_features=(4,)), likelihoods.Normal(NOISE)),
        (LinearDecoder(), likelihoods.Bernoulli()),
        (LinearDecoder(), likelihoods.Poisson()),
        (LinearDecoder(), lambda eta: dist.Normal(eta.sigmoid(), NOISE)),
        (LinearDecoder(), lambda eta: dist.Normal(eta[..., :4], NOISE)),
        (LinearDecoder(), lambda eta: dist.Normal(eta, eta.exp())),
        (LinearDecoder(), lambda eta: dist.Normal(eta, torch.linspace(0.1, 1.0, 8))),
    ],
    ids=["no-certificate", "bernoulli", "poisson", "squashed", "part", "heteroscedastic", "scale-per-entry"],
)
def test_without_a_certificate_or_its_assumptions_there_is_no_guarantee(decoder, likelihood):
    result = separation(decoder, likelihood, num_pairs=50)
    assert (result.guaranteed, result.smallest_ratio) == (None, None)
    assert (result.kl >= 0).all()
    assert result.spread > 0


def test_a_constant_of_zero_guarantees_nothing():
    result = separation(INVERSE_LIPSCHITZ_DECODERS["composition-random"](0.0), likelihoods.Normal(NOISE), num_pairs=10)
    assert not result.guaranteed.any()
    assert result.smallest_ratio == math.inf


@pytest.mark.parametrize("samples_per_pass", [1, 7, 1000])
def test_batches_change_nothing(samples_per_pass):
    decoder, likelihood = INVERSE_LIPSCHITZ_DECODERS["projected-conv"](), likelihoods.Normal(NOISE)
    expected = separation(decoder, likelihood, num_pairs=30, seed=5)
    result = separation(decoder, likelihood, num_pairs=30, seed=5, samples_per_pass=samples_per_pass)
    for value, other in zip(result[:6], expected[:6], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


def test_seed():
    decoder, state = LinearDecoder(), torch.get_rng_state()
    first, again, other = (separation(decoder, student, num_pairs=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.kl, again.kl)
    assert not torch.equal(first.kl, other.kl)


def test_modules_are_used_in_evaluation_mode_and_left_as_they_were():
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout())
    likelihood = likelihoods.Normal(NOISE, "optimal")
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    results = [separation(decoder, likelihood, latent_dim=2, num_pairs=10, seed=0) for _ in range(2)]
    assert torch.equal(results[0].kl, results[1].kl)
    assert decoder.training
    assert likelihood.training
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_one_pair():
    result = separation(LinearDecoder(), likelihoods.Normal(), num_pairs=1)
    assert result.kl.shape == (1,)
    assert math.isnan(result.spread_se)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Expected latent_dim or a sampler"),
        ({"latent_dim": 2, "num_pairs": 0}, "num_pairs"),
        ({"latent_dim": 2, "num_samples": 0}, "num_samples"),
        ({"latent_dim": 2, "samples_per_pass": 0}, "samples_per_pass"),
        ({"latent_dim": 2, "scale": 0.0}, "scale to be a finite number > 0"),
        ({"latent_dim": 3, "sampler": lambda n: torch.zeros(n, 2)}, r"shape \(2000, 3\), got \(2000, 2\)"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        separation(torch.nn.Linear(2, 3), likelihoods.Normal(), **options)
