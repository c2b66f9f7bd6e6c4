"""Perplexity, bits per dimension and the linear reference: inputs that are converted, and what makes no number."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_ilvae.diagnostics import bits_per_dimension, linear_reference, perplexity

NATS, TOKENS = [-6.0, -2.0, -4.0], [3, 1, 2]
CONVERSIONS = {"tensor": torch.tensor, "list": list, "array": np.array, "column": pd.Series}
NO_NUMBERS = (
    None,
    "abc",
    object(),
    torch.Tensor,
    {0: 1.0},
    [[1.0], [1.0, 2.0]],
    ["a"],
    torch.utils.data.DataLoader([1.0]),
)


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_kinds_of_numbers(convert):
    assert float(perplexity(convert(NATS), convert(TOKENS))) == pytest.approx(math.exp(2.0))
    assert float(perplexity(convert([-6, -2, -4]), convert([3.0, 1.0, 2.0]))) == pytest.approx(math.exp(2.0))
    expected = -torch.tensor(NATS) / 4 / math.log(2)
    torch.testing.assert_close(bits_per_dimension(convert(NATS), 4), expected, check_dtype=False)
    torch.testing.assert_close(bits_per_dimension(convert([-6, -2, -4]), np.int64(4)), expected, check_dtype=False)


def test_a_sum_beyond_its_precision_and_a_single_number():
    found = perplexity(torch.full((1000,), -100.0, dtype=torch.float16), torch.full((1000,), 50))
    assert found.dtype == torch.float16
    assert float(found) == pytest.approx(math.exp(2.0), rel=1e-3)
    assert float(bits_per_dimension(-math.log(2.0), 1)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("nats", "tokens", "message"),
    [
        (NATS, [3, 1], r"num_tokens of the shape \(3,\) of log_likelihood, got \(2,\)"),
        (NATS, 6, "num_tokens"),
        ([], [], "num_tokens >= 0 with a positive sum, got none"),
        (NATS, [0, 0, 0], "num_tokens >= 0 with a positive sum, got the smallest 0"),
        ([-3.0, -4.0], [0, 4], "num_tokens of at least 1 where log_likelihood is not 0, got 0 tokens and -3 nats"),
        ([-3.0, -math.inf], [4, 0], "num_tokens of at least 1 .* -inf nats for datum 1"),
        (NATS, [4, -1, 3], "num_tokens >= 0 with a positive sum, got the smallest -1"),
        (NATS, [2.5, 1, 2], "num_tokens to be integers, got 2.5"),
        (NATS, [math.nan, 1, 2], "num_tokens to be integers, got nan"),
        ([math.nan, -1, -1], TOKENS, "log_likelihood to be log probabilities of tokens, got nan"),
        ([math.inf, -1, -1], TOKENS, "log_likelihood to be log probabilities of tokens, got inf"),
        ([6.0, 2.0, 4.0], TOKENS, "log_likelihood to be log probabilities of tokens, got 2.0 nats per token"),
        (torch.tensor(NATS) * 1j, TOKENS, "log_likelihood to be real"),
    ],
)
def test_what_has_no_perplexity(nats, tokens, message):
    with pytest.raises((ValueError, TypeError), match=f"Expected {message}"):
        perplexity(nats, tokens)


def test_log_likelihoods_at_their_ends():
    assert float(perplexity([0.0, 0.0], [1, 2])) == 1.0
    assert float(perplexity([0.0, -2.0], [0, 2])) == pytest.approx(math.e)
    assert float(perplexity([1e-3, -5e-4], [1, 2])) == pytest.approx(1.0, abs=1e-3)  # an estimate
    assert float(perplexity([-math.inf, -1.0], [1, 2])) == math.inf
    assert float(bits_per_dimension(torch.tensor(-math.inf), 2)) == math.inf
    assert float(bits_per_dimension(torch.tensor(2.0), 2)) < 0  # a density


@pytest.mark.parametrize("size", [0, -1, 2.5, "a", None, (28, 28), True])
def test_dimensions_are_counted(size):
    with pytest.raises(ValueError, match="Expected num_dimensions to be an int >= 1"):
        bits_per_dimension(torch.tensor(NATS), size)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bits_of_no_number(value):
    with pytest.raises(ValueError, match="Expected log_likelihood < infinity, got"):
        bits_per_dimension(torch.tensor([-1.0, value]), 2)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_what_is_no_tensor(value):
    for name, call in {
        "log_likelihood": lambda: perplexity(value, TOKENS),
        "num_tokens": lambda: perplexity(NATS, value),
        "x": lambda: linear_reference(value, 1.0),
    }.items():
        with pytest.raises(
            TypeError, match=f"Expected {name} to be a tensor, an array or nested lists of numbers, got"
        ):
            call()
    with pytest.raises(TypeError, match="Expected log_likelihood to be a tensor, an array"):
        bits_per_dimension(value, 2)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.numpy(force=True),
        lambda x: pd.DataFrame(x.tolist()),
        torch.Tensor.tolist,
        lambda x: pd.DataFrame(x.numpy(force=True).astype(np.float32)),
    ],
)
def test_data_of_other_kinds_have_the_reference_of_tensors(convert):
    x = torch.randn(20, 3, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)  # one is constant
    expected, found = linear_reference(x, 0.5), linear_reference(convert(x), 0.5)
    torch.testing.assert_close(found.variances.double(), expected.variances, rtol=1e-5, atol=1e-6)
    assert found.collapsed.tolist() == expected.collapsed.tolist()
    assert found.collapsed[-1]
    assert found.kl[-1] == 0


def test_fewer_data_than_directions():
    x = torch.randn(3, 8)
    found = linear_reference(x, 1e-3)
    assert found.variances.shape == (8,)
    assert (found.variances[:2] > 0).all()
    torch.testing.assert_close(found.variances[2:], torch.zeros(6), atol=1e-6, rtol=0)
    assert (~found.collapsed).sum() == 2  # N data span N - 1 directions
    assert linear_reference(x, 1e-3, latent_dim=2).num_collapsed == 0


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(1, 3), {}, r"x of shape \(N, \*event_shape\) with N >= 2"),
        (torch.randn(5, 3) * 1j, {}, "x to be real"),
        (torch.full((5, 3), math.nan), {}, "x to be finite"),
        ([[1.0, math.inf], [0.0, 0.0]], {}, "x to be finite"),
        (torch.tensor([[1e200], [-1e200]], dtype=torch.float64), {}, "variances of x to be finite"),
        (torch.randn(5, 3), {"noise_scale": "a"}, "noise_scale to be a finite number > 0"),
        (torch.randn(5, 3), {"noise_scale": torch.ones(3)}, "noise_scale to be a finite number > 0"),
        (torch.randn(5, 3), {"latent_dim": 2.0}, "latent_dim to be an int >= 1"),
        (torch.randn(5, 3), {"nats": "a"}, "nats to be a finite number >= 0"),
        (torch.randn(5, 3), {"inverse_lipschitz": math.nan}, "inverse_lipschitz to be a finite number >= 0"),
    ],
)
def test_what_has_no_linear_reference(x, options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        linear_reference(x, **{"noise_scale": 1.0, **options})
