"""Assertions about Monte Carlo estimates and their standard errors."""

import torch


def assert_within(estimate, exact, errors, rtol=1e-4, atol=1e-5):
    """An estimate is within 5 standard errors of the exact value, up to rounding."""
    exact = torch.as_tensor(exact, dtype=estimate.dtype)
    assert estimate.shape == exact.shape
    assert errors.shape == exact.shape
    assert ((estimate - exact).abs() <= 5 * errors + rtol * exact.abs() + atol).all(), (estimate, exact, errors)


def compared(result, exact):
    """The arguments of :func:`assert_within` for divergences."""
    return result.values, exact, result.standard_errors


def assert_errors_are_right(call, repeats=60, tolerance=0.2):
    """The stated standard errors are the spread of the estimates over repeats."""
    estimates, errors = zip(*(call(seed) for seed in range(repeats)), strict=True)
    spread = torch.stack(estimates).var(0).mean().sqrt()
    stated = torch.stack(errors).square().mean().sqrt()
    assert stated > 0
    assert abs(float(stated / spread) - 1) < tolerance, (stated, spread)


def within(estimate, exact, errors, sigmas=5.0, slack=1e-4):
    """Whether an estimate is where its own standard error says."""
    assert estimate.shape == exact.shape
    assert ((estimate - exact).abs() <= sigmas * errors + slack * (1 + exact.abs())).all(), (estimate, exact, errors)


def assert_near(value, se, expected, floor=1e-5):
    """A number is within 5 standard errors of the expected value, up to rounding."""
    assert abs(value - expected) <= 5 * se + floor, (value, se, expected)
