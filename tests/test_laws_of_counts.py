"""Laws of the likelihoods of counts: sums over counts, means, shifts of eta, tails of single precision, draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import likelihoods
from pyro_ilvae.distributions import NaturalPoisson, ZeroInflated

R, GATE = 2.5, 0.3
COUNTS = {
    "poisson": lambda r, gate, *estimate: likelihoods.Poisson(),
    "negative_binomial": lambda r, gate, *estimate: likelihoods.NegativeBinomial(r, *estimate),
    "zero_inflated_poisson": lambda r, gate, *estimate: likelihoods.ZeroInflatedPoisson(gate, *estimate),
    "zero_inflated_negative_binomial": likelihoods.ZeroInflatedNegativeBinomial,
}
EVERY_KIND = pytest.mark.parametrize("name", COUNTS)
INFLATED = [name for name in COUNTS if name.startswith("zero_inflated")]
PARAMETERS = {
    "eta": st.floats(-12.0, 3.0),
    "r": st.floats(0.05, 50.0),
    "gate": st.floats(1e-6, 1 - 1e-6),
}


def build(name, r=R, gate=GATE):
    """The likelihood in double precision, with these very parameters."""
    likelihood = COUNTS[name](r, gate, "fixed").double()
    exact = {"log_total_count": math.log(r), "gate_logits": math.log(gate) - math.log1p(-gate)}
    for key, value in likelihood.state_dict().items():
        value.fill_(exact[key])
    return likelihood


def summed(likelihood, eta, size=20_000):
    """Counts, their probabilities and their scores, which hold all but a rounding error of the mass."""
    x = torch.arange(size, dtype=torch.float64)
    at = torch.full_like(x, eta).requires_grad_()
    log_prob = likelihood(at).log_prob(x)
    (score,) = torch.autograd.grad(log_prob.sum(), at)
    return x, log_prob.exp().detach(), score, log_prob.detach()


@EVERY_KIND
@given(**PARAMETERS)
def test_probabilities_sum_to_one_and_have_the_mean_and_variance(name, eta, r, gate):
    likelihood = build(name, r, gate)
    x, probability, score, _ = summed(likelihood, eta)
    distribution = likelihood(torch.tensor(eta, dtype=torch.float64))
    mean = (x * probability).sum()
    assert float(probability.sum()) == pytest.approx(1, rel=1e-9)
    assert float(distribution.mean) == pytest.approx(float(mean), rel=1e-9)
    assert float(distribution.variance) == pytest.approx(float(((x - mean).square() * probability).sum()), rel=1e-9)
    assert float((score * probability).sum()) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(likelihood.natural_parameters(distribution.mean), torch.tensor(eta, dtype=torch.float64))


@EVERY_KIND
@given(**PARAMETERS)
def test_information_is_the_mean_square_of_the_score(name, eta, r, gate):
    likelihood = build(name, r, gate)
    _, probability, score, _ = summed(likelihood, eta)
    at = torch.tensor(eta, dtype=torch.float64)
    expected = float((probability * score.square()).sum())
    assert float(likelihood.smallest_information(at)) == pytest.approx(expected, rel=1e-8)
    assert float(likelihood.information_product(at, 2 * torch.ones_like(at))) == pytest.approx(2 * expected, rel=1e-8)


@EVERY_KIND
@given(other=st.floats(-12.0, 3.0), **PARAMETERS)
def test_divergence_is_the_sum_over_counts(name, eta, other, r, gate):
    likelihood = build(name, r, gate)
    _, probability, _, log_prob = summed(likelihood, eta)
    _, _, _, log_other = summed(likelihood, other)
    # Counts without a probability in double precision count for nothing.
    expected = float(torch.where(probability > 0, probability * (log_prob - log_other), 0.0).sum())
    found = likelihood.divergence(*torch.tensor([eta, other], dtype=torch.float64))
    assert float(found) == pytest.approx(expected, rel=1e-7, abs=1e-11)
    assert float(found) >= 0


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(shift=st.floats(-6.0, 6.0))
def test_a_shift_of_eta_multiplies_the_mean(name, dtype, shift):
    likelihood, eta = build(name).to(dtype), torch.linspace(-8, 8, 30, dtype=dtype).reshape(5, 6)
    mean = likelihood.mean(eta + shift)
    torch.testing.assert_close(mean, math.exp(shift) * likelihood.mean(eta), rtol=3e-5, atol=0)
    assert mean.dtype == dtype


@pytest.mark.parametrize("name", INFLATED)
def test_small_gates_give_the_counts_themselves(name):
    """And a gate near one leaves zeros alone."""
    counts = build(name.removeprefix("zero_inflated_"))
    few, many = build(name, gate=1e-12), build(name, gate=1 - 1e-12)
    eta, x = torch.linspace(-5, 5, 12, dtype=torch.float64), torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(few(eta).log_prob(x), counts(eta).log_prob(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(few.smallest_information(eta), counts.smallest_information(eta), rtol=1e-9, atol=0)
    eta = eta.clamp(-2, 2)  # beyond, zeros of the counts are rarer than the extra ones
    torch.testing.assert_close(few.divergence(eta, -eta), counts.divergence(eta, -eta), rtol=1e-6, atol=1e-9)
    assert many.mean(eta).max() < 1e-9
    assert many.divergence(eta, -eta).max() < 1e-6


@pytest.mark.parametrize("name", INFLATED)
@pytest.mark.parametrize("step", [1e-12, 1e-9, 1e-7])
def test_the_divergence_of_parameters_that_are_nearly_the_same_is_not_negative(name, step):
    eta = torch.linspace(-10, 10, 400, dtype=torch.float64)
    divergence = build(name).divergence(eta, eta + step)
    assert (divergence >= 0).all()
    assert divergence.max() < 1e-9


@pytest.mark.parametrize("logit", [-2000.0, 2000.0])
def test_extra_zeros_that_are_rarer_than_any_number(logit):
    counts = NaturalPoisson(torch.tensor([-200.0, 0.0, 80.0]))
    log_prob = ZeroInflated(counts, torch.tensor(logit)).log_prob(torch.zeros(3))
    torch.testing.assert_close(log_prob, torch.tensor([0.0, -1.0, -2000.0] if logit < 0 else [0.0, 0.0, 0.0]))


TAILS = [-200.0, -100.0, -20.0, -3.0, 0.0, 5.0, 20.0, 80.0]


@EVERY_KIND
@pytest.mark.parametrize("r", [1e-3, R, 1e4])
@pytest.mark.parametrize("gate", [1e-6, GATE, 1 - 1e-6])
def test_the_tails_of_single_precision(name, r, gate):
    """Values and gradients by eta and by both parameters, up to counts of a million, against double precision."""
    single = COUNTS[name](r, gate)
    double = COUNTS[name](r, gate).double()
    x = torch.tensor([0.0, 1.0, 3.0, 1000.0, 1e6])
    found = []
    for likelihood, dtype in ((single, torch.float32), (double, torch.float64)):
        eta = torch.tensor(TAILS, dtype=dtype).repeat(len(x), 1).requires_grad_()
        log_prob = likelihood(eta).log_prob(x.to(dtype).unsqueeze(1))
        gradients = []
        for one in log_prob.flatten():
            gradients.append(torch.autograd.grad(one, [eta, *likelihood.parameters()], retain_graph=True))
        of_eta = sum(gradient[0] for gradient in gradients)  # each density has an eta of its own
        others = [torch.stack([gradient[i] for gradient in gradients]) for i in range(1, len(gradients[0]))]
        assert log_prob.dtype == dtype
        found.append([log_prob.detach(), of_eta, *others])
    for value, exact in zip(*found, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("r", [1e-3, R, 1e4])
@pytest.mark.parametrize("gate", [1e-6, GATE, 1 - 1e-6])
def test_information_and_moments_in_the_tails_of_single_precision(name, r, gate):
    single, double = COUNTS[name](r, gate), COUNTS[name](r, gate).double()
    eta = torch.cat([torch.linspace(-80, 78, 317), torch.linspace(-5, 5, 201)])
    for function in (
        lambda likelihood, eta: likelihood.smallest_information(eta),
        lambda likelihood, eta: likelihood.mean(eta),
        lambda likelihood, eta: likelihood(eta.clamp(max=30)).variance,
    ):
        value, exact = function(single, eta).detach(), function(double, eta.double()).detach()
        assert (value > 0).all()
        assert not value.isnan().any()
        torch.testing.assert_close(value.double(), exact, rtol=3e-5, atol=1e-37)
    ends = single.smallest_information(torch.tensor([-200.0, 200.0])).detach()
    assert not ends.isnan().any()
    assert (ends >= 0).all()


@pytest.mark.parametrize("name", COUNTS)
def test_large_counts_have_the_density_of_a_normal_near_their_mean(name):
    """Where terms of ten million cancel: single precision alone would be off by one."""
    likelihood = COUNTS[name](1e6, 1e-12, "fixed")
    eta = likelihood.natural_parameters(torch.tensor(1e6))
    distribution = likelihood(eta)
    log_prob = float(distribution.log_prob(torch.tensor(1e6)))
    assert log_prob == pytest.approx(-0.5 * math.log(2 * math.pi * float(distribution.variance)), abs=2e-2)


@EVERY_KIND
def test_draws_have_the_probabilities(name):
    likelihood, num_draws = COUNTS[name](R, GATE), 40_000
    eta = torch.tensor([-2.0, 0.5])
    draws = likelihood(eta).sample((num_draws,))
    assert (draws.shape, draws.dtype) == ((num_draws, 2), torch.float32)
    for x in range(6):
        expected = likelihood(eta).log_prob(torch.full((2,), float(x))).exp().detach()
        error = (expected * (1 - expected) / num_draws).sqrt()
        assert (((draws == x).float().mean(0) - expected).abs() <= 5 * error).all()
    largest = likelihood(torch.tensor([-200.0, 10.0])).sample((100,))
    assert (largest[:, 0] == 0).all()
    assert largest.isfinite().all()


@EVERY_KIND
def test_shapes_from_the_right(name):
    likelihood = COUNTS[name]([1.0, 2.0, 3.0], [0.1, 0.5, 0.9])
    fn = likelihood(torch.zeros(4, 1, 3)).expand((2, 4, 5, 3)).to_event(1)
    draw = fn.sample((6,))
    assert draw.shape == (6, 2, 4, 5, 3)
    assert fn.log_prob(draw).shape == (6, 2, 4, 5)
    assert fn.mean.shape == fn.variance.shape == (2, 4, 5, 3)
    torch.testing.assert_close(fn.log_prob(draw), likelihood(torch.zeros(3)).log_prob(draw).sum(-1))
    with pytest.raises(ValueError, match="within the support"):
        likelihood(torch.zeros(3)).log_prob(torch.tensor([0.0, 1.5, -1.0]))


@EVERY_KIND
def test_counts_are_integers_or_floats(name):
    likelihood, eta = COUNTS[name](R, GATE), torch.randn(5, 3)
    x = torch.randint(9, (5, 3))
    expected = likelihood(eta).log_prob(x.float())
    for other in (x, x.int(), x.double()):
        torch.testing.assert_close(likelihood(eta).log_prob(other), expected, check_dtype=False)
    assert likelihood(eta).log_prob(x).dtype == torch.float32
