"""Laws of Brenier maps: the inverse Lipschitz inequality, the Jacobian, the inverse and the change of variables."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import jacobian as reverse_mode_jacobian
from helpers.decoders import perturb
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

from pyro_ilvae import BrenierMap, BrenierTransform

CONSTANTS = [0.0, 0.1, 1.0, 5.0]


@st.composite
def brenier_maps(draw, constants=tuple(CONSTANTS), dtype=torch.float64):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    brenier = BrenierMap(
        draw(st.integers(1, 10)),
        draw(st.sampled_from(constants)),
        tuple(draw(st.lists(st.integers(2, 24), min_size=1, max_size=3))),
        draw(st.sampled_from(["softplus", "gaussian_softplus"])),
        input_skips=draw(st.booleans()),
    )
    return perturb(brenier.to(dtype), draw(st.sampled_from([0.0, 0.5, 2.0])))


@given(brenier_maps(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_inverse_lipschitz_inequality(brenier, distance):
    z = torch.randn(100, brenier.features, dtype=torch.float64)
    step = distance * torch.randn(100, brenier.features, dtype=torch.float64)
    difference = brenier(z + step) - brenier(z)
    length = step.norm(dim=-1)
    assert (difference.norm(dim=-1) >= brenier.inverse_lipschitz * length * (1 - 1e-7)).all()
    assert ((difference * step).sum(-1) >= brenier.inverse_lipschitz * length**2 * (1 - 1e-7) - 1e-9).all()


@given(brenier_maps(), st.sampled_from([1.0, 1e3]))
def test_inverse_lipschitz_inequality_in_single_precision(brenier, distance):
    brenier = brenier.to(torch.float32)
    z, other = distance * torch.randn(2, 100, brenier.features)
    difference = (brenier(z) - brenier(other)).norm(dim=-1)
    # Rounding is relative to the values, of which the difference is taken.
    slack = 1e-5 * (brenier(z).norm(dim=-1) + brenier(other).norm(dim=-1) + 1)
    assert (difference >= brenier.inverse_lipschitz * (z - other).norm(dim=-1) - slack).all()


@given(brenier_maps())
def test_jacobian_is_symmetric_and_bounded_below(brenier):
    z = torch.randn(10, brenier.features, dtype=torch.float64)
    jacobian = brenier.jacobian(z)
    torch.testing.assert_close(jacobian, reverse_mode_jacobian(brenier, z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacobian, jacobian.mT, rtol=0, atol=0)
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    assert (eigenvalues >= brenier.inverse_lipschitz - 1e-10 * (1 + eigenvalues[..., -1:])).all()


@given(brenier_maps())
def test_map_is_the_gradient_of_its_potential(brenier):
    z = torch.randn(10, brenier.features, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(brenier.potential(z).sum(), z)
    torch.testing.assert_close(brenier(z), gradient, rtol=1e-9, atol=1e-9)


@given(brenier_maps(constants=(0.1, 1.0, 5.0)))
def test_inverse_undoes_the_map(brenier):
    z = 3 * torch.randn(4, 25, brenier.features, dtype=torch.float64)
    y = brenier(z).detach()
    found = brenier.inverse(y)
    # The stated bound: residual / L.
    residual = (brenier(found) - y).norm(dim=-1)
    assert (residual <= 1e-9 * (1 + y.norm(dim=-1))).all()
    assert ((found - z).norm(dim=-1) <= 1e-8 * (1 + y.norm(dim=-1)) / brenier.inverse_lipschitz).all()


def test_inverse_in_single_precision():
    brenier = perturb(BrenierMap(8, 0.5))
    z = torch.randn(200, 8)
    assert (brenier.inverse(brenier(z).detach()) - z).norm(dim=-1).max() < 1e-2


def test_inverse_is_differentiable():
    brenier = perturb(BrenierMap(2, 0.5, (8,)).double(), 0.3)
    y = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(brenier.inverse, (y,), eps=1e-5, atol=1e-5)
    # With respect to a parameter, against a finite difference.
    slope = brenier.icnn.slope
    (gradient,) = torch.autograd.grad(brenier.inverse(y.detach()).sum(), slope)
    with torch.no_grad():
        slope[0] += 1e-5
        above = brenier.inverse(y).sum()
        slope[0] -= 2e-5
        below = brenier.inverse(y).sum()
    torch.testing.assert_close(gradient[0], (above - below) / 2e-5, rtol=1e-4, atol=1e-6)


def test_inverse_without_a_solution_names_the_residual():
    brenier = BrenierMap(2, inverse_lipschitz=0.0, hidden_features=(4,))
    # With L = 0 and softplus the image of the map is bounded.
    with pytest.raises(RuntimeError, match=r"Expected a residual .* got .* inverse_lipschitz = 0 the map need not"):
        brenier.inverse(torch.full((3, 2), 1e4), max_iterations=20)


@pytest.mark.parametrize("y", [torch.tensor([[float("nan"), 0.0]]), torch.tensor([[float("inf"), 0.0]])])
def test_inverse_refuses_non_finite(y):
    with pytest.raises(ValueError, match="Expected y to be finite"):
        BrenierMap(2).inverse(y)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None, True])
def test_refuses_constants(value):
    with pytest.raises(ValueError, match="Expected inverse_lipschitz to be a finite number >= 0"):
        BrenierMap(2, inverse_lipschitz=value)
    brenier = BrenierMap(2)
    with pytest.raises(ValueError, match="Expected inverse_lipschitz"):
        brenier.inverse_lipschitz = value
    assert brenier.inverse_lipschitz == 1.0


def test_constant_is_exact_state():
    brenier = BrenierMap(2, inverse_lipschitz=0.1).double()
    assert brenier.inverse_lipschitz == 0.1
    other = BrenierMap(2, inverse_lipschitz=7.0).double()
    other.load_state_dict(brenier.state_dict())
    assert other.inverse_lipschitz == 0.1
    assert pickle.loads(pickle.dumps(brenier)).inverse_lipschitz == 0.1
    z = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(other(z), brenier(z), rtol=0, atol=0)


@given(brenier_maps(constants=(0.1, 1.0)))
def test_log_abs_det_jacobian(brenier):
    transform = BrenierTransform(brenier)
    z = torch.randn(6, brenier.features, dtype=torch.float64)
    expected = reverse_mode_jacobian(brenier, z).det().log()
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, transform(z)), expected, rtol=1e-8, atol=1e-8)
    floor = brenier.features * torch.tensor(brenier.inverse_lipschitz).log()
    assert (expected >= floor - 1e-8).all()


def test_transformed_distribution_is_a_density():
    brenier = perturb(BrenierMap(1, 0.3, (16,)).double(), 0.5)
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1), [BrenierTransform(brenier)]
    )
    edges = brenier(torch.tensor([[-7.0], [7.0]], dtype=torch.float64)).squeeze(-1).detach()
    grid = torch.linspace(edges[0], edges[1], 4000, dtype=torch.float64)
    mass = torch.trapezoid(flow.log_prob(grid.unsqueeze(-1)).exp(), grid)
    torch.testing.assert_close(mass, torch.tensor(1.0, dtype=torch.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("register", ["pyro.module", "attribute"])
def test_transform_is_trained_by_svi(register):
    transform = BrenierTransform(BrenierMap(2, 0.2, (8,)))
    data = torch.randn(50, 2) * 3 + 1

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            if register == "attribute":
                self.transform = transform

        def forward(self, x):
            chosen = self.transform if register == "attribute" else pyro.module("transform", transform)
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.TransformedDistribution(base, [chosen]), obs=x)

    svi = SVI(Model(), lambda x: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    before = {name: value.clone() for name, value in transform.named_parameters()}
    losses = [svi.step(data) for _ in range(60)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], value) for name, value in transform.named_parameters())


def test_log_prob_of_a_draw_has_the_gradients_of_any_other_point():
    flow_map = perturb(BrenierMap(2, 0.5, (8,)).double(), 0.3)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, [BrenierTransform(flow_map)])
    y = flow.sample((20,))
    parameters = list(flow_map.parameters())
    remembered = torch.autograd.grad(flow.log_prob(y).sum(), parameters)
    recomputed = torch.autograd.grad(flow.log_prob(y.clone()).sum(), parameters)
    for ours, theirs in zip(remembered, recomputed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_inverse_without_a_constant_where_there_is_one():
    brenier = BrenierMap(3, 0.0, (16,)).double()
    z = 0.5 * torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(brenier.inverse(brenier(z).detach()), z, rtol=1e-5, atol=1e-6)


def test_transform_remembers_a_draw_only_until_the_parameters_move():
    transform = BrenierTransform(BrenierMap(2, 0.5, (8,)).double())
    x = torch.randn(3, 2, dtype=torch.float64)
    y = transform(x)
    assert transform.inv(y) is x
    with torch.no_grad():
        assert transform.inv(y) is not x
    perturb(transform.brenier_map, 0.1)
    torch.testing.assert_close(transform(transform.inv(y)), y)
    transform.brenier_map.inverse_lipschitz = 2.0
    torch.testing.assert_close(transform(transform.inv(y)), y)
    assert pickle.loads(pickle.dumps(transform)).brenier_map.inverse_lipschitz == 2.0
