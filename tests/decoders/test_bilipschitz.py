"""Laws of bi-Lipschitz maps: both inequalities, the Jacobian, the inverse, and what makes the constants sharp."""

import copy
import math
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
from pyro.nn import PyroModule, PyroSample

from pyro_ilvae import BiLipschitzMap, BrenierTransform
from pyro_ilvae._recording import recording
from pyro_ilvae.decoders.bilipschitz import _contraction

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


@st.composite
def maps(draw, smallest=0.0, dtypes=(torch.float64, torch.float32), scales=(0.0, 0.5, 2.0, 100.0)):
    """Any map: dimensions, widths, depths, constants that may be equal, and weights of any size."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    latent_dim = draw(st.integers(1, 8))
    low = draw(st.one_of(st.just(smallest), st.floats(max(smallest, 1e-3), 20.0)))
    high = draw(st.one_of(st.just(max(low, 1e-3)), st.floats(max(low, 1e-3), 100.0)))
    bilipschitz = BiLipschitzMap(
        latent_dim,
        low,
        high,
        hidden_features=latent_dim + draw(st.integers(0, 20)),
        num_layers=draw(st.integers(1, 5)),
    )
    return perturb(bilipschitz.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(scales)))


def points(bilipschitz, count=50):
    return torch.randn(count, bilipschitz.latent_dim, dtype=bilipschitz.shift.dtype)


def frozen(constant_shift, **options):
    """A map whose hidden units all have one slope: 0 for a very negative shift, 1 for a large one."""
    bilipschitz = BiLipschitzMap(3, 0.3, 5.0, **options).double()
    with torch.no_grad():
        bilipschitz.hidden_shift.fill_(constant_shift)
    return bilipschitz


@given(maps(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_both_inequalities(bilipschitz, distance):
    z = points(bilipschitz)
    other = z + distance * torch.randn_like(z)
    near, far = bilipschitz(z).double(), bilipschitz(other).double()
    moved, length = (near - far).norm(dim=-1), (z - other).double().norm(dim=-1)
    # Rounding is relative to the values, of which the difference is taken, and to the pre-activations of large weights.
    size = near.norm(dim=-1) + far.norm(dim=-1) + bilipschitz.lipschitz * (z.norm(dim=-1) + other.norm(dim=-1) + 100)
    slack = (1e-14 if z.dtype == torch.float64 else 1e-5) * size
    rounding = 1e-9 if z.dtype == torch.float64 else 1e-5
    assert (moved >= bilipschitz.inverse_lipschitz * length * (1 - rounding) - slack).all()
    assert (moved <= bilipschitz.lipschitz * length * (1 + rounding) + slack).all()


@given(maps())
def test_singular_values_of_the_jacobian(bilipschitz):
    rounding = ROUNDING[bilipschitz.shift.dtype]
    values = torch.linalg.svdvals(bilipschitz.jacobian(points(bilipschitz, 10)).double())
    assert values.min() >= bilipschitz.inverse_lipschitz * (1 - rounding) - 1e-2 * rounding * bilipschitz.lipschitz
    assert values.max() <= bilipschitz.lipschitz * (1 + rounding)


@given(maps(dtypes=(torch.float64,)))
def test_jacobian_is_the_derivative(bilipschitz):
    z = points(bilipschitz, 6)
    jacobian = bilipschitz.jacobian(z)
    torch.testing.assert_close(jacobian, reverse_mode_jacobian(bilipschitz, z), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(bilipschitz.jacobian(z.view(2, 3, -1)).flatten(0, 1), jacobian)


@given(maps(smallest=1e-2, scales=(0.0, 0.5, 2.0)))
def test_inverse_undoes_the_map(bilipschitz):
    z = 3 * points(bilipschitz, 20).view(4, 5, -1)
    y = bilipschitz(z).detach()
    found = bilipschitz.inverse(y)
    tolerance = 1e-9 if y.dtype == torch.float64 else 2e-5
    size = tolerance * (1 + y.norm(dim=-1))
    assert ((bilipschitz(found) - y).norm(dim=-1) <= 2 * size).all()
    assert ((found - z).norm(dim=-1) <= 4 * size / bilipschitz.inverse_lipschitz).all()


def test_inverse_is_differentiable():
    bilipschitz = perturb(BiLipschitzMap(2, 0.5, 4.0, hidden_features=6).double(), 0.3)
    y = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bilipschitz.inverse, (y,), eps=1e-5, atol=1e-5)
    (by_shift,) = torch.autograd.grad(bilipschitz.inverse(y.detach()).sum(), bilipschitz.shift)
    with torch.no_grad():
        expected = -torch.linalg.inv(bilipschitz.jacobian(bilipschitz.inverse(y))).sum((0, 1))
    torch.testing.assert_close(by_shift, expected)


def test_inverse_of_a_map_without_a_constant():
    bilipschitz = BiLipschitzMap(3, 0.0, 2.0).double()
    z = torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(bilipschitz.inverse(bilipschitz(z).detach()), z, rtol=1e-5, atol=1e-6)
    flat = BiLipschitzMap(2, 0.0, 2.0, hidden_features=2, num_layers=1).double()
    with torch.no_grad():  # (0, 2 z_2) near 0, which is not one to one
        flat.free_matrix.copy_(torch.eye(2))
        flat.hidden_shift.copy_(torch.tensor([-1e3, 50.0]))
    with pytest.raises(RuntimeError, match="Expected a Jacobian that is not singular"):
        flat.inverse(torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("hidden_features", [3, 20])
def test_both_constants_are_attained(hidden_features, num_layers):
    z = torch.randn(10, 3, dtype=torch.float64)
    for shift, constant in ((-50.0, 0.3), (50.0, 5.0)):
        bilipschitz = frozen(shift, hidden_features=hidden_features, num_layers=num_layers)
        torch.testing.assert_close(bilipschitz(z), constant * z, rtol=1e-12, atol=1e-12)


@given(maps())
def test_equal_constants_leave_a_shifted_multiple(bilipschitz):
    bilipschitz.inverse_lipschitz = bilipschitz.lipschitz
    z = points(bilipschitz)
    expected = bilipschitz.lipschitz * bilipschitz.rotation.embed(z) + bilipschitz.shift
    torch.testing.assert_close(bilipschitz(z), expected, rtol=1e-5, atol=1e-5)


def test_one_layer_is_a_gradient_of_what_is_rotated_and_more_are_not():
    z = torch.randn(5, 3, dtype=torch.float64)
    for num_layers in (1, 2):
        bilipschitz = perturb(BiLipschitzMap(3, 0.2, 5.0, num_layers=num_layers).double())
        jacobian = bilipschitz.jacobian(z) @ bilipschitz.rotation.matrix.mT
        assert ((jacobian - jacobian.mT).abs().max() < 1e-12) == (num_layers == 1)


def test_one_layer_is_its_formula():
    bilipschitz = perturb(BiLipschitzMap(3, 0.2, 5.0, hidden_features=8, num_layers=1).double())
    z = torch.randn(5, 3, dtype=torch.float64)
    z_rotated = z @ bilipschitz.rotation.matrix.mT
    weight, c = _contraction(bilipschitz.free_matrix)[0], bilipschitz.hidden_shift[0]
    t = math.sqrt(8 / 3) * (torch.nn.functional.softplus(bilipschitz.sharpness_raw[0]) + 0.01)
    hidden = ((1 + (t * (z_rotated @ weight.mT) + c).exp()).log() - (1 + c.exp()).log()) / t
    torch.testing.assert_close(bilipschitz(z), bilipschitz.shift + 0.2 * z_rotated + 4.8 * hidden @ weight)


@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(0, 9),
    st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_no_matrix_stretches(seed, columns, more, scale, rank_one, dtype):
    torch.manual_seed(seed)
    matrix = scale * torch.randn(2, columns + more, columns, dtype=dtype)
    if rank_one:
        matrix = matrix[..., :1] * matrix[:, :1]
    found = _contraction(matrix)
    assert found.isfinite().all()
    assert torch.linalg.svdvals(found.double()).max() <= 1 + 20 * torch.finfo(dtype).eps
    q = torch.linalg.qr(torch.randn(columns + more, columns, dtype=dtype)).Q
    torch.testing.assert_close(_contraction(7 * q), q)


def test_gradients_are_finite_at_the_start_and_where_columns_depend_on_each_other():
    for matrix in (None, torch.ones(3, 8, 3), torch.zeros(3, 8, 3)):
        bilipschitz = BiLipschitzMap(3, hidden_features=8, num_layers=3)
        if matrix is not None:
            bilipschitz.free_matrix.data.copy_(matrix)
        bilipschitz(torch.randn(20, 3)).square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in bilipschitz.parameters())


@pytest.mark.parametrize(("low", "high"), [(0.1, 10.0), (1.0, 2.0), (0.0, 5.0), (0.0, 0.5), (3.0, 3.0)])
def test_slopes_start_between_the_constants(low, high):
    bilipschitz = BiLipschitzMap(8, low, high).double()
    slopes = torch.linalg.svdvals(bilipschitz.jacobian(torch.randn(100, 8, dtype=torch.float64))).detach()
    expected = math.sqrt(low * high) or min(1.0, high / 2)
    assert expected / 3 <= float(slopes.log().mean().exp()) <= 3 * expected
    torch.testing.assert_close(bilipschitz(torch.zeros(8, dtype=torch.float64)), bilipschitz.shift)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True])
def test_refuses_constants(value):
    for name, least in (("inverse_lipschitz", ">= 0"), ("lipschitz", "> 0")):
        with pytest.raises(ValueError, match=f"Expected {name} to be a finite number {least}"):
            BiLipschitzMap(2, **{name: value})
        bilipschitz = BiLipschitzMap(2)
        with pytest.raises(ValueError, match=f"Expected {name} to be a finite number {least}"):
            setattr(bilipschitz, name, value)
        assert (bilipschitz.inverse_lipschitz, bilipschitz.lipschitz) == (1.0, 10.0)


def test_refuses_constants_in_the_wrong_order_and_narrow_layers():
    with pytest.raises(ValueError, match="Expected inverse_lipschitz <= lipschitz, got 2 and 1"):
        BiLipschitzMap(2, 2.0, 1.0)
    bilipschitz = BiLipschitzMap(2)
    with pytest.raises(ValueError, match="Expected inverse_lipschitz <= lipschitz, got 11 and 10"):
        bilipschitz.inverse_lipschitz = 11.0
    with pytest.raises(ValueError, match=r"Expected inverse_lipschitz <= lipschitz, got 1 and 0\.5"):
        bilipschitz.lipschitz = 0.5
    with pytest.raises(ValueError, match="Expected lipschitz to be a finite number > 0, got 0"):
        BiLipschitzMap(2, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"Expected lipschitz <= 1e\+18"):
        BiLipschitzMap(2, 0.0, 1e19)
    with pytest.raises(ValueError, match="Expected hidden_features to be an int >= 5, got 4"):
        BiLipschitzMap(5, hidden_features=4)


def test_constants_are_exact_state():
    bilipschitz = perturb(BiLipschitzMap(2, 0.1, 0.7).double())
    for dtype in (torch.float16, torch.float32, torch.float64):
        bilipschitz.to(dtype)
        assert (bilipschitz.inverse_lipschitz, bilipschitz.lipschitz) == (0.1, 0.7)
    other = BiLipschitzMap(2, 3.0, 4.0).double()
    other.load_state_dict(bilipschitz.state_dict())
    z = torch.randn(5, 2, dtype=torch.float64)
    for copied in (other, pickle.loads(pickle.dumps(bilipschitz)), copy.deepcopy(bilipschitz)):
        assert (copied.inverse_lipschitz, copied.lipschitz) == (0.1, 0.7)
        torch.testing.assert_close(copied(z), bilipschitz(z), rtol=0, atol=0)
        copied.lipschitz = 9.0
        assert bilipschitz.lipschitz == 0.7


@pytest.mark.parametrize("state", [torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 1.0]), torch.tensor(1.0)])
def test_refuses_a_state_without_two_constants(state):
    bilipschitz = BiLipschitzMap(2)
    with pytest.raises(ValueError, match="Expected _extra_state to be the two constants"):
        bilipschitz.load_state_dict(bilipschitz.state_dict() | {"_extra_state": state})
    assert (bilipschitz.inverse_lipschitz, bilipschitz.lipschitz) == (1.0, 10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_same_while_recording(dtype):
    bilipschitz = BiLipschitzMap(3)
    for low, high in ((0.5, 20.0), (4.0, 7.0)):
        bilipschitz.inverse_lipschitz, bilipschitz.lipschitz = low, high
        bilipschitz.to(torch.float16).to(dtype)
        z = torch.randn(7, 3, dtype=dtype)
        expected = bilipschitz(z), bilipschitz.jacobian(z)
        with recording():
            torch.testing.assert_close((bilipschitz(z), bilipschitz.jacobian(z)), expected)


@pytest.mark.parametrize("batch_shape", [(), (1,), (2, 5), (3, 1, 2)])
def test_batch_shapes(batch_shape):
    bilipschitz = perturb(BiLipschitzMap(3))
    z = torch.randn(*batch_shape, 3)
    y = bilipschitz(z)
    assert y.shape == z.shape
    assert bilipschitz.jacobian(z).shape == (*batch_shape, 3, 3)
    flat = torch.stack([bilipschitz(point) for point in z.reshape(-1, 3)]).reshape(y.shape)
    torch.testing.assert_close(y, flat, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(bilipschitz(z), y, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["rotation", "free_matrix", "sharpness_raw", "hidden_shift", "shift"])
def test_keeps_its_constants_under_a_prior_on_any_weight(name):
    bilipschitz = BiLipschitzMap(3, 0.5, 2.0, hidden_features=5, num_layers=2)
    holder, key = (bilipschitz.rotation, "free_matrix") if name == "rotation" else (bilipschitz, name)
    shape = getattr(holder, key).shape
    setattr(holder, key, PyroSample(dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))))

    def drawn(function):
        with pyro.plate("draws", 4, dim=-2):  # as vectorized particles
            return pyro.poutine.trace(function).get_trace(torch.randn(7, 3)).nodes["_RETURN"]["value"]

    assert drawn(bilipschitz).shape == (4, 7, 3)
    jacobian = drawn(bilipschitz.jacobian)
    assert jacobian.shape == ((7, 3, 3) if name == "shift" else (4, 7, 3, 3))
    values = torch.linalg.svdvals(jacobian)
    assert (values >= 0.5 * (1 - 1e-4)).all()
    assert (values <= 2 * (1 + 1e-4)).all()


@given(maps(smallest=1e-2, dtypes=(torch.float64,), scales=(0.0, 0.5, 2.0)))
def test_log_abs_det_jacobian(bilipschitz):
    transform = BrenierTransform(bilipschitz)
    z = points(bilipschitz, 6)
    y = transform(z)
    found = transform.log_abs_det_jacobian(z, y)
    expected = reverse_mode_jacobian(bilipschitz, z).det().abs().log()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert (found >= bilipschitz.latent_dim * math.log(bilipschitz.inverse_lipschitz) - 1e-8).all()
    assert (found <= bilipschitz.latent_dim * math.log(bilipschitz.lipschitz) + 1e-8).all()
    assert transform.inv(y) is z
    bilipschitz.lipschitz *= 2
    torch.testing.assert_close(transform(transform.inv(y)), y)


def test_a_flow_is_a_density_and_is_trained_by_svi():
    transform = BrenierTransform(BiLipschitzMap(1, 0.2, 5.0, hidden_features=8).double())
    data = torch.rand(200, 1, dtype=torch.float64) * 4 + 1

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.transform = transform

        def forward(self, x):
            base = dist.Normal(x.new_zeros(1), 1.0).to_event(1)
            flow = dist.TransformedDistribution(base, [self.transform])
            with pyro.plate("data", len(x)):
                pyro.sample("x", flow, obs=x)
            return flow

    model = Model()
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(40)]
    assert losses[-1] < losses[0] - 50
    edges = transform(torch.tensor([[-8.0], [8.0]], dtype=torch.float64)).squeeze(-1).detach()
    grid = torch.linspace(*edges, 4000, dtype=torch.float64)
    mass = torch.trapezoid(model(data).log_prob(grid[:, None]).exp(), grid)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-3, atol=1e-3)
