"""The distributions by natural parameter, against PyTorch's where that is accurate and against integrals elsewhere."""

import pyro.distributions as dist
import pytest
import torch
from torch.autograd import gradcheck

from pyro_ilvae.distributions import IsotropicNormal, NaturalContinuousBernoulli, NaturalPoisson

CLASSES = [NaturalPoisson, NaturalContinuousBernoulli]
TAILS = [-200.0, -40.0, -15.0, -1.0, -0.11, -0.09, -2e-3, -5e-4, 0.0, 5e-4, 2e-3, 0.09, 0.11, 1.0, 15.0, 40.0, 200.0]


@pytest.mark.parametrize("scale_shape", [(), (3, 1, 1)])
@pytest.mark.parametrize("expanded", [False, True])
def test_isotropic_normal_is_pytorchs(scale_shape, expanded):
    loc = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    log_scale = torch.randn(scale_shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    ours, theirs = IsotropicNormal(loc, log_scale.exp()), dist.Normal(loc, log_scale.exp())
    if expanded:
        ours, theirs = (fn.expand([2, 3, 5, 4]).to_event(1).mask(x[..., 0] > 0) for fn in (ours, theirs))
    assert ours.batch_shape == theirs.batch_shape
    values = [fn.log_prob(x) for fn in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), (loc, log_scale)) for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    draws = []
    for fn in (ours, theirs):
        torch.manual_seed(0)
        draws.append(fn.rsample((2,)))
    torch.testing.assert_close(*draws)


def test_isotropic_normal_checks_its_values():
    fn = IsotropicNormal(torch.zeros(3), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        fn.log_prob(torch.tensor([0.0, float("nan"), 1.0]))


@pytest.mark.parametrize("eta", [-5.0, -0.3, 0.2, 2.0])
def test_poisson_is_pytorchs(eta):
    eta, x = torch.tensor(eta, dtype=torch.float64), torch.arange(20.0, dtype=torch.float64)
    torch.testing.assert_close(NaturalPoisson(eta).log_prob(x), dist.Poisson(eta.exp()).log_prob(x))


@pytest.mark.parametrize("eta", [-200.0, -110.0, -90.0, 50.0])
def test_poisson_in_the_tails_of_single_precision(eta):
    eta = torch.tensor(eta, requires_grad=True)
    x = torch.tensor([0.0, 3.0])
    log_prob = NaturalPoisson(eta).log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), eta)
    exact = eta.detach().double()
    torch.testing.assert_close(log_prob.double(), x.double() * exact - exact.exp() - torch.lgamma(x + 1).double())
    torch.testing.assert_close(gradient.double(), 3.0 - 2 * exact.exp())


@pytest.mark.parametrize("eta", [-3.0, -0.5, 0.4, 4.0])
def test_continuous_bernoulli_is_pytorchs(eta):
    eta, x = torch.tensor(eta, dtype=torch.float64), torch.linspace(0, 1, 11, dtype=torch.float64)
    ours, theirs = NaturalContinuousBernoulli(eta), dist.ContinuousBernoulli(logits=eta)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", TAILS)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 2e-4), (torch.float64, 1e-5)])
def test_continuous_bernoulli_is_a_density(eta, dtype, accuracy):
    fn = NaturalContinuousBernoulli(torch.tensor(eta, dtype=dtype))
    grid = torch.linspace(0, 1, 100_001, dtype=dtype)
    density = fn.log_prob(grid).exp().double()
    mass = torch.trapezoid(density, grid.double())
    mean = torch.trapezoid(density * grid.double(), grid.double())
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=accuracy)
    torch.testing.assert_close(fn.mean.double(), mean, rtol=0, atol=accuracy)
    draws = fn.sample((20_000,))
    assert draws.min() >= 0
    assert draws.max() <= 1
    standard_error = draws.std() / 20_000**0.5
    assert abs(draws.mean() - fn.mean) < 5 * standard_error


@pytest.mark.parametrize("eta", TAILS)
def test_gradients(eta):
    eta = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    assert gradcheck(lambda value: NaturalContinuousBernoulli(value).log_prob(x), (eta,))

    def draw(value):
        torch.manual_seed(0)
        return NaturalContinuousBernoulli(value).rsample((5,))

    assert gradcheck(draw, (eta,), atol=1e-3)


def test_draws_move_continuously_through_zero():
    draws = []
    for eta in (-2e-3, 0.0, 2e-3):
        torch.manual_seed(0)
        draws.append(NaturalContinuousBernoulli(torch.tensor(eta)).sample((100,)))
    assert (draws[0] - draws[1]).abs().max() < 1e-3
    assert (draws[2] - draws[1]).abs().max() < 1e-3


@pytest.mark.parametrize("build", CLASSES)
def test_shapes_and_validation(build):
    fn = build(torch.zeros(4, 1)).expand((2, 4, 3)).to_event(1)
    draw = fn.sample((5,))
    assert draw.shape == (5, 2, 4, 3)
    assert fn.log_prob(draw).shape == (5, 2, 4)
    assert fn.mean.shape == (2, 4, 3)
    with pytest.raises(ValueError, match="within the support"):
        build(torch.zeros(2)).log_prob(torch.tensor([-1.0, -1.0]))
    with pytest.raises(ValueError, match="eta"):
        build(torch.tensor([float("nan")]))


def test_poisson_draws():
    fn = NaturalPoisson(torch.tensor([-1.0, 3.0]))
    draws = fn.sample((20_000,))
    assert ((draws.mean(0) - fn.mean).abs() < 5 * (fn.variance / 20_000).sqrt()).all()
