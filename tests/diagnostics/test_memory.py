"""The memory of a pass: bounded in bytes whatever a datum or a hidden layer takes, with no influence on results."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ilvae import likelihoods
from pyro_ilvae.diagnostics import (
    active_units,
    collapse_summary,
    evidence,
    guide_fisher_divergence,
    kl_divergence,
    kl_per_dimension,
    lipschitz_audit,
    mean_fisher_divergence,
    mutual_information,
    posterior_fisher_divergence,
    posterior_fisher_divergence_of_draws,
    separation,
)
from pyro_ilvae.diagnostics._engine.memory import Allocations, fitting_rows

N, DRAWS, BUDGET = 2, 100, 2**22


class Largest(TorchDispatchMode):
    """Finds the bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.fixture(autouse=True)
def _small_budget(monkeypatch):
    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.memory.MOST_BYTES", BUDGET)


class Chain:
    """z2 -> z1 -> x, with hidden layers of some width between z1 and data with some number of features."""

    def __init__(self, features, hidden):
        self.net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, features)).requires_grad_(False)
        self.x = torch.randn(N, features)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(0.5 * z2, 1.0).to_event(1))
            pyro.sample("x", dist.StudentT(3.0, self.net(z1), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x[:, :2].tanh(), 1.0).to_event(1))
            pyro.sample("z1", dist.Normal(0.3 * z2, 1.0).to_event(1))

    def one(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z1), 1.0).to_event(1), obs=x)

    def guide_of_one(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(x[:, :2].tanh(), 1.0).to_event(1))


def by_pair(measure, **options):
    return lambda chain: measure(chain.model, chain.guide, chain.x, num_samples=DRAWS, seed=0, **options)


def of_draws(chain):
    draws = {name: torch.randn(DRAWS, N, 2) for name in ("z1", "z2")}
    return posterior_fisher_divergence_of_draws(chain.model, draws, chain.x, sites=["z1"])


MEASURES = {
    "evidence": by_pair(evidence),
    "kl_divergence": by_pair(kl_divergence),
    "kl_per_dimension": by_pair(kl_per_dimension, site="z1"),
    "active_units": by_pair(active_units, site="z1"),
    "guide_fisher_divergence": by_pair(guide_fisher_divergence, site="z1"),
    "posterior_fisher_divergence": by_pair(posterior_fisher_divergence, sites=["z1"]),
    "posterior_fisher_divergence_of_draws": of_draws,
    "mutual_information": lambda chain: mutual_information(chain.one, chain.guide_of_one, chain.x, seed=0),
    "collapse_summary": lambda chain: collapse_summary(
        chain.one, chain.guide_of_one, chain.x, num_samples=DRAWS, seed=0, measures=["kl", "evidence", "fisher"]
    ),
    "mean_fisher_divergence": lambda chain: mean_fisher_divergence(
        chain.net, likelihoods.Normal(1.0), latent_dim=2, num_samples=DRAWS
    ),
    "mean_fisher_divergence, sampled": lambda chain: mean_fisher_divergence(
        chain.net, lambda eta: dist.Normal(eta, 1.0), latent_dim=2, num_samples=DRAWS
    ),
    "separation": lambda chain: separation(chain.net, likelihoods.Normal(1.0), latent_dim=2, num_pairs=DRAWS),
    "separation, sampled": lambda chain: separation(
        chain.net, lambda eta: dist.StudentT(3.0, eta, 1.0), latent_dim=2, num_pairs=DRAWS, num_samples=2
    ),
    "lipschitz_audit": lambda chain: lipschitz_audit(chain.net, latent_dim=2, num_samples=DRAWS, steps=2),
}


@pytest.mark.parametrize(("features", "hidden"), [(200, 8), (20_000, 8), (2, 20_000)])
@pytest.mark.parametrize("name", MEASURES)
def test_the_largest_tensor_does_not_grow_with_the_data_or_the_network(name, features, hidden):
    chain = Chain(features, hidden)
    with Largest() as largest:
        MEASURES[name](chain)
    # All draws at once would make tensors of 16 MB.
    assert largest.bytes <= BUDGET // 2


def test_hidden_layers_and_log_densities_count_and_views_do_not():
    x = torch.ones(10, 3)
    with Allocations() as allocations:
        layer = x @ torch.ones(3, 100)  # 1,200 bytes of weights and 4,000 of the layer
        layer.T.reshape(1, 100, 10).expand(5, 100, 10)
        layer.tanh_()
        layer.double()
    assert allocations.bytes == 1200 + 4000 + 8000


@pytest.mark.parametrize("bytes_per_row", [64, 4096])
def test_rows_fit_whatever_all_rows_share(bytes_per_row):
    state = torch.get_rng_state()

    def compute(rows):
        torch.zeros(10_000), torch.randn(3)
        return torch.zeros(len(rows), bytes_per_row // 4)

    assert fitting_rows(compute, torch.zeros(7, 2)) == BUDGET // bytes_per_row
    assert torch.equal(state, torch.get_rng_state())


def test_an_encoder_takes_no_memory_for_each_draw():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen.append(z.numel() // len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        wide = x @ torch.ones(1, BUDGET // 64)  # a quarter of the budget
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(wide.mean(1), 1.0))

    evidence(model, guide, torch.ones(N, 1), num_samples=DRAWS)
    assert max(seen) == DRAWS


@pytest.mark.parametrize("measure", [evidence, posterior_fisher_divergence])
def test_passes_change_no_result(measure, monkeypatch):
    chain = Chain(16, 8)
    x = torch.randn(8, 16)  # draws for 8 data use up the random numbers of whole blocks
    whole = measure(chain.one, chain.guide_of_one, x, num_samples=40, seed=1)
    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.memory.MOST_BYTES", 2**14)
    with Largest() as largest:
        parts = measure(chain.one, chain.guide_of_one, x, num_samples=40, seed=1)
    assert largest.bytes < 2**14
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_a_time", [1, 7, 20])
def test_an_audit_compares_all_pairs_in_blocks(at_a_time, monkeypatch):
    features = 6
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, features)).double().requires_grad_(False)
    options = {"latent_dim": 2, "num_samples": 20, "num_worst": 190, "steps": 3, "seed": 0}
    whole = lipschitz_audit(net, **options)
    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.memory.MOST_BYTES", at_a_time * 64 * features)
    parts = lipschitz_audit(net, **options)
    for one, other in zip(whole[1:], parts[1:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_models_that_are_compiled_or_use_functional_transforms_are_weighed():
    net = nn.Linear(2, 3).requires_grad_(False)
    compiled = torch.compile(net, backend="eager")
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            slope = torch.func.vmap(torch.func.jacrev(net))(z.reshape(-1, 2)).sum((1, 2)).reshape(*z.shape[:-1], 1)
            seen.append(z.numel() // 2 // len(x))
            pyro.sample("x", dist.Normal(compiled(z) + slope, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    for context in (torch.enable_grad(), torch.inference_mode()):
        with context:
            evidence(model, guide, torch.randn(5, 3), num_samples=20)
    assert max(seen) == 20
