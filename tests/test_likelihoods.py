"""Likelihoods: their distributions, their supports and what data they refuse."""

import math
from decimal import Decimal, localcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ilvae import VAE, MLPDecoder, MLPEncoder, likelihoods

ETA = torch.linspace(-2, 2, 8)
EXPECTED = {
    "normal": (likelihoods.Normal(0.3), dist.Normal(ETA, 0.3)),
    "bernoulli": (likelihoods.Bernoulli(), dist.Bernoulli(probs=torch.sigmoid(ETA))),
    "continuous_bernoulli": (likelihoods.ContinuousBernoulli(), dist.ContinuousBernoulli(torch.sigmoid(ETA))),
    "poisson": (likelihoods.Poisson(), dist.Poisson(ETA.exp())),
    "negative_binomial": (likelihoods.NegativeBinomial(3.0), dist.NegativeBinomial(3.0, torch.sigmoid(ETA))),
    "categorical": (likelihoods.Categorical(4), dist.Categorical(ETA.reshape(2, 4).softmax(-1))),
    "zero_inflated_poisson": (
        likelihoods.ZeroInflatedPoisson(0.3),
        dist.ZeroInflatedPoisson(ETA.exp(), gate=torch.tensor(0.3)),
    ),
    "zero_inflated_negative_binomial": (
        likelihoods.ZeroInflatedNegativeBinomial(3.0, 0.3),
        dist.ZeroInflatedNegativeBinomial(torch.tensor(3.0), logits=ETA, gate=torch.tensor(0.3)),
    ),
}
BAD = {
    "normal": ([float("nan")], "1 NaN or infinite values"),
    "bernoulli": ([0.5], "from 0.5 to 0.5; binarize the data or use ContinuousBernoulli"),
    "continuous_bernoulli": ([-3.0, 255.0], "2 values outside it, from -3 to 255; divide intensities"),
    "poisson": ([-1.0, 1.5], "2 values outside it, from -1 to 1.5"),
    "negative_binomial": ([-2.0], "from -2 to -2"),
    "categorical": ([4.0, -1.0], "from -1 to 4"),
    "zero_inflated_poisson": ([0.5], "from 0.5 to 0.5"),
    "zero_inflated_negative_binomial": ([-2.0, 0.5], "from -2 to 0.5"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_is_the_stated_distribution(name):
    likelihood, expected = EXPECTED[name]
    eta = ETA.reshape(expected.batch_shape + (4,) * (name == "categorical"))
    distribution = likelihood(eta)
    x = expected.sample()
    torch.testing.assert_close(distribution.log_prob(x), expected.log_prob(x), rtol=1e-4, atol=1e-5)
    mean = likelihood.mean(eta)
    torch.testing.assert_close(mean, expected.probs if name == "categorical" else expected.mean)


@pytest.mark.parametrize("name", EXPECTED)
def test_accepts_its_own_draws_and_names_the_site_of_others(name):
    likelihood, expected = EXPECTED[name]
    likelihoods.check_support(likelihood, expected.sample((20,)), "x")
    values, message = BAD[name]
    with pytest.raises(ValueError, match=f"data at site 'pixels'.*{message}"):
        likelihoods.check_support(likelihood, torch.tensor(values), "pixels")
    with pytest.raises(ValueError, match="Expected finite data at site 'x'"):
        likelihoods.check_support(likelihood, torch.tensor([0.0, float("inf")]), "x")


ATTRIBUTES = {
    "normal": (False, False, 0.3),
    "bernoulli": (False, False, None),
    "continuous_bernoulli": (False, False, None),
    "poisson": (False, False, None),
    "negative_binomial": (False, False, None),
    "categorical": (True, False, None),
    "zero_inflated_poisson": (False, False, None),
    "zero_inflated_negative_binomial": (False, False, None),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_attributes(name):
    likelihood, expected = EXPECTED[name]
    integer_data, depends_on_batch, noise_scale = ATTRIBUTES[name]
    assert (likelihood.integer_data, likelihood.depends_on_batch) == (integer_data, depends_on_batch)
    assert isinstance(likelihood.support_hint, str)
    assert likelihood.support.check(expected.sample((50,))).all()
    noise = getattr(likelihood, "noise_scale", None)
    assert noise is None if noise_scale is None else math.isclose(float(noise), noise_scale, rel_tol=1e-6)


def test_the_optimal_scale_depends_on_the_batch_and_the_others_do_not():
    for estimate in ("fixed", "learned", "optimal"):
        likelihood = likelihoods.Normal(1.0, estimate)
        densities = [
            likelihood(torch.zeros(2), torch.tensor([1.0, other])).log_prob(torch.ones(2))[0] for other in (1.0, 3.0)
        ]
        assert torch.equal(*densities) != likelihood.depends_on_batch
        assert likelihood.depends_on_batch == (estimate == "optimal")


def test_a_plain_function_says_nothing_and_is_asked_for_finite_data_only():
    def student(eta, x=None):
        return dist.StudentT(4.0, eta, 0.5)

    likelihoods.check_support(student, torch.tensor([-1e30, 0.0, 1e30]), "x")
    with pytest.raises(ValueError, match=r"finite data at site 'x'.* 2 NaN or infinite"):
        likelihoods.check_support(student, torch.tensor([float("nan"), 0.0, float("inf")]), "x")
    torch.testing.assert_close(likelihoods.mean_of_data(student, ETA), ETA)


class Doubled(torch.nn.Module):
    """A likelihood that says itself what the mean of its data is."""

    def forward(self, eta, x=None):
        return dist.Normal(eta, 1.0)

    def mean(self, eta):
        return 2 * eta


def test_the_mean_is_the_likelihoods_own_where_it_has_one():
    torch.testing.assert_close(likelihoods.mean_of_data(Doubled(), ETA), 2 * ETA)
    vae = VAE(torch.nn.Identity(), Codes(), Doubled(), latent_dim=8, event_shape=8)
    torch.testing.assert_close(vae.reconstruct(ETA.expand(3, 8)), 2 * ETA.expand(3, 8))


class Codes(torch.nn.Module):
    """Data are their own codes."""

    def forward(self, x):
        return x, torch.ones_like(x)


INFORMATION = {
    "normal": lambda: likelihoods.Normal(0.3),
    "normal-learned": lambda: likelihoods.Normal(2.0, "learned"),
    "normal-optimal": lambda: likelihoods.Normal(2.0, "optimal"),
    "bernoulli": likelihoods.Bernoulli,
    "continuous_bernoulli": likelihoods.ContinuousBernoulli,
    "poisson": likelihoods.Poisson,
    "negative_binomial": lambda: likelihoods.NegativeBinomial(3.0),
    "categorical": lambda: likelihoods.Categorical(4),
    "zero_inflated_poisson": lambda: likelihoods.ZeroInflatedPoisson(0.3),
    "zero_inflated_negative_binomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(3.0, 0.3),
}


def natural_parameters(name):
    eta = torch.tensor([-6.0, -2.0, -0.5, -0.05, 0.0, 0.3, 1.0, 4.0], dtype=torch.float64)
    return eta.reshape((2, 4) if name == "categorical" else (8, 1))


def quadrature(name, eta):
    """Points of the support and their weights, so that sums over them are integrals over the data."""
    if name.startswith("normal"):
        x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
        return x, torch.full_like(x, 0.01)
    if name == "continuous_bernoulli":
        x = torch.linspace(0, 1, 2001, dtype=torch.float64)
        weights = torch.full_like(x, 2 / 3 / 2000)
        weights[1::2] *= 2
        weights[[0, -1]] /= 2
        return x, weights
    x = torch.arange({"bernoulli": 2, "categorical": 4}.get(name, 4000), dtype=torch.float64)
    return x, torch.ones_like(x)


def score(likelihood, eta, x):
    """Log density of each draw and datum, and its derivatives by the parameters of the datum, (draws, data, P)."""
    eta = eta.expand(len(x), *eta.shape).clone().requires_grad_()
    log_prob = likelihood(eta).log_prob(x).reshape(eta.shape[:2])
    (gradient,) = torch.autograd.grad(log_prob.sum(), eta, create_graph=True)
    return log_prob, gradient, eta


def dense_information(likelihood, eta):
    """The information matrix of each datum, (data, P, P), from the products with unit vectors."""
    units = torch.eye(eta.shape[-1], dtype=eta.dtype).unsqueeze(1)
    return likelihood.information_product(eta, units.expand(-1, *eta.shape)).movedim(0, -1).detach()


@pytest.mark.parametrize("name", INFORMATION)
def test_information_is_that_of_the_integral(name):
    likelihood, eta = INFORMATION[name]().double(), natural_parameters(name)
    x, weights = quadrature(name, eta)
    x = x.reshape(-1, 1) if name == "categorical" else x.reshape(-1, 1, 1)
    log_prob, gradient, at = score(likelihood, eta, x.expand(-1, *likelihood(eta).batch_shape))
    probability = (weights[:, None] * log_prob.exp()).detach()
    torch.testing.assert_close(probability.sum(0), torch.ones(len(eta), dtype=torch.float64), rtol=1e-6, atol=0)
    information = dense_information(likelihood, eta)
    squares = torch.einsum("sn,snp,snq->npq", probability, gradient.detach(), gradient.detach())
    torch.testing.assert_close(information, squares, rtol=1e-6, atol=1e-9)
    columns = [torch.autograd.grad(part.sum(), at, retain_graph=True)[0] for part in gradient.unbind(-1)]
    curvature = -torch.einsum("sn,snpq->npq", probability, torch.stack(columns, -1))
    torch.testing.assert_close(information, curvature, rtol=1e-6, atol=1e-9)
    smallest = likelihood.smallest_information(eta).detach()
    assert smallest.shape == likelihood(eta).batch_shape
    expected = torch.linalg.eigvalsh(information)[:, 0].reshape(smallest.shape)
    torch.testing.assert_close(smallest, expected, rtol=1e-6, atol=1e-9)


def assert_divergence(likelihood, eta, other, expected):
    divergence = likelihood.divergence(eta, other)
    assert divergence.dtype == torch.float64
    assert divergence.shape == likelihood(eta).batch_shape
    torch.testing.assert_close(divergence.detach(), expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(likelihood.divergence(eta, eta), torch.zeros_like(divergence), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", INFORMATION)
def test_divergence_is_that_of_the_integral(name):
    """In double precision whatever the parameters are, between moderate parameters and all of the others."""
    likelihood, eta = INFORMATION[name]().double(), natural_parameters(name)
    x, weights = quadrature(name, eta)
    x = x.reshape(-1, 1) if name == "categorical" else x.reshape(-1, 1, 1)
    for other in (eta.flip(0), eta.roll(1, -1), 0.5 - 0.3 * eta):
        p, q = likelihood(eta), likelihood(other)
        log_p, log_q = (distribution.log_prob(x.expand(-1, *p.batch_shape)) for distribution in (p, q))
        expected = (weights.reshape(-1, *[1] * len(p.batch_shape)) * log_p.exp() * (log_p - log_q)).sum(0)
        assert_divergence(likelihood, eta, other, expected)
        single = [part.float() for part in (eta, other)]
        torch.testing.assert_close(likelihood.divergence(*single).detach(), expected.detach(), rtol=1e-4, atol=1e-5)


PYTORCH = {
    "normal": lambda eta: dist.Normal(eta, 0.3),
    "normal-learned": lambda eta: dist.Normal(eta, 2.0),
    "normal-optimal": lambda eta: dist.Normal(eta, 2.0),
    "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
    "continuous_bernoulli": lambda eta: dist.ContinuousBernoulli(logits=eta),
    "poisson": lambda eta: dist.Poisson(eta.exp()),
    "categorical": lambda eta: dist.Categorical(logits=eta),
}


@pytest.mark.parametrize("name", PYTORCH)
def test_divergence_is_pytorchs(name):
    likelihood = INFORMATION[name]().double()
    for shape in ((8, 4), (2, 3, 4)):
        eta, other = 2 * torch.randn(2, *shape, dtype=torch.float64)
        p, q = (PYTORCH[name](part) for part in (eta, other))
        assert_divergence(likelihood, eta, other, torch.distributions.kl_divergence(p, q))


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "normal"])
def test_divergence_is_finite_where_probabilities_round_to_one(name):
    likelihood = INFORMATION[name]()
    eta = torch.tensor([[80.0, -80.0, 30.0, -30.0]])
    divergence = likelihood.divergence(eta, -eta)
    assert divergence.isfinite().all()
    assert (divergence > 10).logical_or((eta < 0) & ("zero_inflated" in name)).all()  # where almost all data are 0
    if name == "bernoulli":
        torch.testing.assert_close(divergence.float(), eta.abs())


@pytest.mark.parametrize("name", INFORMATION)
def test_information_is_that_of_draws(name):
    likelihood, eta = INFORMATION[name]().double(), natural_parameters(name)
    _, gradient, _ = score(likelihood, eta, likelihood(eta).sample((20_000,)))
    squares = torch.einsum("snp,snq->snpq", gradient.detach(), gradient.detach())
    error = squares.std(0) / 20_000**0.5
    assert ((dense_information(likelihood, eta) - squares.mean(0)).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("name", INFORMATION)
def test_information_in_the_tails_of_single_precision(name):
    likelihood = INFORMATION[name]()
    eta = torch.tensor([[-80.0, -20.0, -1.0, -1e-3], [1e-3, 1.0, 20.0, 80.0]])
    tangent = torch.randn(3, 2, 4)
    product = likelihood.information_product(eta, tangent)
    assert product.dtype == torch.float32
    exact = likelihood.double().information_product(eta.double(), tangent.double())
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-6 if name == "categorical" else 0)


@pytest.mark.parametrize("eta", [0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 1.999, 2.0, 2.001, 5.0, 40.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_of_the_continuous_bernoulli_to_machine_precision(eta, dtype):
    at = torch.tensor([eta, -eta], dtype=dtype, requires_grad=True)
    with localcontext() as context:
        context.prec = 60
        size = Decimal(at[0].item())
        tail = (-size).exp()
        exact = float(1 / size**2 - tail / (1 - tail) ** 2) if size else 1 / 12
    variance = likelihoods.ContinuousBernoulli()(at).variance
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(variance, torch.full_like(at, exact), rtol=10 * epsilon, atol=0)
    assert torch.autograd.grad(variance.sum(), at)[0].isfinite().all()


def test_information_follows_the_scale_in_use():
    likelihood = likelihoods.Normal(1.0, "optimal")
    likelihood(torch.zeros(100), 3 * torch.ones(100))
    torch.testing.assert_close(likelihood.smallest_information(torch.zeros(2)), torch.full((2,), 1 / 9))


def fit_noise(estimate, steps=300, batch_size=20):
    """Normal noise of scale 0.5 around a constant, which the decoder's bias can fit."""
    x = 0.5 * torch.randn(200, 4)
    likelihood = likelihoods.Normal(2.0, estimate)
    vae = VAE(
        MLPDecoder(latent_dim=1, event_shape=4, hidden_features=(4,)),
        MLPEncoder(event_shape=4, latent_dim=1, hidden_features=(4,)),
        likelihood,
        data_size=len(x),
    )
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for step in range(steps):
        svi.step(x[(step * batch_size) % 200 :][:batch_size])
    return vae, svi, x


@pytest.mark.slow
@pytest.mark.parametrize("estimate", ["learned", "optimal"])
def test_scale_finds_the_noise(estimate):
    vae, _, _ = fit_noise(estimate)
    assert 0.35 < vae.likelihood.scale.item() < 0.65


def test_fixed_scale_stays():
    vae, _, _ = fit_noise("fixed", steps=5)
    assert math.isclose(vae.likelihood.scale.item(), 2.0, rel_tol=1e-6)


def test_optimal_scale_is_the_root_mean_square_error_of_the_batch():
    likelihood = likelihoods.Normal(1.0, "optimal")
    eta, x = torch.randn(2, 10, 4)
    distribution = likelihood(eta, x)
    torch.testing.assert_close(distribution.scale[0, 0], (x - eta).square().mean().sqrt())
    torch.testing.assert_close(likelihood.scale, (x - eta).square().mean().sqrt())


def test_optimal_scale_is_not_moved_by_evaluation():
    vae, svi, x = fit_noise("optimal", steps=20)
    before = vae.likelihood.log_scale.clone()
    svi.evaluate_loss(x)
    vae.reconstruct(x)
    vae.eval()
    vae.likelihood(torch.zeros(3, 4), x[:3])
    assert torch.equal(vae.likelihood.log_scale, before)


def test_optimal_scale_is_a_running_average_without_a_graph():
    likelihood = likelihoods.Normal(1.0, "optimal")
    logs = []
    for scale in (1.0, 3.0):
        eta = torch.zeros(1000, requires_grad=True)
        x = scale * torch.randn(1000)
        likelihood(eta, x)
        logs.append(x.square().mean().log() / 2)
    torch.testing.assert_close(likelihood.log_scale, logs[0] + 0.05 * (logs[1] - logs[0]))
    assert not likelihood.log_scale.requires_grad


def test_optimal_scale_survives_a_step_that_is_refused():
    likelihood = likelihoods.Normal(1.0, "optimal")
    likelihood(torch.zeros(4), torch.ones(4))
    before = likelihood.scale.item()
    with pyro.validation_enabled(False):
        likelihood(torch.full((4,), float("nan")), torch.ones(4))
    assert likelihood.scale.item() == before


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: likelihoods.Normal(0.0), "scale to be a finite number > 0"),
        (lambda: likelihoods.Normal(1.0, "free"), "estimate .*'fixed', 'learned', 'optimal', got 'free'"),
        (lambda: likelihoods.NegativeBinomial(-1.0), "total_count to be a finite number > 0"),
        (lambda: likelihoods.NegativeBinomial(1.0, "optimal"), "estimate .*'fixed', 'learned', got 'optimal'"),
        (lambda: likelihoods.ZeroInflatedNegativeBinomial(0.0), "total_count to be a finite number > 0"),
        (lambda: likelihoods.ZeroInflatedPoisson(1.0), r"gate to be a number in \(0, 1\), got 1.0"),
        (lambda: likelihoods.ZeroInflatedPoisson(0.5, "optimal"), "estimate .*'fixed', 'learned', got 'optimal'"),
        (lambda: likelihoods.Categorical(0), "num_categories"),
        (lambda: likelihoods.Categorical(3)(torch.zeros(2, 4)), r"Expected eta of shape \(..., 3\)"),
        (
            lambda: likelihoods.Categorical(3).information_product(torch.zeros(4), torch.zeros(4)),
            r"Expected eta of shape \(..., 3\)",
        ),
        (lambda: likelihoods.Categorical(3).smallest_information(torch.zeros(4)), r"Expected eta of shape \(..., 3\)"),
        (lambda: likelihoods.Categorical(3).mean(torch.zeros(4)), r"Expected eta of shape \(..., 3\)"),
        (lambda: likelihoods.Categorical(3).divergence(*torch.zeros(2, 4)), r"Expected eta of shape \(..., 3\)"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
