"""Remedies in steps that a device takes by itself, with the same results as SVI.

On a CPU the operations of a step run one after the other, in the same memory, where a GPU runs one CUDA graph.
"""

import pyro
import pytest
import torch
from helpers.captures import replayed
from helpers.models import X, mixture_with, vae_with
from pyro.infer import SVI, TraceEnum_ELBO, TraceMeanField_ELBO

from pyro_ilvae import AnnealedELBO, GraphSVI, JointOptim, MLPDecoder, MLPEncoder, remedies, schedules
from pyro_ilvae.infer import captured_step

SGD = {"lr": 1e-4, "fused": True}


@pytest.fixture(autouse=True)
def _operations_of_a_cpu_run_one_by_one(monkeypatch):
    monkeypatch.setitem(captured_step.CAPTURES, "cpu", replayed)


def encoder():
    return MLPEncoder(event_shape=X.shape[1:], latent_dim=3, hidden_features=(6,))


def decoder():
    return MLPDecoder(event_shape=X.shape[1:], latent_dim=3, hidden_features=(6,))


def free_bits():
    return vae_with(), remedies.FreeBitsELBO(TraceMeanField_ELBO(), 0.5), lambda vae: vae.model


def free_bits_of_components():
    return mixture_with("components"), remedies.FreeBitsELBO(TraceEnum_ELBO(), {"z": 0.5}), lambda vae: vae.model


def reconstruction():
    return (
        vae_with(),
        TraceMeanField_ELBO(),
        lambda vae: remedies.LatentReconstruction(vae.encoder, weight=0.3)(vae.model),
    )


def batch_norm():
    vae = vae_with(encoder=remedies.BatchNormEncoder(encoder(), 0.5))
    return vae, TraceMeanField_ELBO(), lambda vae: vae.model


def all_at_once():
    inner = remedies.MinimumKLEncoder(remedies.BatchNormEncoder(encoder(), 0.5), 1.0)
    vae = vae_with(encoder=inner, decoder=remedies.LinearPath(decoder()))
    elbo = remedies.FreeBitsELBO(TraceMeanField_ELBO(), 0.5, groups="site")
    return vae, elbo, lambda vae: remedies.LatentReconstruction(vae.encoder, weight=0.3)(vae.model)


def trained(kind, build, wrap=lambda svi: svi, num_steps=14, change=None):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae, elbo, model_of = build()
    beta = schedules.linear(0.1, 1.0, num_steps=8)
    svi = kind(model_of(vae), vae.guide, JointOptim(torch.optim.SGD, SGD), AnnealedELBO(elbo, beta))
    steps = wrap(svi)
    losses = []
    for i in range(num_steps):
        losses.append(steps.step(X))
        beta.step()
        if change is not None and i == 6:
            change(vae, elbo, svi)
        if isinstance(steps, remedies.AggressiveInference) and i == 7:
            steps.is_aggressive = False
    if kind is GraphSVI:
        svi.synchronize()
        assert svi.runs == "CUDA graph"
    return [torch.tensor([float(loss) for loss in losses]), *(value.detach() for value in vae.state_dict().values())]


@pytest.mark.parametrize("build", [free_bits, free_bits_of_components, reconstruction, batch_norm, all_at_once])
def test_a_device_takes_the_steps_of_svi(build):
    torch.testing.assert_close(trained(GraphSVI, build), trained(SVI, build), rtol=1e-4, atol=1e-5)


def test_aggressive_steps_run_operation_by_operation_and_later_ones_on_the_device():
    def wrap(svi):
        return remedies.AggressiveInference(svi, max_inner=3)

    found, expected = trained(GraphSVI, free_bits, wrap), trained(SVI, free_bits, wrap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def other_nats(vae, elbo, svi):
    elbo.nats = 0.1


def other_sizes(vae, elbo, svi):
    vae.encoder.gamma = 1.5
    vae.encoder.encoder.delta = 0.2
    svi.model.args[0].weight = 3.0


@pytest.mark.parametrize(("build", "change"), [(free_bits, other_nats), (all_at_once, other_sizes)])
def test_settings_may_change_between_steps(build, change):
    found, expected = (trained(kind, build, change=change, num_steps=20) for kind in (GraphSVI, SVI))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], trained(SVI, build, num_steps=20)[0])
