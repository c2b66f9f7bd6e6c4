"""The inverse of a Brenier map: derivatives in every mode, certified points in every precision, and what it refuses."""

import copy
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from helpers.precision import PRECISIONS, tf32
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from pyro_ilvae import BrenierMap, BrenierTransform
from pyro_ilvae.diagnostics import mean_fisher_divergence
from pyro_ilvae.likelihoods import Normal

# PyTorch's own, of the formulas that it compiles for forward derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

MODES = {"gradients": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Inverse(nn.Module):
    """The inverse as a forward pass, which functional_call needs; also a decoder."""

    event_shape, latent_dim = torch.Size([3]), 3

    def __init__(self, brenier):
        super().__init__()
        self.map = brenier

    def forward(self, y):
        return self.map.inverse(y)


@pytest.fixture
def brenier():
    return perturb(BrenierMap(3, 0.5, (8, 8)).double(), 0.3)


def points(count=4):
    return torch.randn(count, 3, dtype=torch.float64)


def inverse_jacobian(brenier, y):
    with torch.no_grad():
        return torch.linalg.inv(brenier.jacobian(brenier.inverse(y)))


@pytest.mark.parametrize("mode", MODES)
def test_first_derivatives(brenier, mode):
    y, v = points(), points()
    expected = inverse_jacobian(brenier, y)
    product = (expected @ v.unsqueeze(-1)).squeeze(-1)
    with MODES[mode]():
        for function in (brenier.inverse, BrenierTransform(brenier).inv):
            torch.testing.assert_close(jvp(function, (y,), (v,))[1], product, **EXACT)
            torch.testing.assert_close(vjp(function, y)[1](v)[0], product, **EXACT)
            torch.testing.assert_close(vmap(jacrev(function))(y), expected, **EXACT)
            torch.testing.assert_close(vmap(jacfwd(function))(y), expected, **EXACT)
        torch.testing.assert_close(vmap(brenier.inverse, in_dims=1, out_dims=1)(y.T), brenier.inverse(y).T, **EXACT)
    if mode != "inference":  # PyTorch has no dual tensors there
        with MODES[mode](), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(brenier.inverse(forward_ad.make_dual(y, v))).tangent
            torch.testing.assert_close(tangent, product, **EXACT)


def test_second_derivatives(brenier):
    y = points(2)

    def gradient(y):
        return vmap(grad(lambda y: brenier.inverse(y).sum()))(y)

    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    expected = torch.stack([(gradient(y + step) - gradient(y - step)) / 2e-5 for step in steps], -1)
    found = vmap(hessian(lambda y: brenier.inverse(y).sum()))(y)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(brenier.inverse, (y.requires_grad_(),))


def test_derivatives_by_parameters_for_each_point_and_each_of_an_ensemble(brenier):
    module, y = Inverse(brenier), points()
    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(module(y).sum(), list(parameters.values()))
    each = vmap(grad(lambda values, y: functional_call(module, values, (y,)).sum()), (None, 0))(parameters, y)
    for value, total in zip(each.values(), expected, strict=True):
        torch.testing.assert_close(value.sum(0), total, **EXACT)
    ensemble = {name: torch.stack([value, 1.1 * value]) for name, value in parameters.items()}
    both = vmap(lambda values: functional_call(module, values, (y,)))(ensemble)
    torch.testing.assert_close(both[0], module(y), **EXACT)
    with torch.no_grad():
        for value in parameters.values():
            value.mul_(1.1)
    torch.testing.assert_close(both[1], module(y), **EXACT)


def test_mean_fisher_divergence_of_a_decoder_that_is_an_inverse():
    """For f = g^{-1} with g linear, g(z) = 2 z, and Normal noise of scale 1 the divergence is K / 4."""
    brenier = BrenierMap(3, 2.0, (4,))
    with torch.no_grad():
        brenier.icnn.output_weight_raw.fill_(-1e3)
    with torch.no_grad():
        result = mean_fisher_divergence(Inverse(brenier), Normal(1.0), num_samples=50)
    assert result.total == pytest.approx(0.75, rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_points_are_certified_in_every_precision(precision):
    brenier = perturb(BrenierMap(6, 0.5, (8,)), 0.3)
    y = brenier(torch.randn(50, 6)).detach()
    with PRECISIONS[precision]():
        z = brenier.inverse(y)
        tangent = jvp(brenier.inverse, (y,), (torch.ones_like(y),))[1]
    assert z.dtype == torch.float32
    exact = brenier.double()
    residual = (exact(z.double()) - y).norm(dim=-1)
    assert (residual <= 1e-5 * (1 + y.norm(dim=-1))).all()
    expected = inverse_jacobian(exact, y.double()).sum(-1).float()
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_points_are_certified_with_tf32_on_a_gpu():
    brenier = BrenierMap(64, 0.5).cuda()
    y = brenier(torch.randn(100, 64, device="cuda")).detach()
    with tf32():
        z = brenier.inverse(y)
        residual = (brenier.double()(z.double()) - y).norm(dim=-1)
    assert (residual <= 1e-5 * (1 + y.norm(dim=-1))).all()


def test_weights_from_a_prior():
    brenier = BrenierMap(2, 0.5, (4,))
    brenier.icnn.slope = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    y = torch.randn(5, 2)
    with brenier._pyro_context:
        torch.testing.assert_close(brenier(brenier.inverse(y)), y, rtol=1e-4, atol=1e-4)


class Both(PyroModule):
    """The inverse of a map whose weights have priors, and the map there."""

    def __init__(self, brenier, name):
        super().__init__()
        self.map, shape = brenier, getattr(brenier.icnn, name).shape
        setattr(self.map.icnn, name, PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))))

    def forward(self, y):
        z = self.map.inverse(y)
        return z, self.map(z)


@pytest.mark.parametrize("name", ["slope", "bias", "input_weight", "output_weight_raw"])
@pytest.mark.parametrize(
    ("weights", "shape"),
    [((4, 1), (4,)), ((4, 1), (4, 4)), ((1, 1), (5,)), ((3, 1), (1,)), ((3, 1), ()), ((4,), (4,)), ((2, 1), (2, 2))],
)
@pytest.mark.parametrize("constant", [0.5, 0.0])
def test_weights_from_a_prior_with_batch_dimensions(brenier, name, weights, shape, constant):
    """Every drawn map has its own inverse at every point, and its own derivatives."""
    brenier.inverse_lipschitz = constant
    drawn = getattr(brenier.icnn, name).detach()
    drawn = drawn + 0.3 * torch.randn(*weights, *drawn.shape, dtype=torch.float64)
    both = Both(copy.deepcopy(brenier), name)
    point = torch.randn(*shape, 3, dtype=torch.float64)
    y = brenier(0.1 * point).detach() if constant == 0.0 else point
    batch = torch.broadcast_shapes(weights, shape)
    with pyro.condition(data={f"map.icnn.{name}": drawn.requires_grad_()}):
        z, image = both(y)
    torch.testing.assert_close(image, y.expand(*batch, 3), rtol=1e-7, atol=1e-7)
    (gradient,) = torch.autograd.grad(z.sum(), drawn)
    each = drawn.detach().expand(*batch, *drawn.shape[len(weights) :]).flatten(0, len(batch) - 1).clone()
    total = torch.zeros_like(each)
    for i, (weight, right) in enumerate(zip(each, y.expand(*batch, 3).reshape(-1, 3), strict=True)):
        replaced = {f"map.icnn.{name}": weight.requires_grad_()}
        single = functional_call(Inverse(brenier), replaced, (right,))
        torch.testing.assert_close(z.reshape(-1, 3)[i], single, rtol=1e-5, atol=1e-6)
        total[i] = torch.autograd.grad(single.sum(), weight)[0]
    total = total.reshape(*batch, *drawn.shape[len(weights) :]).sum_to_size(drawn.shape)
    torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-4)


def test_weights_from_a_prior_that_do_not_go_with_the_points(brenier):
    both = Both(brenier, "slope")
    with (
        pyro.condition(data={"map.icnn.slope": torch.zeros(3, 3, dtype=torch.float64)}),
        pytest.raises(ValueError, match=r"Expected y whose batch dimensions broadcast .* got \(4, 3\)"),
    ):
        both(points())


def test_weights_from_a_prior_in_vectorized_particles():
    both, y = Both(BrenierMap(3, 1.0, (8,)), "slope"), torch.randn(4, 3)

    def model():
        z, _ = both(y)
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=y)

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo).step())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("constant", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("differentiate", [False, True])
def test_half_precision_has_a_tolerance_of_its_own(dtype, drawn, constant, differentiate):
    brenier = BrenierMap(4, constant, (16,)).to(dtype)
    if drawn:
        slope = torch.zeros(4, dtype=dtype)
        brenier.icnn.slope = PyroSample(dist.Normal(slope, 1 + slope).to_event(1))
    z = torch.randn(50, 4, dtype=dtype)
    with brenier._pyro_context, torch.set_grad_enabled(differentiate):
        y = brenier(z).detach()
        found = brenier.inverse(y)
    assert found.dtype == dtype
    assert found.requires_grad == differentiate
    limit = 12 * torch.finfo(dtype).eps * (1 + y.double().norm(dim=-1))  # 8 of the tolerance, and the rounding of y
    assert (constant * (found.double() - z.double()).norm(dim=-1) <= limit).all()


def test_a_transform_forgets_a_draw_that_was_changed(brenier):
    transform, x = BrenierTransform(brenier), points()
    with torch.no_grad():
        y = transform(x)
        assert transform.inv(y) is x
        y.mul_(2)
        torch.testing.assert_close(transform(transform.inv(y)), y)
    with torch.inference_mode():
        y = transform(x)
        y.mul_(2)
        torch.testing.assert_close(transform(transform.inv(y)), y)


def replace_weights(brenier, x, y):
    vector = torch.cat([parameter.flatten() for parameter in brenier.parameters()])
    nn.utils.vector_to_parameters(1.1 * vector, brenier.parameters())


@pytest.mark.parametrize(
    "write",
    [
        replace_weights,
        lambda brenier, x, y: brenier.icnn.bias.data.add_(0.5),
        lambda brenier, x, y: x.data.add_(0.5),
        lambda brenier, x, y: y.data.mul_(2),
        lambda brenier, x, y: setattr(y, "data", 2 * y.data),
    ],
)
def test_a_transform_forgets_a_draw_that_was_changed_without_a_version(brenier, write):
    transform, x = BrenierTransform(brenier), points()
    y = transform(x)
    assert transform.inv(y) is x
    write(brenier, x, y)
    torch.testing.assert_close(brenier(transform.inv(y)), y)


def test_a_transform_under_vmap_and_jvp(brenier):
    transform, x = BrenierTransform(brenier), points()
    torch.testing.assert_close(vmap(lambda x: transform.inv(transform(x)))(x), x, rtol=1e-7, atol=1e-7)
    tangent = jvp(lambda x: transform.inv(transform(x)), (x,), (x,))[1]
    torch.testing.assert_close(tangent, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)])
@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_vectorized_forward_derivatives(brenier, shape, name):
    function, y = getattr(brenier, name), torch.randn(shape, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(function, y, strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(function, y), **EXACT)


@pytest.mark.parametrize("name", ["bias", "slope"])
def test_weights_that_are_not_numbers_certify_no_point(name):
    brenier = BrenierMap(2, 1.0, (8,))
    with torch.no_grad():
        getattr(brenier.icnn, name)[0] = float("nan")
        with pytest.raises(RuntimeError, match=r"Expected a residual .* got nan as the largest over 1 of 1 points"):
            brenier.inverse(torch.tensor([[1.0, 2.0]]))


def test_a_map_that_is_not_one_to_one_has_no_inverse():
    brenier = BrenierMap(3, 0.0, (1,))  # one hidden unit: the image is a line
    y = brenier(torch.randn(4, 3)).detach()
    with torch.no_grad(), pytest.raises(RuntimeError, match="Expected a Jacobian that is not singular"):
        brenier.inverse(y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"tolerance": value}, "Expected tolerance .* > 0, got") for value in (float("nan"), 0, -1.0, "a", True)),
        ({"tolerance": float("inf")}, "Expected tolerance"),
        *(({"max_iterations": value}, "Expected max_iterations .* >= 1, got") for value in (0, 1.5, "a", None)),
        ({"y": torch.zeros(4, 2)}, r"Expected y of shape \(..., 3\), got \(4, 2\)"),
        ({"y": torch.full((3,), float("nan"))}, "Expected y to be finite"),
        ({"y": torch.full((3,), 0.1, dtype=torch.float64)}, "Expected y of dtype torch.float32, got torch.float64"),
        ({"y": torch.zeros(3, dtype=torch.complex64)}, "Expected y of dtype torch.float32"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        BrenierMap(3).inverse(**{"y": torch.zeros(4, 3)} | options)


def test_refuses_other_maps_in_a_transform():
    with pytest.raises(
        TypeError, match="Expected brenier_map to be a BrenierMap or a BiLipschitzMap, got the class BrenierMap"
    ):
        BrenierTransform(BrenierMap)
