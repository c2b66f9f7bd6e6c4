"""Laws of the decoders: the constant of the whole, over random weights, pairs near and far, and every frame."""

import math

import pytest
import torch
from helpers.decoders import DECODERS, EVENT, INVERSE_LIPSCHITZ_DECODERS, LATENT, ConvBackbone, jacobian, perturb
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import InverseLipschitzDecoder, ProjectedDecoder, mlp, principal_frame

NAMES = list(INVERSE_LIPSCHITZ_DECODERS)


@st.composite
def decoders(draw, dtype=torch.float64):
    """Any decoder with a constant: latent and data dimensions (K = 1 and K = D among them), widths, depths, frames."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    latent_dim = draw(st.integers(1, 6))
    features = latent_dim + draw(st.integers(0, 10))
    widths = tuple(draw(st.lists(st.integers(1, 16), min_size=1, max_size=3)))
    constant = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    frame = draw(st.sampled_from(["identity", "random", "principal"]))
    if frame == "principal":
        frame = principal_frame(torch.randn(50, features), latent_dim)
    options = {"map_features": widths, "frame": frame, "input_skips": draw(st.booleans())}
    if draw(st.booleans()):
        decoder = InverseLipschitzDecoder(
            latent_dim=latent_dim, event_shape=features, inverse_lipschitz=constant, **options
        )
    else:
        backbone = mlp(latent_dim, widths, features)
        decoder = ProjectedDecoder(
            backbone, latent_dim=latent_dim, event_shape=features, inverse_lipschitz=constant, **options
        )
    return perturb(decoder.to(dtype), draw(st.sampled_from([0.0, 0.5, 2.0])))


@given(decoders(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_inverse_lipschitz_inequality(decoder, distance):
    z = torch.randn(100, decoder.latent_dim, dtype=torch.float64)
    step = distance * torch.randn(100, decoder.latent_dim, dtype=torch.float64)
    difference = (decoder(z + step) - decoder(z)).norm(dim=-1)
    assert (difference >= decoder.inverse_lipschitz * step.norm(dim=-1) * (1 - 1e-6)).all()


@given(decoders(dtype=torch.float32), st.sampled_from([1.0, 1e3]))
def test_inverse_lipschitz_inequality_in_single_precision(decoder, distance):
    z, other = distance * torch.randn(2, 100, decoder.latent_dim)
    eta, other_eta = decoder(z), decoder(other)
    # Rounding is relative to the values, of which the difference is taken.
    slack = 1e-5 * (eta.norm(dim=-1) + other_eta.norm(dim=-1) + 1)
    assert ((eta - other_eta).norm(dim=-1) >= decoder.inverse_lipschitz * (z - other).norm(dim=-1) - slack).all()


@given(decoders())
def test_singular_values_of_the_jacobian(decoder):
    values = torch.linalg.svdvals(jacobian(decoder, torch.randn(10, decoder.latent_dim, dtype=torch.float64)))
    assert values.min() >= decoder.inverse_lipschitz * (1 - 1e-9)


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_bound_is_sharp_where_the_nonlinear_part_vanishes(kind):
    decoder = InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=0.5, map_features=(8,), frame=kind
    ).double()
    with torch.no_grad():
        for brenier in (decoder.inner, decoder.outer):
            brenier.icnn.output_weight_raw.fill_(-1e3)
    z, other = torch.randn(2, 20, LATENT, dtype=torch.float64)
    ratio = (decoder(z) - decoder(other)).flatten(1).norm(dim=-1) / (z - other).norm(dim=-1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), rtol=1e-6, atol=0)


@given(st.integers(0, 2**31), st.sampled_from(["identity", "random"]), st.booleans())
def test_folded_frame_is_the_composition_written_out(seed, frame, skips):
    torch.manual_seed(seed)
    decoder = InverseLipschitzDecoder(
        latent_dim=LATENT,
        event_shape=EVENT,
        inverse_lipschitz=(0.4, 1.5),
        map_features=(16, 12),
        frame=frame,
        input_skips=skips,
    )
    decoder = perturb(decoder.double(), 0.5)
    z = torch.randn(7, LATENT, dtype=torch.float64)
    matrix = decoder.frame.coordinates(torch.eye(8, dtype=torch.float64))
    expected = (decoder.bias + decoder.outer(decoder.inner(z) @ matrix.mT)).reshape(7, *EVENT)
    torch.testing.assert_close(decoder(z), expected, rtol=1e-9, atol=1e-9)


def test_projection_keeps_the_backbone_outside_the_frame():
    backbone = mlp(LATENT, (16,), 8)
    decoder = ProjectedDecoder(backbone, latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=2.0)
    decoder = perturb(decoder.double(), 0.5)
    z = torch.randn(7, LATENT, dtype=torch.float64)
    eta = decoder(z).flatten(1) - decoder.bias
    q = decoder.frame.matrix
    outside = backbone(z) + z @ decoder.linear_path.weight.mT
    torch.testing.assert_close(eta @ q, decoder.map(z))
    torch.testing.assert_close(eta - eta @ q @ q.mT, outside - outside @ q @ q.mT)


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.5, 3.0])
def test_composition_has_exactly_the_constant_asked_for(constant):
    decoder = InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=constant, map_features=(8,)
    )
    assert math.isclose(decoder.inverse_lipschitz, constant, rel_tol=1e-15)
    assert math.isclose(decoder.inner.inverse_lipschitz, math.sqrt(constant))


def test_pair_of_constants():
    decoder = InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=(0.5, 2.0), map_features=(8,)
    )
    assert (decoder.inner.inverse_lipschitz, decoder.outer.inverse_lipschitz) == (0.5, 2.0)
    assert decoder.inverse_lipschitz == 1.0
    decoder.inverse_lipschitz = 4.0
    assert (decoder.inner.inverse_lipschitz, decoder.outer.inverse_lipschitz) == (1.0, 4.0)
    decoder.inverse_lipschitz = 0.0
    assert decoder.inverse_lipschitz == 0.0
    decoder.inverse_lipschitz = 9.0
    assert (decoder.inner.inverse_lipschitz, decoder.outer.inverse_lipschitz) == (3.0, 3.0)


@pytest.mark.parametrize("name", NAMES)
def test_constant_can_be_set_and_is_saved(name):
    decoder = INVERSE_LIPSCHITZ_DECODERS[name]()
    decoder.inverse_lipschitz = 2.5
    other = INVERSE_LIPSCHITZ_DECODERS[name]()
    other.load_state_dict(decoder.state_dict())
    assert math.isclose(other.inverse_lipschitz, 2.5, rel_tol=1e-15)
    z = torch.randn(4, LATENT)
    torch.testing.assert_close(other(z), decoder(z), rtol=0, atol=0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("batch_shape", [(), (1,), (5,), (2, 5), (3, 1, 2)])
def test_batch_shapes(name, batch_shape):
    decoder = DECODERS[name]()
    z = torch.randn(*batch_shape, LATENT)
    eta = decoder(z)
    assert eta.shape == batch_shape + EVENT
    flat = torch.stack([decoder(point) for point in z.reshape(-1, LATENT)]).reshape(eta.shape)
    torch.testing.assert_close(eta, flat, rtol=1e-4, atol=1e-5)


def test_output_starts_at_order_one():
    for width, features in ((64, 64), (512, 784), (512, 3072)):
        decoder = InverseLipschitzDecoder(
            latent_dim=16, event_shape=features, inverse_lipschitz=1.0, map_features=(width, width)
        )
        assert 0.3 < decoder(torch.randn(64, 16)).square().mean().sqrt() < 3


@pytest.mark.parametrize("count", [5, 8, 9, 300])
def test_principal_frame_is_the_leading_singular_vectors(count):
    x = torch.randn(count, *EVENT, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    flat = x.flatten(1) - x.flatten(1).mean(0)
    expected = torch.linalg.svd(flat).Vh[:3].mT
    frame = principal_frame(x, 3)
    assert frame.dtype == torch.float64
    torch.testing.assert_close(frame @ frame.mT, expected @ expected.mT)
    assert (frame.gather(0, frame.abs().argmax(0, keepdim=True)) > 0).all()


def test_principal_frame_spans_the_data():
    basis = torch.linalg.qr(torch.randn(8, 2)).Q
    x = torch.randn(500, 2) * torch.tensor([3.0, 1.0]) @ basis.mT + 5
    frame = principal_frame(x.reshape(500, *EVENT), 2)
    torch.testing.assert_close(frame.mT @ frame, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(frame @ frame.mT, basis @ basis.mT, rtol=0, atol=1e-4)
    coordinates = (x - x.mean(0)) @ frame
    assert coordinates[:, 0].var() > coordinates[:, 1].var()
    torch.testing.assert_close(principal_frame(x, 2), frame)


@pytest.mark.parametrize("build", [InverseLipschitzDecoder, lambda *a, **k: ProjectedDecoder(ConvBackbone(), *a, **k)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 9}, "Expected latent_dim <= 8"),
        ({"latent_dim": 0}, "latent_dim to be an int >= 1"),
        ({"event_shape": ()}, "event_shape"),
        ({"event_shape": (4, 0)}, "event_shape"),
        ({"inverse_lipschitz": -0.1}, "inverse_lipschitz to be a finite number >= 0, got -0.1"),
        ({"inverse_lipschitz": float("nan")}, "inverse_lipschitz"),
        ({"inverse_lipschitz": float("inf")}, "inverse_lipschitz"),
        ({"frame": "principal"}, "Expected frame to be 'identity', 'random', 'centered' or"),
        ({"frame": torch.ones(8, 3)}, "Expected frame with orthonormal columns"),
        ({"frame": torch.full((8, 3), float("nan"))}, "Expected frame with orthonormal columns"),
        ({"frame": torch.eye(3)}, r"Expected frame of shape \(8, 3\), got \(3, 3\)"),
        ({"map_features": (0,)}, "each entry of map_features"),
    ],
)
def test_refuses(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**({"latent_dim": LATENT, "event_shape": EVENT} | arguments))


def test_composition_refuses_three_constants():
    with pytest.raises(ValueError, match="a number or a pair of numbers"):
        InverseLipschitzDecoder(latent_dim=LATENT, event_shape=EVENT, inverse_lipschitz=(1.0, 1.0, 1.0))


def test_refuses_backbones():
    with pytest.raises(ValueError, match=r"Expected backbone to be a torch\.nn\.Module"):
        ProjectedDecoder(lambda z: z, latent_dim=LATENT, event_shape=EVENT)
    decoder = ProjectedDecoder(mlp(LATENT, (4,), 5), latent_dim=LATENT, event_shape=EVENT)
    with pytest.raises(ValueError, match=r"Expected backbone to return shape \(2, 8\) or \(2, 4, 2\), got \(2, 5\)"):
        decoder(torch.zeros(2, LATENT))


@pytest.mark.parametrize("name", DECODERS)
def test_refuses_wrong_width(name):
    with pytest.raises(ValueError, match=r"Expected z of shape \(..., 3\), got \(5, 4\)"):
        DECODERS[name]()(torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 8), "with N > 3 data of at least 3 entries"),
        (torch.zeros(8), "of shape"),
        (torch.zeros(20, 2), "of at least 3 entries"),
        (torch.full((20, 8), float("nan")), "Expected x to be finite"),
    ],
)
def test_principal_frame_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        principal_frame(x, 3)
