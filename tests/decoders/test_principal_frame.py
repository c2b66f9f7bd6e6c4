"""The principal frame of samples that are hard to compute with, of batches, and of data that are no tensor."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_ilvae import principal_frame

KINDS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "loader": lambda x: DataLoader(TensorDataset(x, x[:, 0]), batch_size=700),
    "loader of single data": lambda x: DataLoader(x, batch_size=1),
    "batches": lambda x: list(x.split(999)),
    "generator": lambda x: (batch.numpy() for batch in x.split(37)),
}


def degrees(frame, x):
    """The largest angle between the frame and the leading principal directions, from singular values."""
    flat = x.double().flatten(1)
    exact = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[: frame.shape[1]].mT
    outside = frame.double() - exact @ (exact.mT @ frame.double())
    return float(torch.linalg.svdvals(outside)[0].clamp(max=1).asin().rad2deg())


@pytest.mark.parametrize("scales", [(1e4, 1, 0.1, 0.01, 0.001), (1e6, 1e3, 1, 0.1, 0.01)])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["tensor", "batches"])
def test_directions_of_small_variance_beside_large_ones(scales, offset, dtype, kind):
    axes = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double)).Q
    x = torch.randn(3000, 5, dtype=torch.double) * torch.tensor(scales, dtype=torch.double) @ axes.T + offset
    x = x.to(dtype)
    for latent_dim in (1, 2, 3, 4):
        frame = principal_frame(KINDS[kind](x), latent_dim)
        assert frame.dtype == dtype
        assert degrees(frame, x) < (1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 9, 3000])
def test_batches_and_arrays(kind, count):
    x = torch.randn(count, 2, 3) * torch.tensor([3.0, 2.0, 1.0]) + 4
    frame = principal_frame(KINDS[kind](x), 3)
    assert frame.dtype == torch.float32
    torch.testing.assert_close(frame, principal_frame(x, 3), rtol=0, atol=1e-6)
    assert degrees(frame, x) < 1e-4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_exact(dtype):
    x = (torch.rand(300, 6) * torch.arange(1, 7)).floor().to(dtype)
    frame = principal_frame(x, 3)
    assert frame.dtype == torch.float32
    assert degrees(frame, x) < 1e-4


def test_constant_features_take_no_part():
    x = torch.cat([1e6 + torch.zeros(100, 2), torch.randn(100, 3)], dim=1)
    assert principal_frame(x, 3)[:2].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("x", "latent_dim", "error", "message"),
    [
        (torch.ones(50, 6), 2, ValueError, "Expected x that varies in at least 2 directions, got 0"),
        (torch.eye(6)[[0, 1] * 9], 2, ValueError, "at least 2 directions, got 1"),
        (torch.randn(50, 6), 7, ValueError, "data of at least 7 entries, got 50 of 6"),
        (iter(()), 2, ValueError, "with N > 2 data .* got 0 of 0"),
        ([], 2, ValueError, "Expected x"),
        ([torch.ones(3, 6), torch.ones(3, 5)], 2, ValueError, "Expected x with batches of data of 6 entries"),
        ([torch.randn(5, 6), torch.full((5, 6), float("inf"))], 2, ValueError, "Expected x to be finite"),
        (torch.randn(50, 6).to(torch.complex64), 2, ValueError, "Expected x of shape"),
        (torch.randn(50, 6).to_sparse(), 2, TypeError, "Expected x to be a dense tensor"),
        ("data", 2, TypeError, "Expected x to be"),
        (None, 2, TypeError, "Expected x to be"),
        ({"x": torch.ones(5, 6)}, 2, TypeError, "Expected each batch of x to be"),
        *((torch.randn(50, 6), value, ValueError, "Expected latent_dim") for value in (0, "a", 2.5, True, None)),
    ],
)
def test_refuses(x, latent_dim, error, message):
    with pytest.raises(error, match=message):
        principal_frame(x, latent_dim)


def test_refuses_sparse_matrices():
    from scipy.sparse import csr_matrix

    with pytest.raises(TypeError, match=r"Expected x .*make it dense with \.toarray\(\)"):
        principal_frame(csr_matrix(np.eye(6)), 2)
