"""Frames hold their constant: what is loaded, what is converted, and what a backbone leaves inside of them."""

import numpy as np
import pytest
import torch
from helpers.decoders import perturb
from helpers.precision import PRECISIONS, tf32
from torch import nn

from pyro_ilvae import InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder, SequenceDecoder, mlp, principal_frame

SIZES = {"latent_dim": 2, "event_shape": 6}


def projected(**options):
    sizes = SIZES | {"inverse_lipschitz": 0.5, "map_features": (4,)} | options
    features = torch.zeros(sizes["event_shape"]).numel()
    return ProjectedDecoder(mlp(sizes["latent_dim"], (8,), features), **sizes)


def composition(**options):
    return InverseLipschitzDecoder(**SIZES | {"inverse_lipschitz": 0.5, "map_features": (4,)} | options)


def sequence(frame="centered"):
    sizes = SIZES | {"context_dim": 4}
    backbone = MLPDecoder(**sizes, hidden_features=(4,))
    return SequenceDecoder("gru", ProjectedDecoder(backbone, **sizes, map_features=(4,), frame=frame))


BUILDERS = {"projected": projected, "composition": composition, "sequence": sequence}


def ratio(decoder, near, far):
    with torch.no_grad():
        difference = (decoder(far).double() - decoder(near).double()).norm(dim=-1)
    return float((difference / (far.double() - near.double()).norm(dim=-1)).min())


def linear(decoder):
    """The decoder with g(z) = L z, where the constant is sharp."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("output_weight_raw"):
                parameter.fill_(-1e3)
    return decoder


# What a backbone leaves inside.


@pytest.mark.parametrize(("latent_dim", "features"), [(1, 1), (3, 3), (3, 4), (2, 6), (8, 9), (3, 20)])
@pytest.mark.parametrize("frame", ["random", "identity"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("step", [1e-2, 1.0])
def test_constant_beside_a_large_backbone(latent_dim, features, frame, scale, step):
    decoder = linear(projected(latent_dim=latent_dim, event_shape=features, frame=frame))
    with torch.no_grad():
        for parameter in decoder.backbone[-1].parameters():
            parameter.mul_(scale)
    near = torch.randn(500, latent_dim)
    assert ratio(decoder, near, near + step) >= 0.5 * (1 - 1e-3)


class Inside(nn.Module):
    """A large backbone all of which lies inside of the frame."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, z):
        return 1e4 * z.sin() @ self.matrix.T


@pytest.mark.parametrize(("latent_dim", "features"), [(2, 2), (2, 3), (4, 9), (2, 8)])
def test_a_backbone_inside_of_the_frame_leaves_nothing(latent_dim, features):
    matrix = torch.linalg.qr(torch.randn(features, latent_dim)).Q
    decoder = ProjectedDecoder(
        Inside(matrix), latent_dim=latent_dim, event_shape=features, inverse_lipschitz=0.01, frame=matrix
    )
    z = torch.randn(100, latent_dim)
    expected = decoder.map(z) @ decoder.frame.matrix.T
    # One unit of 6e-8 is left of what is outside, which is rounding of 1e4 itself.
    torch.testing.assert_close(decoder(z), expected, rtol=0, atol=3e-3)
    torch.testing.assert_close(decoder(z) @ decoder.frame.matrix, decoder.map(z), rtol=0, atol=1e-6)


# Fewer digits.


@pytest.mark.parametrize("build", [projected, composition])
@pytest.mark.parametrize("sizes", [(3, 3), (3, 20)])
def test_constant_under_autocast(build, sizes):
    decoder = linear(build(latent_dim=sizes[0], event_shape=sizes[1]))
    near = torch.randn(500, sizes[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ratio(decoder, near, near + 1e-2) >= 0.5 * (1 - 1e-3)
        assert decoder(near).dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_frames_are_orthonormal_in_every_precision(precision):
    with PRECISIONS[precision]():
        frames = [principal_frame(torch.randn(200, 20), 4), "random", "centered"]
        decoders = [projected(latent_dim=4, event_shape=20, frame=frame) for frame in frames]
        decoders.append(projected(latent_dim=4, event_shape=20))
        decoders[-1].load_state_dict(decoders[0].state_dict())
        sequence()
    for decoder in decoders:
        matrix = decoder.frame.matrix.double()
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_frames_with_tf32_on_a_gpu():
    with tf32(), torch.device("cuda"):
        frame = principal_frame(torch.randn(2000, 784), 32)
        backbone = mlp(32, (8,), 784)
        decoder = ProjectedDecoder(backbone, latent_dim=32, event_shape=784, frame=frame)
        decoder.load_state_dict(decoder.state_dict())
    matrix = decoder.frame.matrix.double().cpu()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_its_rounding_and_nothing_afterwards(dtype):
    decoder = linear(projected(event_shape=20)).to(dtype)
    near = torch.randn(200, 2, dtype=dtype)
    assert ratio(decoder, near, -near) >= 0.5 * (1 - 8 * torch.finfo(dtype).eps)
    decoder.load_state_dict(decoder.state_dict())
    matrix = decoder.float().frame.matrix.double()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)


# State dicts.

SPOILED = {
    "zeros": torch.zeros_like,
    "scaled": lambda matrix: 1.001 * matrix,
    "rounded": lambda matrix: matrix.half().float(),
    "not a number": lambda matrix: matrix * float("nan"),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_refuses_to_load_a_frame_that_is_none(name, spoiled, options):
    decoder = BUILDERS[name]()
    state = decoder.state_dict()
    (key,) = [key for key in state if key.endswith("frame.matrix")]
    before = state[key].clone()
    state[key] = SPOILED[spoiled](state[key])
    with pytest.raises(ValueError, match=f"Expected 0.{key} with orthonormal columns, got"):
        nn.Sequential(decoder).load_state_dict({f"0.{key}": value for key, value in state.items()}, **options)
    kept = decoder.state_dict()[key]
    assert torch.equal(kept, before)


def test_a_frame_of_logits_stays_centered():
    decoder, other = sequence(), sequence()
    other.load_state_dict(decoder.state_dict())
    state = decoder.state_dict()
    state["decoder.frame.matrix"] = torch.linalg.qr(torch.randn(6, 2)).Q
    with pytest.raises(ValueError, match=r"Expected decoder\.frame\.matrix with columns orthogonal to the all-ones"):
        decoder.load_state_dict(state)


@pytest.mark.parametrize("build", [projected, composition])
@pytest.mark.parametrize("event_shape", [6, (3, 4), (2, 2, 3)])
def test_a_centered_frame_stays_centered(build, event_shape):
    decoder, other = (build(frame=frame, event_shape=event_shape) for frame in ("centered", "random"))
    with pytest.raises(ValueError, match=r"Expected frame\.matrix with columns orthogonal to the all-ones vector"):
        decoder.load_state_dict(other.state_dict())
    other.load_state_dict(decoder.state_dict())
    decoder.load_state_dict(build(frame="centered", event_shape=event_shape).state_dict())
    decoder.half().float()
    sums = decoder.frame.matrix.reshape(*decoder.event_shape, -1).sum(-2)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-6)
    if decoder.event_shape == (2, 2, 3):  # centered as a whole, and not in each set of categories
        whole = build(frame="centered", event_shape=12).state_dict()
        with pytest.raises(ValueError, match="of each set of 3 categories"):
            decoder.load_state_dict(whole)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.float16, torch.float32, torch.float64])
def test_checkpoints_of_another_precision(name, saved, loaded):
    state = BUILDERS[name]().to(saved).state_dict()
    decoder = BUILDERS[name]().to(loaded)
    decoder.load_state_dict(state)
    matrix = next(value for key, value in decoder.state_dict().items() if key.endswith("frame.matrix"))
    assert matrix.dtype == loaded
    exact = {"rtol": 0, "atol": 4 * torch.finfo(loaded).eps}
    torch.testing.assert_close(matrix.double().T @ matrix.double(), torch.eye(2, dtype=torch.float64), **exact)
    if name == "sequence":
        torch.testing.assert_close(matrix.double().sum(0), torch.zeros(2, dtype=torch.float64), **exact)


@pytest.mark.parametrize("build", [projected, composition])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e30])
def test_refuses_to_load_constants(build, value):
    decoder = build()
    state = decoder.state_dict()
    key = next(key for key in state if key.endswith("_extra_state"))
    state[key] = torch.tensor(value, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"Expected {key}, the inverse Lipschitz constant,"):
        decoder.load_state_dict(state, strict=False)
    assert decoder.inverse_lipschitz == pytest.approx(0.5)


@pytest.mark.parametrize("build", [projected, composition])
@pytest.mark.parametrize("value", [1e308, 1e19, float("nan"), -1e-300])
def test_refuses_constants_that_overflow(build, value):
    with pytest.raises(ValueError, match="Expected inverse_lipschitz"):
        build(inverse_lipschitz=value)
    decoder = build()
    with pytest.raises(ValueError, match="Expected inverse_lipschitz"):
        decoder.inverse_lipschitz = value
    assert decoder.inverse_lipschitz == pytest.approx(0.5)


# Conversions.


@pytest.mark.parametrize("build", [projected, composition])
def test_frames_of_arrays(build):
    components = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 2)))[0].T
    for frame in (components.T, components.T.tolist(), np.asfortranarray(components.T)):
        decoder = build(frame=frame)
        assert decoder.frame.matrix.dtype == torch.float32
        np.testing.assert_allclose(decoder.frame.matrix, components.T, atol=1e-6)
    for frame, error, message in (
        (components, ValueError, r"Expected frame of shape \(6, 2\), got \(2, 6\): pass its transpose"),
        (np.full((6, 2), np.nan), ValueError, "Expected frame with orthonormal columns"),
        (torch.eye(6)[:, :2].to_sparse(), TypeError, "Expected frame to be a dense tensor"),
        (torch.eye(6)[:, :2].to(torch.complex64), ValueError, "Expected frame of real numbers"),
        (nn.Linear(2, 6), TypeError, "Expected frame to be a name or a matrix"),
        (torch.Tensor, TypeError, "Expected frame to be a name or a matrix"),
        (None, TypeError, "Expected frame to be"),
        ("randon", ValueError, "Expected frame to be 'identity', 'random'"),
    ):
        with pytest.raises(error, match=message):
            build(frame=frame)
    with pytest.raises(ValueError, match="pass its transpose"):
        composition(frame=components, context_dim=1)


def test_derivatives_where_the_frame_fills_the_space():
    for features in (2, 3):
        decoder = perturb(projected(event_shape=features).double(), 0.5)
        z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(decoder, (z,))
        assert torch.autograd.gradgradcheck(decoder, (z,))
