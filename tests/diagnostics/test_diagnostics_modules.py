"""The diagnostics of networks, under seeds and contexts, in bounded memory, and of models that refuse particles."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.known_models import (
    NOISE,
    assert_errors_are_right,
    assert_within,
    chain_guide,
    chain_model,
    data_plate,
    empty_guide,
    exact_chain_guide,
    mixture_model,
    scalar_guide,
    scalar_model,
    shared_guide,
    shared_model,
)
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae import VAE, MLPEncoder, ProjectedDecoder, likelihoods, mlp
from pyro_ilvae.diagnostics import (
    active_units,
    evidence,
    kl_divergence,
    kl_per_dimension,
)

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


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("samples_per_pass", [1, 4, 100])
def test_sizes_do_not_change_exact_results(batch_size, samples_per_pass):
    x = torch.randn(7)
    exact = Normal(0.0, 1.25**0.5).log_prob(x)
    bounds = evidence(
        chain_model, exact_chain_guide, x, num_samples=5, batch_size=batch_size, samples_per_pass=samples_per_pass
    )
    torch.testing.assert_close(bounds.log_likelihood, exact)
    torch.testing.assert_close(bounds.effective_sample_sizes, torch.full((7,), 5.0))
    kl = kl_per_dimension(scalar_model, scalar_guide, x, batch_size=batch_size)
    torch.testing.assert_close(kl.values, exact_kl(Normal(0.4 * x, 0.8), Normal(0.0, 1.0)))
    variance = active_units(scalar_model, scalar_guide, x, batch_size=batch_size).variances
    torch.testing.assert_close(variance, 0.16 * x.var())


def test_memory_is_bounded(monkeypatch):
    x = torch.randn(10)
    seen = []

    def watching(x):
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.6))
            seen.append(z1.numel())
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    def guide(x):
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(0.3 * x, 0.9))
            pyro.sample("z1", dist.Normal(0.5 * x + 0.4 * z2, 0.5))

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batches._MOST_PAIRS", 35)
    for measure in MEASURES:
        options = {} if measure is evidence else {"site": "z1"}
        for batch_size, largest in ((None, 30), (4, 34), (1, 35)):
            seen.clear()
            measure(watching, guide, x, num_samples=100, batch_size=batch_size, **options)
            assert max(seen) == largest
    seen.clear()
    evidence(watching, guide, x, num_samples=100, samples_per_pass=2)
    assert max(seen) == 20


def test_draws_in_passes_make_one_estimate():
    x = torch.randn(4)

    def call(seed, **options):
        return kl_divergence(chain_model, chain_guide, x, num_samples=30, seed=seed, **options)

    def in_passes(seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyro_ilvae.diagnostics._engine.batches._MOST_PAIRS", 16)
            kl = call(seed)
        return kl.values, kl.standard_errors

    assert_errors_are_right(in_passes)
    assert_errors_are_right(lambda seed: tuple(call(seed)[::2]))
    bounds = [evidence(chain_model, chain_guide, x, num_samples=30, samples_per_pass=7, seed=s) for s in range(60)]
    stated = torch.stack([b.elbo_standard_errors for b in bounds]).square().mean().sqrt()
    spread = torch.stack([b.elbo for b in bounds]).var(0).mean().sqrt()
    assert abs(float(stated / spread) - 1) < 0.2


def test_whether_draws_can_be_made_at_once_is_found_out_once(monkeypatch):
    from pyro_ilvae.diagnostics._engine.batches import Batch

    checks = []
    check = Batch._same_alone
    monkeypatch.setattr(Batch, "_same_alone", lambda self: checks.append(self.num_data) or check(self))
    evidence(chain_model, chain_guide, torch.randn(11), batch_size=3)
    assert checks == [3, 2]


def test_vae_of_the_package():
    x = torch.rand(23, 6)
    vae = VAE(
        ProjectedDecoder(mlp(2, (8,), 6), latent_dim=2, event_shape=6, inverse_lipschitz=0.7),
        MLPEncoder(event_shape=6, latent_dim=2, hidden_features=(8,)),
        likelihoods.Normal(1.0),
        data_size=1000,
    )
    loc, scale = vae.encode(x)
    kl = kl_per_dimension(vae.model, vae.guide, x, batch_size=10)
    torch.testing.assert_close(kl.values, exact_kl(Normal(loc, scale), Normal(0.0, 1.0)), rtol=1e-4, atol=1e-5)
    bounds = evidence(vae.model, vae.guide, x, batch_size=10, num_samples=5000)
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 241)] * 2)
    with torch.no_grad():
        log_lik = Normal(vae.decoder(grid), 1.0).log_prob(x[:, None]).sum(-1)
    log_joint = log_lik + Normal(0.0, 1.0).log_prob(grid).sum(-1)
    assert_within(
        bounds.log_likelihood, log_joint.logsumexp(-1) + 2 * math.log(0.05), bounds.log_likelihood_standard_errors, 1e-3
    )


def test_random_weights():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](1, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y):
            mean = self.linear(x[:, None]).squeeze(-1)
            with data_plate(x):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def guide(x, y):
        pyro.sample("linear.weight", dist.Normal(torch.full((1, 1), 0.3), 0.6).to_event(2))
        pyro.sample("linear.bias", dist.Normal(torch.zeros(1), 0.9).to_event(1))

    x, y = torch.randn(2, 6)
    model = Regression()
    covariance = x[:, None] * x + 1 + 0.25 * torch.eye(6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(y)[None]
    bounds = evidence(model, guide, (x, y), num_samples=1000)
    assert_within(bounds.log_likelihood, exact, bounds.log_likelihood_standard_errors)
    kl = kl_per_dimension(model, guide, (x, y), site="linear.weight")
    torch.testing.assert_close(kl.values, exact_kl(Normal(0.3, 0.6), Normal(0.0, 1.0)).reshape(1, 1, 1))


@pytest.mark.parametrize("size", [2, 5])
def test_models_that_index_from_the_left(size):
    def model_with(total):
        def model(x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(total(z), NOISE), obs=x)

        return model

    weights = torch.tensor([1.0, 0.5])

    def exact_guide(x):
        precision = torch.eye(2) + weights[:, None] * weights / NOISE**2
        loc = x[:, None] * torch.linalg.solve(precision, weights / NOISE**2)
        with data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    x = torch.randn(size)
    exact = Normal(0.0, (1.25 + NOISE**2) ** 0.5).log_prob(x)
    # The last one does not fail with two data, but mixes them up.
    for total in (lambda z: z @ weights, lambda z: z[:, 0] + 0.5 * z[:, 1], lambda z: (z * weights).sum(1)):
        bounds = evidence(model_with(total), exact_guide, x, num_samples=20)
        torch.testing.assert_close(bounds.elbo, exact, rtol=1e-4, atol=1e-4)


def test_control_flow_on_the_data():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if x.mean() > 0:
                loc = torch.stack([part * value for part, value in zip(z.unbind(-1), x.sign(), strict=True)], -1)
            else:
                loc = -z
            pyro.sample("x", dist.Normal(loc, NOISE), obs=x)

    def guide(x):
        sign = x.sign() if x.mean() > 0 else -torch.ones_like(x)
        with data_plate(x):
            pyro.sample("z", dist.Normal(sign * x / (1 + NOISE**2), NOISE / (1 + NOISE**2) ** 0.5))

    x = torch.randn(12)
    exact = Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x)
    for batch_size in (None, 5, 1):
        torch.testing.assert_close(evidence(model, guide, x, num_samples=4, batch_size=batch_size).elbo, exact)
