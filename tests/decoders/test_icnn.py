"""Laws of the input convex network: convexity, its closed-form derivatives, its initialization."""

import pytest
import torch
from helpers.decoders import jacobian, perturb
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import ICNN
from pyro_ilvae.decoders.activations import ACTIVATIONS
from pyro_ilvae.decoders.frame_arguments import make_frame

pytestmark = pytest.mark.filterwarnings("ignore:The activation:UserWarning")

SMOOTH = [name for name, activation in ACTIVATIONS.items() if activation.smooth]
EVERYWHERE = [name for name, activation in ACTIVATIONS.items() if activation.monotone]


@st.composite
def networks(draw, activations=tuple(EVERYWHERE)):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=4)))
    activation = draw(st.sampled_from(activations))
    if draw(st.booleans()) and activation == "leaky_relu":
        activation = ("squared_leaky_relu", *("leaky_relu",) * (len(widths) - 1))
    icnn = ICNN(draw(st.integers(1, 12)), widths, activation, input_skips=draw(st.booleans()))
    return perturb(icnn.to(torch.float64), draw(st.sampled_from([0.0, 0.5, 3.0])))


@given(networks())
def test_potential_is_convex_along_segments(icnn):
    left, right = 10 * torch.randn(2, 50, icnn.in_features, dtype=torch.float64)
    t = torch.rand(50, 1, dtype=torch.float64)
    t_flat = t.squeeze(-1)
    chord = t_flat * icnn(left) + (1 - t_flat) * icnn(right)
    assert (icnn(t * left + (1 - t) * right) <= chord + 1e-9 * (1 + chord.abs())).all()


@given(networks())
def test_gradient_is_autograd_of_the_potential(icnn):
    x = torch.randn(20, icnn.in_features, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(icnn(x).sum(), x)
    torch.testing.assert_close(icnn.gradient(x), expected, rtol=1e-10, atol=1e-10)


@given(networks(activations=tuple(SMOOTH)))
def test_hessian_is_autograd_of_the_gradient(icnn):
    x = torch.randn(5, icnn.in_features, dtype=torch.float64)
    torch.testing.assert_close(icnn.hessian(x), jacobian(icnn.gradient, x), rtol=1e-9, atol=1e-9)


@given(networks())
def test_potential_is_its_definition(icnn):
    x = torch.randn(10, icnn.in_features, dtype=torch.float64)
    skips = icnn.input_weight.split(icnn.hidden_features if icnn.input_skips else icnn.hidden_features[:1])
    biases = icnn.bias.split(icnn.hidden_features)
    activations = [ACTIVATIONS[name].value for name in icnn._activation_names]
    hidden = activations[0](x @ skips[0].mT + biases[0])
    for i, layer in enumerate(icnn.hidden_weights, start=1):
        skip = x @ skips[i].mT if icnn.input_skips else 0.0
        hidden = activations[i](hidden @ torch.nn.functional.softplus(layer.raw).mT + skip + biases[i])
    expected = hidden @ torch.nn.functional.softplus(icnn.output_weight_raw) + x @ icnn.slope
    torch.testing.assert_close(icnn(x), expected, rtol=1e-10, atol=1e-10)


@given(networks())
def test_hessian_is_positive_semi_definite(icnn):
    eigenvalues = torch.linalg.eigvalsh(icnn.hessian(torch.randn(10, icnn.in_features, dtype=torch.float64)))
    assert (eigenvalues >= -1e-10 * (1 + eigenvalues[..., -1:])).all()


@given(networks(), st.sampled_from(["identity", "random"]))
def test_gradient_in_frame_is_gradient_at_the_embedded_point(icnn, frame):
    frame = make_frame(frame, torch.Size([icnn.in_features]), max(1, icnn.in_features // 2)).to(torch.float64)
    u = torch.randn(2, 5, frame.latent_dim, dtype=torch.float64)
    x = frame.add(u.new_zeros(2, 5, icnn.in_features), u)
    torch.testing.assert_close(icnn.gradient_in_frame(u, frame), icnn.gradient(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_activations(name):
    activation = ACTIVATIONS[name]
    x = torch.linspace(-45, 45, 2000, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(activation.value(x).sum(), x)
    torch.testing.assert_close(activation.derivative(x), first, rtol=1e-10, atol=1e-12)
    x = x.detach().requires_grad_()
    derivative = activation.derivative(x)
    if derivative.requires_grad:
        (second,) = torch.autograd.grad(derivative.sum(), x)
        torch.testing.assert_close(activation.second_derivative(x), second, rtol=1e-9, atol=1e-12)
    assert (derivative.diff() >= -1e-12).all(), "not convex"
    assert activation.monotone == bool((derivative >= 0).all())


@pytest.mark.parametrize("features", [2, 64, 3072])
@pytest.mark.parametrize("widths", [(8,), (1024,), (8, 8), (1024, 1024), (64, 64, 64)])
@pytest.mark.parametrize("input_skips", [True, False])
def test_gradient_starts_at_order_one(features, widths, input_skips):
    gradient = ICNN(features, widths, input_skips=input_skips).gradient(torch.randn(64, features))
    assert 0.5 < gradient.square().mean().sqrt() < 2


@pytest.mark.parametrize("name", EVERYWHERE)
def test_gradient_starts_at_order_one_for_every_activation(name):
    gradient = ICNN(16, (128, 128), name).gradient(torch.randn(256, 16))
    assert 0.5 < gradient.square().mean().sqrt() < 2


def test_input_norm_sets_the_scale_that_the_gradient_is_made_for():
    icnn = ICNN(100)
    icnn.reset_parameters(input_norm=1.0)
    x = torch.randn(256, 100) / 10
    assert 0.5 < icnn.gradient(x).square().mean().sqrt() < 2


def test_piecewise_activations_warn():
    with pytest.warns(UserWarning, match="not differentiable everywhere"):
        icnn = ICNN(2, activation="relu")
    assert not icnn.smooth
    assert ICNN(2).smooth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features to be an int >= 1, got 0"),
        ({"hidden_features": ()}, "hidden_features to be a non-empty sequence"),
        ({"hidden_features": (4, -1)}, "each entry of hidden_features"),
        ({"activation": "tanh"}, "Expected activation to be one of"),
        ({"activation": ("softplus",)}, "each of the 2 hidden layers"),
        ({"activation": "squared_leaky_relu"}, "hidden layer 2 to be non-decreasing"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ICNN(**({"in_features": 3} | arguments))


@pytest.mark.parametrize("name", ["input_norm", "gradient_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_refuses_scales(name, value):
    with pytest.raises(ValueError, match=f"Expected {name} to be a finite number > 0"):
        ICNN(3).reset_parameters(**{name: value})


def test_refuses_wrong_width():
    with pytest.raises(ValueError, match=r"Expected x of shape \(..., 3\), got \(5, 4\)"):
        ICNN(3).gradient(torch.zeros(5, 4))
