"""An encoder with normalized means: the statistics, the bound, running averages in SVI, graphs and diagnostics."""

import copy
import pickle

import pyro
import pytest
import torch
from helpers.models import TOKENS, X, hierarchy_with, mixture_with, sequence_encoder, sequential_with, vae_with
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim, MLPEncoder, diagnostics
from pyro_ilvae.infer.remedies import BatchNormEncoder, MinimumKLEncoder


def inner(**more):
    sizes = {"event_shape": X.shape[1:], "latent_dim": 3, "hidden_features": (6,)}
    return MLPEncoder(**(sizes | more))


def averages(module):
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name or "num_batches" in name}


def same_averages(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_means_by_hand_and_the_bound(gamma, dtype):
    own = inner().to(dtype)
    encoder = BatchNormEncoder(own, gamma)
    with torch.no_grad():
        encoder.shift.copy_(torch.tensor([0.5, -1.0, 0.0]))
    x = X.to(dtype)
    loc, scale = own(x)
    mean, variance = loc.mean(0), loc.var(0, unbiased=False)
    found, found_scale = encoder(x)
    expected = gamma * (loc - mean) / (variance + 1e-5).sqrt() + encoder.shift
    torch.testing.assert_close(found, expected)
    assert torch.equal(found_scale, scale)
    kl = kl_divergence(Normal(found, scale), Normal(0.0, 1.0)).mean(0)
    share = variance / (variance + 1e-5)
    assert (kl >= 0.5 * (gamma**2 * share + encoder.shift.square()) - 1e-5).all()
    torch.testing.assert_close(encoder.normalization.running_mean, 0.1 * mean)
    encoder.eval()
    statistics = encoder.normalization
    later = gamma * (loc - statistics.running_mean) / (statistics.running_var + 1e-5).sqrt() + encoder.shift
    torch.testing.assert_close(encoder(x)[0], later)


def test_extra_batch_dimensions_are_one_batch():
    encoder = BatchNormEncoder(inner(), 1.0)
    x = torch.randn(3, 4, *X.shape[1:])
    found = encoder(x)[0]
    torch.testing.assert_close(found.reshape(12, 3), encoder(x.reshape(12, *X.shape[1:]))[0])
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)


def test_no_gamma_is_the_encoder_itself():
    own = inner()
    encoder = BatchNormEncoder(own, None)
    for one, other in zip(encoder(X), own(X), strict=True):
        assert torch.equal(one, other)
    assert [name for name, _ in encoder.named_parameters()] == [f"encoder.{name}" for name, _ in own.named_parameters()]
    assert not list(encoder.buffers())


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least two data in training mode"):
        BatchNormEncoder(inner(), 1.0)(X[:1])
    assert BatchNormEncoder(inner(), 1.0).eval()(X[:1])[0].shape == (1, 3)
    with pytest.raises(ValueError, match="num_components = 2"):
        BatchNormEncoder(inner(num_components=2), 1.0)
    with pytest.raises(ValueError, match="attribute latent_dim"):
        BatchNormEncoder(lambda x: (x, x.exp()), 1.0)
    with pytest.raises(ValueError, match="a location and a scale, got"):
        BatchNormEncoder(lambda x: x, None)(X)
    with pytest.raises(TypeError, match="encoder"):
        BatchNormEncoder(vae_with().decoder, 1.0)


@pytest.mark.parametrize("particles", [1, 3])
def test_graph_steps_move_the_averages_as_svi_does(particles):
    found = []
    for kind in (SVI, GraphSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        vae = vae_with(encoder=BatchNormEncoder(inner(), 0.8))
        more = {} if kind is SVI else {"compile": False}
        elbo = TraceMeanField_ELBO(num_particles=particles)
        # Adam would move the biases of the means, of which the loss is no function, by the rounding of their gradients.
        svi = kind(vae.model, vae.guide, JointOptim(torch.optim.SGD, {"lr": 1e-4}), elbo, **more)
        losses, counts = [], []
        for _ in range(6):
            losses.append(float(svi.step(X)))
            counts.append(int(vae.encoder.normalization.num_batches_tracked))
        assert kind is SVI or svi.runs == "graph"
        found.append([torch.tensor(losses), torch.tensor(counts), *vae.state_dict().values()])
        assert counts[-1] - counts[-2] == particles
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_diagnostics_and_methods_change_no_average():
    vae = vae_with(encoder=BatchNormEncoder(inner(), 0.8))
    vae.guide(X)
    assert vae.training
    before = averages(vae)
    pair = (vae.model, vae.guide)
    diagnostics.kl_per_dimension(*pair, X)
    diagnostics.mutual_information(*pair, X, num_samples=3)
    diagnostics.active_units(*pair, X)
    diagnostics.evidence(*pair, X, num_samples=3)
    diagnostics.collapse_summary(*pair, X, num_samples=3)
    vae.encode(X)
    vae.reconstruct(X)
    assert same_averages(before, averages(vae))
    assert vae.training
    # Functions that only refer to the model have modules in training mode too.
    diagnostics.kl_divergence(lambda x: vae.model(x), lambda x: vae.guide(x), X)
    assert same_averages(before, averages(vae))
    vae.guide(X)
    assert not same_averages(before, averages(vae))


@pytest.mark.parametrize("kind", ["context", "mask", "sequential", "layers", "mixture", "nested"])
def test_models_take_it(kind):
    arguments, data = {}, X
    if kind == "context":
        model = vae_with(encoder=BatchNormEncoder(inner(context_dim=2), 1.0))
        arguments = {"context": torch.randn(len(X), 2)}
    elif kind == "mask":
        model = vae_with(encoder=BatchNormEncoder(inner(takes_mask=True), 1.0))
        arguments = {"mask": torch.rand(X.shape) < 0.9}
    elif kind == "sequential":
        model, data = sequential_with(encoder=BatchNormEncoder(sequence_encoder(), 1.0)), TOKENS
    elif kind == "layers":
        model = hierarchy_with("top_down", encoder=BatchNormEncoder(inner(), 1.0))
    elif kind == "mixture":
        model = mixture_with("summed-out", encoder=BatchNormEncoder(inner(), 1.0))
    else:
        model = vae_with(encoder=MinimumKLEncoder(BatchNormEncoder(inner(), 0.1), 3.0))
    elbo = Trace_ELBO() if kind != "mixture" else pyro.infer.TraceEnum_ELBO()
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(data, **arguments) for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()
    names = [name for name in dict(model.named_parameters()) if name.endswith("shift")]
    assert names
    assert all(dict(model.named_parameters())[name].abs().sum() > 0 for name in names)
    assert model.encode(data, **arguments)[0].shape[0] == len(data)


def test_parameters_of_modules(local_params):
    vae = vae_with(encoder=BatchNormEncoder(inner(), 1.0))
    loss = AnnealedELBO(TraceMeanField_ELBO())(vae.model, vae.guide)
    before = averages(vae)
    loss(X).backward()
    assert vae.encoder.shift.grad.abs().sum() > 0
    assert not same_averages(before, averages(vae))
    before = averages(vae)
    loss.eval()(X)
    assert same_averages(before, averages(vae))


def test_state_and_copies():
    encoder = BatchNormEncoder(inner(), 0.7, momentum=0.5)
    for _ in range(3):
        encoder(X)
    encoder.eval()
    other = BatchNormEncoder(inner(), 0.7)
    other.load_state_dict(encoder.state_dict())
    for same in (other.eval(), copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(same(X)[0], encoder(X)[0])


def test_a_bound_that_normalization_would_undo_is_refused():
    inner = MLPEncoder(event_shape=4, latent_dim=2, hidden_features=(8,))
    with pytest.raises(ValueError, match="which normalization would undo"):
        BatchNormEncoder(MinimumKLEncoder(inner, 1.0), 0.5)
