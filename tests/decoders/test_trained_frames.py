"""Frames that are trained: orthonormal for every value of their parameters, and a part of the decoder's law."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.decoders import perturb
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.nn import PyroSample

from pyro_ilvae import (
    VAE,
    InverseLipschitzDecoder,
    JointOptim,
    MLPDecoder,
    MLPEncoder,
    ProjectedDecoder,
    SequenceDecoder,
    likelihoods,
    mlp,
)

LATENT, EVENT, FEATURES = 2, (4, 3), 12
KINDS = {
    "projected": lambda **options: ProjectedDecoder(
        mlp(LATENT, (8,), FEATURES), latent_dim=LATENT, event_shape=EVENT, train_frame=True, **options
    ),
    "composition": lambda **options: InverseLipschitzDecoder(
        latent_dim=LATENT, event_shape=EVENT, map_features=(8,), train_frame=True, **options
    ),
}
FRAMES = ["random", "identity", "centered", torch.linalg.qr(torch.randn(FEATURES, LATENT)).Q]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frame", FRAMES, ids=["random", "identity", "centered", "matrix"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_columns_are_orthonormal_and_the_inequality_holds_for_every_value(kind, frame, dtype, scale):
    decoder = perturb(KINDS[kind](frame=frame, inverse_lipschitz=0.7).to(dtype), scale)
    q = decoder.frame.matrix.detach().double()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(q.T @ q, torch.eye(LATENT).double(), rtol=0, atol=tolerance)
    if isinstance(frame, str) and frame == "centered":
        assert q.reshape(*EVENT, LATENT).sum(1).abs().max() < 10 * tolerance
    z, other = torch.randn(2, 200, LATENT, dtype=dtype)
    with torch.no_grad():
        distance = (decoder(z) - decoder(other)).flatten(1).norm(dim=-1)
        of_coordinates = (decoder.coordinates(decoder(z)) - decoder.coordinates(decoder(other))).norm(dim=-1)
    least = 0.7 * (z - other).norm(dim=-1)
    for value in (distance, of_coordinates):
        assert (value >= least - (1e-3 if dtype == torch.float32 else 1e-10)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_frame_is_where_training_begins(kind):
    decoder = KINDS[kind](frame=FRAMES[-1])
    torch.testing.assert_close(decoder.frame.matrix, FRAMES[-1])
    identity = KINDS[kind](frame="identity")
    torch.testing.assert_close(identity.frame.matrix, torch.eye(FEATURES, LATENT))
    x = torch.randn(50, *EVENT) * torch.linspace(0.1, 3.0, FEATURES).reshape(EVENT)
    free = KINDS[kind]()
    fixed = type(free)(
        *([mlp(LATENT, (8,), FEATURES)] if kind == "projected" else []), latent_dim=LATENT, event_shape=EVENT
    )
    for one in (decoder, free, fixed):
        one.initialize(x, likelihoods.Normal(0.5), seed=0)
    torch.testing.assert_close(decoder.frame.matrix, FRAMES[-1])
    torch.testing.assert_close(free.frame.matrix, fixed.frame.matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_frame_is_that_of_finite_differences(kind):
    decoder = perturb(KINDS[kind]().double(), 0.3)
    z, weight = torch.randn(5, LATENT).double(), torch.randn(5, *EVENT).double()
    free = decoder.frame.free_matrix
    (gradient,) = torch.autograd.grad((decoder(z) * weight).sum(), free)
    direction, step = torch.randn_like(free), 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            free += sign * step * direction
            values.append((decoder(z) * weight).sum())
            free -= sign * step * direction
    assert float((gradient * direction).sum()) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_svi_turns_the_frame(kind):
    decoder = KINDS[kind]()
    vae = VAE(decoder, MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,)), likelihoods.Normal(0.3))
    x = torch.randn(40, *EVENT)
    vae.initialize(x, seed=0)
    before = decoder.frame.matrix.detach().clone()
    pyro.set_rng_seed(0)
    svi = SVI(vae.model, vae.guide, JointOptim(torch.optim.Adam, {"lr": 1e-2}), TraceMeanField_ELBO())
    for _ in range(20):
        svi.step(x)
    assert (decoder.frame.matrix - before).abs().max() > 1e-3
    other = copy.deepcopy(decoder)
    for restored in (other, pickle.loads(pickle.dumps(decoder)), KINDS[kind]()):
        restored.load_state_dict(decoder.state_dict())
        z = torch.randn(3, LATENT)
        torch.testing.assert_close(restored(z), decoder(z))
    assert "frame=trained" in repr(decoder)


def test_under_transforms_and_without_gradients():
    decoder = KINDS["projected"]()
    z = torch.randn(5, LATENT)
    expected = decoder(z).detach()
    with torch.inference_mode():
        torch.testing.assert_close(decoder(z), expected)
    torch.testing.assert_close(torch.func.vmap(decoder)(z), expected)
    jacobian = torch.func.vmap(torch.func.jacrev(decoder))(z)
    assert jacobian.shape == (5, *EVENT, LATENT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(z).dtype == torch.float32


def test_a_decoder_of_sequences_keeps_its_trained_frame_centered():
    sizes = {"latent_dim": 2, "event_shape": 7, "context_dim": 8}
    backbone = MLPDecoder(**sizes, hidden_features=(8,))
    decoder = ProjectedDecoder(backbone, **sizes, frame="centered", train_frame=True)
    sequence = SequenceDecoder("gru", decoder)
    sequence.initialize(torch.randint(0, 7, (30, 5)), seed=0)
    perturb(sequence, 0.5)
    assert decoder.frame.matrix.sum(0).abs().max() < 1e-5
    with pytest.raises(ValueError, match="sum to up to"):
        SequenceDecoder("gru", ProjectedDecoder(MLPDecoder(**sizes, hidden_features=(8,)), **sizes, train_frame=True))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_a_frame_with_a_prior_stand_side_by_side(kind):
    decoder = KINDS[kind](frame="centered")
    prior = dist.Normal(0, 1).expand([FEATURES, LATENT]).to_event(2)
    decoder.frame.free_matrix = PyroSample(prior)
    vae = VAE(decoder, MLPEncoder(event_shape=EVENT, latent_dim=LATENT, hidden_features=(8,)), likelihoods.Normal(0.3))
    with pyro.plate("draws", 3, dim=-2):
        nodes = poutine.trace(vae.model).get_trace(num_data=5).nodes
    z, free = nodes["z"]["value"], nodes["decoder.frame.free_matrix"]["value"]
    assert (z.shape, free.shape) == ((3, 5, LATENT), (3, 1, FEATURES, LATENT))
    mean = nodes["x"]["fn"].base_dist.mean
    for i in range(3):
        one = copy.deepcopy(decoder)
        del one.frame.free_matrix
        one.frame.free_matrix = torch.nn.Parameter(free[i, 0])
        torch.testing.assert_close(one(z[i]), mean[i])
    assert Predictive(vae.model, num_samples=4, parallel=True)(num_data=2)["x"].shape == (4, 2, *EVENT)


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_state_without_a_frame(kind):
    decoder = KINDS[kind](frame="centered")
    state = decoder.state_dict()
    free = state["frame.free_matrix"].clone()
    equal, shifts = free[:, :1].expand(-1, LATENT), torch.ones_like(free) * torch.arange(1.0, 1 + LATENT)
    shifted = torch.cat([free[:, 1:], shifts[:, :1]], dim=1)
    for wrong in (0 * free, free / 0, equal, shifts, shifted, torch.full_like(free, float("nan"))):
        with pytest.raises(ValueError, match="free_matrix with finite and linearly independent columns after"):
            decoder.load_state_dict(state | {"frame.free_matrix": wrong})
    assert torch.equal(decoder.frame.free_matrix, free)
    decoder.load_state_dict(state | {"frame.free_matrix": 1e-3 * free + 1})
    assert decoder.frame.matrix.reshape(*EVENT, LATENT).sum(1).abs().max() < 1e-3
