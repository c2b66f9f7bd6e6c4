"""What decoders, maps and networks are given: converted where no value changes, and refused by name elsewhere."""

import numpy as np
import pytest
import torch
from torch import nn

from pyro_ilvae import ICNN, BiLipschitzMap, BrenierMap, InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, mlp

SIZES = {"latent_dim": 3, "event_shape": 6}


def plain(**options):
    return MLPDecoder(**SIZES | {"hidden_features": (4,)} | options)


def projected(**options):
    sizes = SIZES | {"map_features": (4, 4)} | options
    return ProjectedDecoder(MLPDecoder(**SIZES, context_dim=sizes.get("context_dim")), **sizes)


def composition(**options):
    return InverseLipschitzDecoder(**SIZES | {"map_features": (4, 4)} | options)


DECODERS = {"plain": plain, "projected": projected, "composition": composition}
FUNCTIONS = {
    **{name: (build(), "z") for name, build in DECODERS.items()},
    "map": (BrenierMap(3), "z"),
    "potential": (BrenierMap(3).potential, "z"),
    "jacobian": (BrenierMap(3).jacobian, "z"),
    "inverse": (BrenierMap(3).inverse, "y"),
    "bilipschitz map": (BiLipschitzMap(3), "z"),
    "bilipschitz jacobian": (BiLipschitzMap(3).jacobian, "z"),
    "bilipschitz inverse": (BiLipschitzMap(3).inverse, "y"),
    "icnn": (ICNN(3), "x"),
    "gradient": (ICNN(3).gradient, "x"),
    "hessian": (ICNN(3).hessian, "x"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_points_are_converted_where_no_value_changes(name):
    function, _ = FUNCTIONS[name]
    expected = function(torch.ones(2, 3))
    for value in (
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 3, dtype=torch.double),
        torch.ones(2, 3, dtype=torch.bfloat16),
        np.ones((2, 3)),
        [[1.0] * 3] * 2,
    ):
        found = function(value)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_points_are_refused_by_name(name):
    function, argument = FUNCTIONS[name]
    third = torch.full((2, 3), 1 / 3, dtype=torch.double)
    for value, error, message in (
        (third, ValueError, "of dtype torch.float32, got torch.float64"),
        (third.numpy(), ValueError, "of dtype torch.float32, got torch.float64"),
        (torch.tensor([2**24 + 1] * 3), ValueError, "of dtype torch.float32, got torch.int64"),
        (torch.ones(2, 3) + 1j, ValueError, "of dtype torch.float32"),
        (torch.tensor(1.0), ValueError, r"of shape \(..., 3\), got \(\)"),
        (torch.ones(3, 2), ValueError, r"of shape \(..., 3\), got \(3, 2\)"),
        (torch.ones(2, 3).to_sparse(), TypeError, "to be a dense tensor"),
        (None, TypeError, "to be a tensor"),
        ("z", TypeError, "to be a tensor"),
        (torch.Tensor, TypeError, "to be a tensor"),
        ([[1.0], [1.0, 2.0]], TypeError, "to be a tensor"),
    ):
        with pytest.raises(error, match=f"Expected {argument} {message}"):
            function(value)
    with pytest.raises(ValueError, match=f"Expected {argument} of dtype"):
        torch.vmap(function)(third)


@pytest.mark.parametrize("name", DECODERS)
def test_contexts(name):
    decoder, z = DECODERS[name](context_dim=2), torch.randn(4, 3)
    expected = decoder(z, torch.ones(2))
    for value in (torch.ones(2, dtype=torch.double), np.ones(2), [1.0, 1.0]):
        torch.testing.assert_close(decoder(z, value), expected, rtol=0, atol=0)
        torch.testing.assert_close(decoder.given(value)(z), expected)
    for value, error, message in (
        (torch.full((2,), 0.1, dtype=torch.double), ValueError, "Expected context of dtype torch.float32"),
        (torch.ones(5, 2), ValueError, r"Expected z and context with batch .* got \(4, 3\) and \(5, 2\)"),
        (torch.ones(3), ValueError, r"Expected context of shape \(..., 2\)"),
        ("c", TypeError, "Expected context to be"),
    ):
        with pytest.raises(error, match=message):
            decoder(z, value)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("latent_dim", (0, -1, "a", 2.5, True, None)),
        ("event_shape", (0, -1, (2, -3), "a", 2.5, (), None)),
        ("context_dim", (0, "a", 2.5)),
        ("inverse_lipschitz", (-1, float("nan"), "1", None, 1e308, 1j)),
        ("map_features", ((), (0,), "a", 64, None, (2.5,))),
        ("activation", ("relux", nn.Softplus, nn.Softplus(), None, ("softplus", None), ("softplus", []))),
        ("input_skips", ("a", None, 2)),
    ],
)
def test_refuses_sizes_and_options(name, option, values):
    if name == "plain" and option in ("inverse_lipschitz", "map_features", "activation", "input_skips"):
        option, values = "hidden_features", ((), (0,), "a", 64)
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"^Expected (each entry of )?{option}"):
            DECODERS[name](**{option: value})


def test_refuses_empty_inner_map_features():
    with pytest.raises(ValueError, match="Expected inner_map_features"):
        composition(inner_map_features=())


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z):
        return self.value(z)


@pytest.mark.parametrize(
    ("backbone", "error", "message"),
    [
        (nn.Linear, ValueError, r"backbone to be a torch\.nn\.Module, got .*pass an object"),
        (torch.relu, ValueError, r"backbone to be a torch\.nn\.Module"),
        (mlp(4, (8,), 6), ValueError, r"backbone to take z of shape \(N, 3\), got one for \(N, 4\)"),
        (MLPDecoder(**SIZES, context_dim=2), ValueError, "backbone with context_dim=None, got 2"),
        (nn.Bilinear(3, 3, 6), ValueError, "backbone to take z, got"),
        (Returns(lambda z: (z, z)), TypeError, "backbone to return a dense tensor, got a tuple"),
        (Returns(lambda z: None), TypeError, "backbone to return a dense tensor, got a NoneType"),
        (Returns(lambda z: torch.ones(len(z), 6).to_sparse()), TypeError, "backbone to return a dense tensor"),
        (Returns(lambda z: torch.ones(len(z), 6).double()), ValueError, "backbone to return dtype torch.float32"),
    ],
)
def test_refuses_backbones(backbone, error, message):
    with pytest.raises(error, match=f"Expected {message}"):
        ProjectedDecoder(backbone, **SIZES)(torch.randn(4, 3))
    if isinstance(backbone, nn.Sequential):
        with pytest.raises(ValueError, match="Expected backbone to take z and context"):
            ProjectedDecoder(mlp(3, (8,), 6), **SIZES, context_dim=2)
