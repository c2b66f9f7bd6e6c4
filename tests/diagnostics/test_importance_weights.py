"""Pareto-smoothed weights and their tails."""

import math

import pytest
import torch

from pyro_ilvae.diagnostics._engine.importance import smoothed_weights


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_weights_know_their_tail(k):
    log_weights = k * torch.distributions.Exponential(1.0).sample((20000, 5))  # of a Pareto distribution of this shape
    weights = smoothed_weights(log_weights)
    torch.testing.assert_close(weights.values.sum(0), torch.ones(5), rtol=1e-4, atol=0)
    assert ((weights.pareto_k - k).abs() < 0.25).all()


def test_weights_without_a_tail():
    equal = smoothed_weights(torch.full((100, 2), -1000.0))
    assert (equal.pareto_k == -math.inf).all()
    torch.testing.assert_close(equal.values, torch.full((100, 2), 0.01))
    assert smoothed_weights(torch.randn(29, 2)).pareto_k.isnan().all()
    assert smoothed_weights(torch.randn(30, 2)).pareto_k.isfinite().all()
    few = torch.full((100, 1), -math.inf)
    few[:3] = torch.tensor([[0.0], [-1.0], [-2.0]])
    weights = smoothed_weights(few)
    assert weights.pareto_k.tolist() == [math.inf]
    assert weights.values.isfinite().all()
