"""Natural parameters with a given mean: the inverse of the likelihoods' means, and what means they refuse."""

import math
from decimal import Decimal, localcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

from pyro_ilvae import likelihoods

LIKELIHOODS = {
    "normal": lambda: likelihoods.Normal(0.3),
    "bernoulli": likelihoods.Bernoulli,
    "continuous_bernoulli": likelihoods.ContinuousBernoulli,
    "poisson": likelihoods.Poisson,
    "negative_binomial": lambda: likelihoods.NegativeBinomial(3.0),
    "categorical": lambda: likelihoods.Categorical(4),
    "zero_inflated_poisson": lambda: likelihoods.ZeroInflatedPoisson(0.3),
    "zero_inflated_negative_binomial": lambda: likelihoods.ZeroInflatedNegativeBinomial(3.0, 0.3),
}
DTYPES = [torch.float32, torch.float64]


def means(name, dtype):
    """Means of many sizes, of shape (5, 3, 4)."""
    raw = 4 * torch.randn(5, 3, 4, dtype=dtype)
    if name == "categorical":
        return raw.softmax(-1)
    if name == "normal":
        return raw
    return raw.sigmoid() if "bernoulli" in name else raw.exp()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_is_the_inverse_of_the_mean(name, dtype):
    likelihood, mean = LIKELIHOODS[name]().to(dtype), means(name, dtype)
    eta = likelihood.natural_parameters(mean)
    assert (eta.shape, eta.dtype) == (mean.shape, dtype)
    tolerance = 50 * torch.finfo(dtype).eps  # log and exp of means up to e^12, cancelling terms near a half
    torch.testing.assert_close(likelihood.mean(eta), mean, rtol=tolerance, atol=tolerance)
    for part, own in ((mean[1], eta[1]), (mean[1, 2], eta[1, 2])):  # batch dimensions are all alike
        torch.testing.assert_close(likelihood.natural_parameters(part), own, rtol=0, atol=0)
    for other in (mean.numpy(), mean.tolist()):
        assert torch.equal(likelihood.natural_parameters(other), likelihood.natural_parameters(torch.as_tensor(other)))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_is_undone_by_the_mean(name):
    likelihood = LIKELIHOODS[name]().double()
    eta = torch.linspace(-8, 8, 32, dtype=torch.float64).reshape(8, 4)
    expected = eta - eta.mean(-1, keepdim=True) if name == "categorical" else eta
    back = likelihood.natural_parameters(likelihood.mean(eta))
    torch.testing.assert_close(back, expected, rtol=1e-9, atol=1e-9)


def exact_mean(eta):
    """The mean of a continuous Bernoulli with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        at = Decimal(abs(eta))
        below = 1 / at - (-at).exp() / (1 - (-at).exp())
        return below if eta < 0 else 1 - below


@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.0999, 0.1001, 1.0, 3.0, 39.9, 40.1, 700.0, 800.0, 1e5, 1e12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_continuous_bernoulli_to_rounding(size, dtype):
    """No further off than the rounding of the mean and of its two terms explains."""
    likelihood = likelihoods.ContinuousBernoulli()
    for sign in (-1, 1):
        mean = torch.tensor(float(exact_mean(sign * size)), dtype=dtype)
        if mean == 1:
            continue
        eta = likelihood.natural_parameters(mean)
        slope = float(likelihood.smallest_information(torch.tensor(sign * size, dtype=torch.float64)))
        terms = torch.finfo(torch.float64).eps * min(1 / size, 10)  # which cancel, without the series for size < 0.1
        rounding = (torch.finfo(dtype).eps * float(mean) + terms) / slope + torch.finfo(dtype).eps * size
        assert abs(float(eta) - sign * size) <= 4 * rounding


def test_of_the_continuous_bernoulli_at_the_middle_and_at_the_ends():
    likelihood = likelihoods.ContinuousBernoulli()
    assert float(likelihood.natural_parameters(torch.tensor(0.5))) == 0
    tiny = torch.tensor([1e-30, 1e-10, 1e-3])
    torch.testing.assert_close(likelihood.natural_parameters(tiny), -1 / tiny)


@pytest.mark.parametrize(
    ("name", "parameter", "share"),
    [
        ("negative_binomial", "log_total_count", 1.0),
        ("zero_inflated_negative_binomial", "log_total_count", 0.7),
        ("zero_inflated_negative_binomial", "gate_logits", 3.0),
        ("zero_inflated_poisson", "gate_logits", 1.0),
    ],
)
def test_follows_the_parameters_of_the_likelihood(name, parameter, share):
    likelihood, mean = LIKELIHOODS[name](), means(name, torch.float32)
    with torch.no_grad():
        getattr(likelihood, parameter).add_(1.0)
    torch.testing.assert_close(likelihood.mean(likelihood.natural_parameters(mean)), mean)
    with torch.no_grad():
        getattr(likelihood, parameter).sub_(1.0)
    setattr(likelihood, parameter, PyroSample(dist.Normal(0.0, 1.0)))
    with pyro.condition(data={parameter: torch.tensor(math.log(2.0))}):
        factor = (2.0 if parameter == "log_total_count" else 1 / 3) * share  # log 2 is the logit of 2/3
        torch.testing.assert_close(likelihood.natural_parameters(mean), (mean / factor).log())


REFUSED = {
    "normal": [math.inf, math.nan],
    "bernoulli": [0.0, 1.0, -0.1, 1.1, math.nan],
    "continuous_bernoulli": [0.0, 1.0, -0.1, 1.1, math.nan],
    "poisson": [0.0, -1.0, math.inf, math.nan],
    "negative_binomial": [0.0, -1.0, math.inf, math.nan],
    "categorical": [0.0, 1.0, -0.1, math.nan],
    "zero_inflated_poisson": [0.0, -1.0, math.inf, math.nan],
    "zero_inflated_negative_binomial": [0.0, -1.0, math.inf, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_refuses_means_without_finite_natural_parameters(name, value):
    mean = means(name, torch.float32)
    mean[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"Expected mean strictly between .*, got {value:g}"):
        LIKELIHOODS[name]().natural_parameters(mean)


def test_refuses_what_is_no_distribution_over_the_categories():
    likelihood = likelihoods.Categorical(4)
    with pytest.raises(ValueError, match=r"Expected mean of shape \(..., 4\)"):
        likelihood.natural_parameters(torch.full((3,), 1 / 3))
    with pytest.raises(ValueError, match=r"Expected mean to hold probabilities that sum to 1, got sums off by 0\.2"):
        likelihood.natural_parameters(torch.full((2, 4), 0.2))


@pytest.mark.parametrize("num_data", [1, 10, 100_000])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_averages_of_data_become_means_with_finite_natural_parameters(name, num_data):
    """Data that are all alike have an average at the end of the range, and one pseudo-datum moves it inside."""
    likelihood = LIKELIHOODS[name]()
    for average in torch.eye(4) if name == "categorical" else torch.tensor([[0.0, 1.0, 0.3, 0.5]]):
        mean = likelihood._interior_mean(average, num_data)
        assert likelihood.natural_parameters(mean).isfinite().all()
        neutral = average if name == "normal" else torch.full_like(average, 1 / 4 if name == "categorical" else 1 / 2)
        torch.testing.assert_close(mean * (num_data + 1), average * num_data + neutral)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_has_the_gradient_of_the_inverse_of_the_mean(name):
    likelihood = LIKELIHOODS[name]().double()
    mean = means(name, torch.double)[0, 0].clamp(max=20).requires_grad_()
    direction = torch.randn(4).double()
    if name == "categorical":
        direction = direction - direction.mean()  # the probabilities stay of sum 1
    eta = likelihood.natural_parameters(mean)
    weight = torch.randn(4).double()
    (gradient,) = torch.autograd.grad((eta * weight).sum(), mean)
    step = 1e-6 * mean.detach().abs().min()
    with torch.no_grad():
        ends = [likelihood.natural_parameters(mean + sign * step * direction) for sign in (1, -1)]
    expected = float(((ends[0] - ends[1]) * weight).sum() / (2 * step))
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
