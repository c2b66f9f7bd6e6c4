"""Binary data from intensities: draws, thresholds, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_ilvae import datasets

shapes = st.lists(st.integers(0, 5), max_size=4)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_have_the_intensities_as_probabilities(dtype):
    x = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.9, 1.0], dtype=dtype)
    count = 20_000
    draws = datasets.binarize(x.expand(count, -1), seed=1)
    assert (draws.shape, draws.dtype) == ((count, 6), dtype)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    error = (x * (1 - x)).double().div(count).sqrt()
    assert ((draws.double().mean(0) - x.double()).abs() <= 5 * error).all()
    # Entries are drawn independently.
    pairs = draws[:, 2:5].double().T.corrcoef().triu(1)
    assert pairs.abs().max() < 5 / math.sqrt(count)


@given(shapes, st.integers(0, 2**31))
def test_draws_by_seed_and_by_the_global_state(shape, seed):
    x = torch.rand(*shape, 40)
    state = torch.get_rng_state()
    seeded = datasets.binarize(x, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    assert seeded.shape == x.shape
    assert torch.equal(datasets.binarize(x, seed=seed), seeded)
    first = datasets.binarize(x)
    torch.set_rng_state(state)
    assert torch.equal(datasets.binarize(x), first)
    if x.numel():
        assert not torch.equal(torch.get_rng_state(), state)


@given(shapes, st.floats(0, 1), st.sampled_from(DTYPES))
def test_threshold_is_the_largest_intensity_that_is_zero(shape, threshold, dtype):
    x = torch.rand(shape, dtype=torch.float64).to(dtype)
    state = torch.get_rng_state()
    binary = datasets.binarize(x, threshold=threshold)
    assert torch.equal(state, torch.get_rng_state())
    assert (binary.shape, binary.dtype) == (x.shape, dtype)
    assert torch.equal(datasets.binarize(binary, threshold=0.5), binary)
    for value, bit in zip(x.flatten().tolist(), binary.flatten().tolist(), strict=True):
        at_value = datasets.binarize(x, threshold=value)
        assert not at_value[x <= value].any()
        assert at_value[x > value].all()
        assert bit == (value > threshold)


def test_binary_data_have_no_gradient_and_leave_the_intensities():
    x = torch.rand(5, requires_grad=True)
    before = x.detach().clone()
    for binary in (datasets.binarize(x), datasets.binarize(x, threshold=0.5)):
        assert not binary.requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.tensor([0.0, value, 1.0]), arguments, r"x in \[0, 1\], got values from")
        for value in (-1e-3, 1.001, 255.0, math.nan, math.inf)
        for arguments in ({}, {"seed": 0}, {"threshold": 0.5})
    ]
    + [
        (torch.rand(3), {"threshold": t}, r"threshold to be a number in \[0, 1\], got")
        for t in (-0.1, 1.1, 127, math.nan)
    ]
    + [(torch.ones(3, dtype=t), {}, f"x to be a floating-point tensor, got {t}") for t in (torch.uint8, torch.bool)]
    + [(torch.rand(3), {"seed": 0, "threshold": 0.5}, r"a seed or a threshold, got seed=0 and threshold=0\.5")],
)
def test_what_binarize_refuses(x, arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        datasets.binarize(x, **arguments)
