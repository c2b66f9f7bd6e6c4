"""Draws at once, in passes and in batches: bounded memory, the same numbers, models that refuse particles."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.estimates import assert_errors_are_right
from helpers.factor_models import N, W, exact_guide, linear_model
from helpers.latent_structures import (
    NOISE,
    chain_guide,
    chain_model,
    data_plate,
    exact_chain_guide,
    scalar_guide,
    scalar_model,
)
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from pyro_ilvae.diagnostics import active_units, evidence, kl_divergence, kl_per_dimension


def test_draws_in_passes_bound_the_memory_and_change_nothing(monkeypatch):
    x = torch.randn(N, 3)
    most = []

    def model_that_looks(batch):
        with pyro.plate("data", len(batch)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            most.append(z[..., 0].numel())
            pyro.sample("x", dist.Normal(z @ W, NOISE).to_event(1), obs=batch)

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batch._MOST_PAIRS", 7 * N)
    bounds = evidence(model_that_looks, exact_guide, x, num_samples=30)
    assert max(most) == 7 * N
    torch.testing.assert_close(bounds.elbo, evidence(linear_model, exact_guide, x).elbo, atol=1e-4, rtol=1e-4)


def test_infinite_divergence_by_draws_in_passes(monkeypatch):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Uniform(-0.5, z.new_full((), 0.5), validate_args=False))

    def guide(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("w", dist.Normal(z, 1.0))

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batch._MOST_PAIRS", 20)
    with pyro.validation_enabled(False):
        kl = kl_divergence(model, guide, torch.zeros(2), num_samples=100)
    assert kl.values.tolist() == [math.inf, math.inf]


MEASURES = (kl_per_dimension, kl_divergence, active_units, evidence)


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


@pytest.mark.slow
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

    monkeypatch.setattr("pyro_ilvae.diagnostics._engine.batch._MOST_PAIRS", 35)
    for measure in MEASURES:
        options = {} if measure is evidence else {"site": "z1"}
        for batch_size, largest in ((None, 30), (4, 34), (1, 35)):
            seen.clear()
            measure(watching, guide, x, num_samples=100, batch_size=batch_size, **options)
            assert max(seen) == largest
    seen.clear()
    evidence(watching, guide, x, num_samples=100, samples_per_pass=2)
    assert max(seen) == 20


@pytest.mark.slow
def test_draws_in_passes_make_one_estimate():
    x = torch.randn(4)

    def call(seed, **options):
        return kl_divergence(chain_model, chain_guide, x, num_samples=30, seed=seed, **options)

    def in_passes(seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyro_ilvae.diagnostics._engine.batch._MOST_PAIRS", 16)
            kl = call(seed)
        return kl.values, kl.standard_errors

    assert_errors_are_right(in_passes)
    assert_errors_are_right(lambda seed: tuple(call(seed)[::2]))
    bounds = [evidence(chain_model, chain_guide, x, num_samples=30, samples_per_pass=7, seed=s) for s in range(60)]
    stated = torch.stack([b.elbo_standard_errors for b in bounds]).square().mean().sqrt()
    spread = torch.stack([b.elbo for b in bounds]).var(0).mean().sqrt()
    assert abs(float(stated / spread) - 1) < 0.2


def test_whether_draws_can_be_made_at_once_is_found_out_once_for_each_size():
    calls = {}

    def watching(x):
        calls[float(x[0])] = calls.get(float(x[0]), 0) + 1
        chain_model(x)

    evidence(watching, chain_guide, torch.arange(11.0), batch_size=3)
    first, second, third, small = (calls[start] for start in (0.0, 3.0, 6.0, 9.0))
    assert second == third < first
    assert small > second


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


BRANCHES = {
    "any": lambda z: (z > 2.5).any(),
    "any of few": lambda z: (z > 3.5).any(),
    "all": lambda z: (z > -1).all(),
    "mean": lambda z: z.mean() > 0.2,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_on_all_draws_at_once_is_found(branch, seed):
    """The result is that of draws one by one, or an error: also where few draws take the branch."""
    x, taken = torch.randn(5), []

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            taken.append(bool(branch(z)))
            w = pyro.sample("w", dist.Normal(z + 5.0 * taken[-1], 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.sample("w", dist.Normal(x / 2, 1.0))

    def attempt(samples_per_pass=None):
        taken.clear()
        try:
            return evidence(model, guide, x, num_samples=200, samples_per_pass=samples_per_pass, seed=seed)
        except ValueError as error:
            return str(error)

    alone = attempt(samples_per_pass=1)
    together = attempt()
    if isinstance(together, str):
        assert "samples_per_pass=1" in together
    elif any(taken):
        assert torch.equal(together.elbo, alone.elbo)
    else:
        error = alone.elbo_standard_errors + together.elbo_standard_errors
        assert ((together.elbo - alone.elbo).abs() < 5 * error).all()


def test_the_comparison_with_draws_alone_is_bounded():
    x, draws = torch.randn(5), []

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            draws.append(z.numel() // len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for samples_per_pass, most in ((None, 40), (100, 100), (3, 0.7 * 1000)):
        draws.clear()
        evidence(model, scalar_guide, x, num_samples=1000, samples_per_pass=samples_per_pass, seed=0)
        assert sum(draws) - 1000 <= most
