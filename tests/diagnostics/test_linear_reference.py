"""The linear reference against probabilistic PCA, whose optimum, posterior and divergences are known exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae.diagnostics.linear_reference import linear_reference
from pyro_ilvae.likelihoods import Normal

NOISE = 0.7


def sample(num_data, features, dtype=torch.float64):
    """Data with variances on both sides of the noise, in random directions, around a mean that is not 0."""
    scales = torch.linspace(2.0, 0.2, features, dtype=dtype)
    rotation = torch.linalg.qr(torch.randn(features, features, dtype=dtype)).Q
    return torch.randn(num_data, features, dtype=dtype) * scales @ rotation + 5


@pytest.mark.parametrize(("num_data", "features"), [(200, 6), (6, 6), (7, 6), (5, 30), (2, 3), (9000, 3), (10, 1)])
def test_variances_are_the_eigenvalues_of_the_covariance(num_data, features):
    x = sample(num_data, features)
    expected = np.linalg.eigvalsh(np.atleast_2d(np.cov(x.numpy(force=True), rowvar=False, bias=True)))[::-1]
    reference = linear_reference(x, NOISE)
    assert reference.variances.numpy(force=True) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert reference.collapsed.tolist() == (expected <= NOISE**2).tolist()
    assert reference.num_collapsed == (expected <= NOISE**2).sum()
    assert (reference.inverse_lipschitz, reference.nats) == (None, None)


def log_likelihood(x, loading):
    """Average log likelihood of the linear VAE x = mean + W z + noise."""
    covariance = loading @ loading.mT + NOISE**2 * torch.eye(len(loading), dtype=x.dtype)
    return torch.distributions.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean()


def fitted_loading(x, latent_dim):
    """The maximum likelihood W of probabilistic PCA for a given noise."""
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centered.mT @ centered / len(x))
    values, vectors = values.flip(-1)[:latent_dim], vectors.flip(-1)[:, :latent_dim]
    return vectors * (values - NOISE**2).clamp(min=0).sqrt()


@pytest.mark.parametrize(("num_data", "latent_dim"), [(500, 6), (500, 2), (4, 6), (4, 5)])
def test_divergence_is_that_of_the_fitted_linear_vae(num_data, latent_dim):
    x = sample(num_data, 6)
    loading = fitted_loading(x, latent_dim)
    precision = torch.eye(latent_dim, dtype=x.dtype) + loading.mT @ loading / NOISE**2
    covariance = torch.linalg.inv(precision)
    torch.testing.assert_close(covariance, covariance.diagonal().diag(), atol=1e-9, rtol=0)
    posterior = torch.distributions.Normal(
        (x - x.mean(0)) @ loading @ covariance / NOISE**2, covariance.diagonal().sqrt()
    )
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean(0)
    reference = linear_reference(x, NOISE, latent_dim=latent_dim)
    torch.testing.assert_close(reference.kl, kl, rtol=1e-6, atol=1e-6)
    assert reference.collapsed.tolist() == (loading == 0).all(0).tolist()
    assert reference.collapsed.any() == (latent_dim > 2)


def test_what_is_called_collapsed_is_at_the_optimum():
    x = sample(500, 6)
    best = fitted_loading(x, 6).requires_grad_()
    value = log_likelihood(x, best)
    (gradient,) = torch.autograd.grad(value, best)
    assert float(gradient.abs().max()) < 1e-9
    for _ in range(20):
        assert log_likelihood(x, best.detach() + 0.01 * torch.randn_like(best)) < value


@given(st.floats(0.01, 100), st.floats(0, 100))
def test_divergence_for_a_constant_is_the_expected_one_of_its_linear_vae(noise, constant):
    x = torch.randn(3, 2)
    nats = linear_reference(x, noise, inverse_lipschitz=constant).nats
    # Posterior variance and second moment of the posterior mean, under the model's own data.
    variance = noise**2 / (constant**2 + noise**2)
    second_moment = constant**2 / (constant**2 + noise**2)
    expected = 0.5 * (variance + second_moment - 1 - math.log(variance))
    assert nats == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(0, 300))
def test_constant_and_nats_are_inverse_to_each_other(noise, nats):
    x = torch.randn(3, 2)
    reference = linear_reference(x, noise, nats=nats)
    assert reference.nats == nats
    assert linear_reference(x, noise, inverse_lipschitz=reference.inverse_lipschitz).nats == pytest.approx(nats)


@given(st.floats(1e-3, 1e3), st.floats(0, 1e6))
def test_nats_and_constant_are_inverse_to_each_other(noise, constant):
    x = torch.randn(3, 2)
    nats = linear_reference(x, noise, inverse_lipschitz=constant).nats
    assert linear_reference(x, noise, nats=nats).inverse_lipschitz == pytest.approx(constant)


def test_data_of_a_linear_decoder_have_the_divergence_of_their_constant():
    num_data, features, latent_dim, constant = 20_000, 12, 4, 1.3
    frame = torch.linalg.qr(torch.randn(features, latent_dim)).Q
    x = constant * torch.randn(num_data, latent_dim) @ frame.mT + NOISE * torch.randn(num_data, features)
    reference = linear_reference(x.reshape(num_data, 3, 4), NOISE, latent_dim=latent_dim, inverse_lipschitz=constant)
    assert not reference.collapsed.any()
    # The log determinant of a covariance matrix of N draws has variance 2 K / N, and half of it over K is the mean.
    standard_error = 0.5 * math.sqrt(2 / (num_data * latent_dim))
    assert float(reference.kl.mean()) == pytest.approx(reference.nats, abs=5 * standard_error)


def test_directions_without_variance_collapse():
    x = torch.ones(4, 3)
    reference = linear_reference(x, 1e-3)
    assert reference.num_collapsed == 3
    assert not reference.kl.any()
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert linear_reference(x, 1e-3).collapsed.tolist() == [False, True, True]


def test_wide_data_have_no_variance_beyond_their_number():
    reference = linear_reference(torch.randn(3, 10), 1e-3)
    assert len(reference.variances) == 10
    assert reference.num_collapsed == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_data(dtype):
    reference = linear_reference(sample(50, 4, dtype), Normal(NOISE, "learned").scale)
    assert (reference.variances.dtype, reference.kl.dtype) == (dtype, dtype)


@pytest.mark.parametrize("num_data", [5, 5000])
def test_integers_and_large_means_lose_nothing(num_data):
    images = torch.randint(0, 256, (num_data, 3, 3), dtype=torch.uint8)
    expected = linear_reference(images.double(), 10.0)
    torch.testing.assert_close(
        linear_reference(images, 10.0).variances.double(), expected.variances, atol=1e-2, rtol=1e-6
    )
    shifted = linear_reference(images.double() + 1e6, 10.0)
    torch.testing.assert_close(shifted.variances, expected.variances, atol=1e-6, rtol=1e-8)


X = torch.randn(10, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_reference(X, 0.0), "noise_scale to be a finite number > 0, got 0.0"),
        (lambda: linear_reference(X, -1.0), "noise_scale"),
        (lambda: linear_reference(X, math.nan), "noise_scale"),
        (lambda: linear_reference(X[:1], 1.0), r"N >= 2 data, got \(1, 4\)"),
        (lambda: linear_reference(X[:, :0], 1.0), r"got \(10, 0\)"),
        (lambda: linear_reference(torch.tensor(1.0), 1.0), r"got \(\)"),
        (lambda: linear_reference(X.log(), 1.0), "Expected x to be finite, got [0-9]+ NaN"),
        (lambda: linear_reference(X, 1.0, latent_dim=5), "latent_dim <= 4"),
        (lambda: linear_reference(X, 1.0, latent_dim=0), "latent_dim"),
        (lambda: linear_reference(X, 1.0, inverse_lipschitz=-1.0), "inverse_lipschitz to be a finite number >= 0"),
        (lambda: linear_reference(X, 1.0, nats=math.inf), "nats to be a finite number >= 0"),
        (lambda: linear_reference(X, 1.0, inverse_lipschitz=1.0, nats=1.0), "inverse_lipschitz or nats, got both"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
