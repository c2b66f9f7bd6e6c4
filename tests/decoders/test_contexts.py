"""Laws of decoders with a context: the constant for every context, dimensions that broadcast, and the contract."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.context_decoders import (
    CONTEXT,
    CONTEXT_DECODERS,
    INVERSE_LIPSCHITZ_CONTEXT_DECODERS,
    SIZES,
    ConvContextBackbone,
    matrix,
)
from helpers.decoders import DECODERS, EVENT, LATENT, jacobian, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Predictive
from pyro.nn import PyroSample

from pyro_ilvae import InverseLipschitzDecoder, MLPDecoder, ProjectedDecoder
from pyro_ilvae.diagnostics import lipschitz_audit

SEEDS = st.integers(0, 2**31)


def build(name, *constant, scale=0.5, seed=0):
    torch.manual_seed(seed)
    return perturb(CONTEXT_DECODERS[name](*constant).double(), scale)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# The constant.


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_CONTEXT_DECODERS)
@given(
    SEEDS,
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.0, 1.0, 100.0]),
)
def test_inverse_lipschitz_for_every_context(name, seed, constant, scale, distance, size):
    decoder = build(name, constant, scale=scale, seed=seed)
    context, z = size * random(4, 1, CONTEXT), 3 * random(30, LATENT)
    step = distance * random(30, LATENT)
    with torch.no_grad():
        difference = (decoder(z + step, context) - decoder(z, context)).reshape(4, 30, *EVENT)
    if "centered" in name:
        # What a softmax over the last dimension sees of it.
        difference = difference - difference.mean(-1, keepdim=True)
    assert (difference.flatten(-2).norm(dim=-1) >= constant * step.norm(dim=-1) * (1 - 1e-6)).all()


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_CONTEXT_DECODERS)
def test_singular_values_of_the_jacobian_and_a_constant_that_is_set(name):
    decoder = build(name, 1.5, scale=1.0)
    for constant in (1.5, 4.0):
        decoder.inverse_lipschitz = constant
        assert decoder.inverse_lipschitz == pytest.approx(constant, rel=1e-12)
        for context in random(3, CONTEXT):
            values = torch.linalg.svdvals(
                jacobian(lambda z, context=context: decoder(z, context).flatten(-2), random(5, LATENT))
            )
            assert values.min() >= constant * (1 - 1e-9)


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_derivatives_by_latent_variable_and_context(name):
    decoder = build(name)
    z, context = random(2, 1, LATENT).requires_grad_(), random(1, 3, CONTEXT).requires_grad_()
    assert torch.autograd.gradcheck(decoder, (z, context))


# Shapes.


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
@pytest.mark.parametrize(
    ("batch_of_z", "batch_of_context"),
    [
        ((), ()),
        ((5,), (5,)),
        ((5,), ()),
        ((), (5,)),
        ((4, 1), (5,)),
        ((4, 1), (1, 5)),
        ((5,), (4, 5)),
        ((2, 4, 1), (5,)),
        ((2, 1, 1), (3, 1, 4, 5)),
    ],
)
def test_batch_dimensions_broadcast(name, batch_of_z, batch_of_context):
    decoder = build(name)
    z, context = random(*batch_of_z, LATENT), random(*batch_of_context, CONTEXT)
    eta = decoder(z, context)
    batch = torch.broadcast_shapes(batch_of_z, batch_of_context)
    assert eta.shape == batch + EVENT
    pairs = zip(z.expand(*batch, -1).reshape(-1, LATENT), context.expand(*batch, -1).reshape(-1, CONTEXT), strict=True)
    alone = torch.stack([decoder(*pair) for pair in pairs]).reshape(eta.shape)
    torch.testing.assert_close(eta, alone, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(decoder(z, context), eta, rtol=1e-12, atol=1e-12)


# What the context does.


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_context_changes_the_output(name):
    decoder, z = build(name), random(20, LATENT)
    difference = decoder(z, random(20, CONTEXT)) - decoder(z, random(20, CONTEXT))
    assert (difference.flatten(1).norm(dim=1) > 1e-3).all()


def silent(name):
    """A decoder whose weights and bias on the context are zero, and the same one without a context."""
    decoder = build(name)
    without = dict(SIZES) | {"context_dim": None}
    if name == "plain":
        other = MLPDecoder(**without, hidden_features=decoder.hidden_features)
    else:
        frame = "identity" if "identity" in name else decoder.frame.matrix
        backbone = MLPDecoder(**without, hidden_features=decoder.backbone.hidden_features)
        other = ProjectedDecoder(backbone, **without, map_features=(12, 8), frame=frame)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            if "from_context" in key:
                parameter.zero_()
    kept = {key: value for key, value in decoder.state_dict().items() if "from_context" not in key}
    other.double().load_state_dict(kept)
    return decoder, other


@pytest.mark.parametrize("name", ["plain", *(f"projected-{frame}" for frame in ("random", "identity", "matrix"))])
def test_without_weight_on_the_context_is_the_decoder_without_context(name):
    decoder, other = silent(name)
    z = random(20, LATENT)
    torch.testing.assert_close(decoder(z, random(20, CONTEXT)), other(z), rtol=1e-12, atol=1e-12)
    assert (decoder.conditional, other.conditional) == (True, False)


@pytest.mark.parametrize("name", [name for name in CONTEXT_DECODERS if "composition" in name])
@settings(max_examples=5)
@given(SEEDS)
def test_composition_is_the_one_without_context_at_both_side_by_side(name, seed):
    decoder = build(name, seed=seed)
    features = decoder.context_features
    frame = "identity" if "identity" in name else decoder.frame.matrix
    other = InverseLipschitzDecoder(
        latent_dim=features + LATENT, event_shape=EVENT, map_features=(12, 8), frame=frame
    ).double()
    other.load_state_dict({key: value for key, value in decoder.state_dict().items() if "from_context" not in key})
    z, context = random(20, LATENT), random(20, CONTEXT)
    reduced = context @ decoder.from_context.weight.T + decoder.from_context.bias
    both = torch.cat([reduced, z], dim=1)
    torch.testing.assert_close(decoder(z, context), other(both), rtol=1e-12, atol=1e-12)
    torch.nn.init.zeros_(decoder.from_context.weight)
    torch.nn.init.zeros_(decoder.from_context.bias)
    both = torch.cat([torch.zeros_like(reduced), z], dim=1)
    torch.testing.assert_close(decoder(z, context), other(both), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CONTEXT_DECODERS if "projected" in name])
def test_context_moves_the_map_and_enters_the_backbone(name):
    decoder = build(name)
    z, context = random(20, LATENT), random(20, CONTEXT)
    q = decoder.frame.coordinates(torch.eye(8, dtype=torch.float64))
    inside = decoder.map(z) + context @ decoder.from_context.weight.T
    outside = decoder.backbone(z, context).reshape(20, 8) + z @ decoder.linear_path.weight.T
    expected = decoder.bias + inside @ q.mT + outside - outside @ q @ q.mT
    torch.testing.assert_close(decoder(z, context).flatten(1), expected, rtol=1e-10, atol=1e-10)


def test_number_of_context_features():
    """As many as the frame has room for, and not more than the context has."""
    for latent_dim, context_dim, frame, expected in (
        (3, 6, "random", 5),
        (3, 6, "identity", 5),
        (3, 2, "random", 2),
        (3, 6, "centered", 1),
        (7, 6, "random", 1),
        (3, 6, matrix(LATENT + 4), 4),
    ):
        decoder = InverseLipschitzDecoder(
            latent_dim=latent_dim, event_shape=EVENT, context_dim=context_dim, frame=frame, map_features=(4,)
        )
        assert decoder.context_features == expected
        assert decoder(torch.zeros(2, latent_dim), torch.zeros(2, context_dim)).shape == (2, *EVENT)


# The contract of a module.


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_files_dtypes_and_no_grad(name, dtype):
    decoder = perturb(CONTEXT_DECODERS[name]().to(dtype), 0.5)
    z, context = torch.randn(4, LATENT, dtype=dtype), torch.randn(4, CONTEXT, dtype=dtype)
    expected = decoder(z, context)
    assert expected.dtype == dtype
    restored = CONTEXT_DECODERS[name]().to(dtype)
    restored.load_state_dict(decoder.state_dict())
    for other in (restored, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(z, context), expected)
        assert getattr(other, "inverse_lipschitz", None) == getattr(decoder, "inverse_lipschitz", None)
    for context_manager in (torch.no_grad(), torch.inference_mode()):
        with context_manager:
            torch.testing.assert_close(decoder(z, context), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_every_parameter_has_a_gradient(name):
    decoder = build(name)
    decoder(random(30, LATENT), random(30, CONTEXT)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_attributes_and_print(name):
    decoder = CONTEXT_DECODERS[name]()
    assert (decoder.latent_dim, decoder.event_shape, decoder.context_dim) == (LATENT, EVENT, CONTEXT)
    assert decoder.conditional
    assert getattr(decoder, "bounded_part", None) is None
    said = [f"latent_dim={LATENT}", f"event_shape={EVENT}", f"context_dim={CONTEXT}"]
    if name != "plain":
        said += ["inverse_lipschitz=0.7", "frame=identity" if "identity" in name else "frame=matrix"]
    assert all(words in repr(decoder).split("\n  (")[0] for words in said)


@pytest.mark.parametrize("name", DECODERS)
def test_print_without_a_context(name):
    decoder = DECODERS[name]()
    said = [f"latent_dim={LATENT}", f"event_shape={EVENT}", "context_dim=None"]
    if "plain" not in name:
        said += ["inverse_lipschitz=0.7", "frame=identity" if "identity" in name else "frame=matrix"]
    assert all(words in repr(decoder).split("\n  (")[0] for words in said)
    assert not decoder.conditional


# Errors.


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_refuses_contexts(name):
    decoder, z = CONTEXT_DECODERS[name](), torch.zeros(5, LATENT)
    shape = rf"context of shape \(..., {CONTEXT}\), got "
    for context, message in (
        (None, f"{shape}None"),
        (torch.zeros(5, CONTEXT + 1), rf"{shape}\(5, {CONTEXT + 1}\)"),
        (torch.zeros(()), rf"{shape}\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(z, context)
    with pytest.raises(ValueError, match=r"z of shape \(..., 3\), got \(5, 4\)"):
        decoder(torch.zeros(5, LATENT + 1), torch.zeros(5, CONTEXT))


@pytest.mark.parametrize("name", DECODERS)
def test_refuses_a_context_without_context_dim(name):
    with pytest.raises(ValueError, match=r"no context .*without context_dim"):
        DECODERS[name]()(torch.zeros(5, LATENT), torch.zeros(5, CONTEXT))


class OtherShape(torch.nn.Module):
    def forward(self, z, context):
        return z


BUILDERS = {
    "plain": MLPDecoder,
    "projected": lambda **options: ProjectedDecoder(ConvContextBackbone(), **options),
    "composition": InverseLipschitzDecoder,
}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "6"])
def test_refuses_context_dims(kind, value):
    with pytest.raises(ValueError, match=f"context_dim to be an int >= 1, got {value!r}"):
        BUILDERS[kind](**SIZES | {"context_dim": value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_features": 6}, "context_features <= 5, got 6"),
        ({"context_features": 0}, "context_features .*got 0"),
        ({"context_features": 1.5}, "context_features .*got 1.5"),
        ({"context_features": 2, "frame": "centered"}, "context_features <= 1, got 2"),
        ({"context_features": 2, "context_dim": None}, "context_features=None without context_dim, got 2"),
        ({"latent_dim": 8}, "latent_dim < 8.*got 8"),
        ({"latent_dim": 9}, "latent_dim < 8.*got 9"),
        ({"latent_dim": 4, "frame": "centered"}, "latent_dim < 4.*got 4"),
        ({"frame": matrix(LATENT)}, "latent_dim < 3.*got 3"),
        ({"frame": matrix(LATENT + 4), "context_features": 2}, r"frame of shape \(8, 5\), got \(8, 7\)"),
        ({"frame": matrix(LATENT + 1), "context_features": 2}, "context_features <= 1, got 2"),
        ({"frame": torch.ones(8, 5)}, "orthonormal columns"),
    ],
)
def test_composition_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        InverseLipschitzDecoder(**SIZES | options)


def test_refuses_backbones_of_another_shape():
    decoder = ProjectedDecoder(OtherShape(), **SIZES)
    with pytest.raises(ValueError, match=r"backbone to return shape \(20, 8\) or \(20, 4, 2\), got \(20, 3\)"):
        decoder(torch.zeros(4, 1, LATENT), torch.zeros(5, CONTEXT))


@pytest.mark.parametrize("kind", ["projected", "composition", "plain"])
def test_prior_on_the_weight_of_the_context(kind):
    sizes = {"latent_dim": 2, "event_shape": 5, "context_dim": 3}
    decoder = {
        "plain": lambda: MLPDecoder(**sizes, hidden_features=(4,)),
        "projected": lambda: ProjectedDecoder(MLPDecoder(**sizes, hidden_features=(4,)), **sizes, map_features=(4,)),
        "composition": lambda: InverseLipschitzDecoder(**sizes, map_features=(4,), context_features=2),
    }[kind]()
    shape = decoder.from_context.weight.shape
    decoder.from_context.weight = PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2))
    z, context = torch.randn(7, 2), torch.randn(7, 3)

    def model():
        eta = decoder(z, context)
        with pyro.plate("data", 7):
            pyro.deterministic("eta", eta, event_dim=1)

    draws = Predictive(model, num_samples=4, parallel=True, return_sites=("eta", "from_context.weight"))()
    weights = draws["from_context.weight"].reshape(4, *shape)
    for eta, weight in zip(draws["eta"].reshape(4, 7, 5), weights, strict=True):
        alone = poutine.condition(decoder, data={"from_context.weight": weight})(z, context)
        torch.testing.assert_close(eta, alone)


@pytest.mark.parametrize("name", CONTEXT_DECODERS)
def test_given_a_context(name):
    decoder, z, context = build(name), random(4, LATENT), random(CONTEXT)
    one = decoder.given(context)
    torch.testing.assert_close(one(z), decoder(z, context.expand(4, -1)))
    assert (one.latent_dim, one.event_shape, one.conditional) == (LATENT, decoder.event_shape, False)
    assert one.inverse_lipschitz == getattr(decoder, "inverse_lipschitz", None)
    audit = lipschitz_audit(one, num_samples=20, steps=2, seed=0)
    assert audit.certified is None or audit.smallest >= audit.certified * (1 - 1e-9)
    for wrong, message in [
        (random(2, CONTEXT), "Expected context of shape"),
        (random(CONTEXT + 1), "context of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder.given(wrong)
    with pytest.raises(ValueError, match="no context for a decoder without context_dim"):
        DECODERS["plain"]().given(context)
