"""The diagnostics under evaluation mode, seeds and the contexts of a caller."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.latent_structures import (
    chain_guide,
    chain_model,
    data_plate,
    empty_guide,
    mixture_model,
    scalar_guide,
    scalar_model,
    shared_guide,
    shared_model,
)
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import active_units, evidence, kl_divergence, kl_per_dimension

MEASURES = (kl_per_dimension, kl_divergence, active_units, evidence)


def numbers(result):
    return [part for part in result if isinstance(part, torch.Tensor)]


class Noisy(PyroModule):
    """A VAE whose networks behave differently in training."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.encoder = PyroModule[nn.Sequential](
            PyroModule[nn.Linear](3, 8), PyroModule[nn.BatchNorm1d](8), PyroModule[nn.Dropout](0.5), nn.Linear(8, 4)
        )
        self.decoder = PyroModule[nn.Sequential](
            PyroModule[nn.Linear](2, 8), PyroModule[nn.Dropout](0.5), nn.Linear(8, 3)
        )
        self.to(dtype)

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        with data_plate(x):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_are_in_evaluation_mode_and_back(local_params, dtype):
    x = torch.randn(9, 3, dtype=dtype)
    vae = Noisy(dtype).train()
    vae.decoder[1].eval()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    modes = [module.training for module in vae.modules()]
    results = [measure(vae.model, vae.guide, x, batch_size=4, seed=1) for measure in MEASURES]
    assert [module.training for module in vae.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    vae.eval()
    with torch.no_grad():
        loc, scale = vae.encoder(x).chunk(2, -1)
    torch.testing.assert_close(results[0].values, exact_kl(Normal(loc, scale.exp()), Normal(0.0, 1.0)))
    for measure, result in zip(MEASURES, results, strict=True):
        for value, again in zip(
            numbers(result), numbers(measure(vae.model, vae.guide, x, batch_size=4, seed=1)), strict=True
        ):
            assert torch.equal(value, again)
            assert value.dtype in (dtype, torch.bool)
            assert not value.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts_of_the_caller(context):
    x = torch.randn(5)
    with context(), poutine.scale(scale=10.0), pyro.plate("outer", 3, dim=-4):
        results = [measure(scalar_model, scalar_guide, x, seed=2) for measure in MEASURES]
    for measure, result in zip(MEASURES, results, strict=True):
        for value, expected in zip(
            numbers(result), numbers(measure(scalar_model, scalar_guide, x, seed=2)), strict=True
        ):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("model", "guide", "options"),
    [
        (scalar_model, scalar_guide, {}),
        (chain_model, chain_guide, {"batch_size": 2}),
        (shared_model, shared_guide, {}),
        (mixture_model, empty_guide, {"batch_size": 3}),
    ],
)
def test_seeds_reproduce_and_leave_the_global_state(model, guide, options):
    x = torch.randn(5)
    state = torch.get_rng_state()
    calls = [lambda seed: evidence(model, guide, x, seed=seed, num_samples=7, **options)]
    if guide is not empty_guide:
        calls.append(lambda seed: kl_divergence(model, guide, x, seed=seed, num_samples=7, **options))
    for call in calls:
        first, again, other = call(3), call(3), call(4)
        assert all(torch.equal(*pair) for pair in zip(numbers(first), numbers(again), strict=True))
        if guide in (chain_guide, shared_guide):
            assert not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.get_rng_state())
