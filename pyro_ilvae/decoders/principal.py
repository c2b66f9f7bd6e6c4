"""Frames from data: the leading principal directions of a sample, or of its token counts."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ilvae import _checks

__all__ = ["principal_frame", "principal_token_frame"]


def principal_frame(x: Tensor, latent_dim: int) -> Tensor:
    r"""The leading principal directions of a data sample, the natural frame of a decoder for these data.

    .. math:: \operatorname{argmax}_{Q^\top Q = I} \operatorname{tr}(Q^\top S Q), \qquad
        S = \tfrac{1}{N} \sum_n (x_n - \bar x)(x_n - \bar x)^\top.

    Args:
        x: a data sample of shape (N, \*event_shape), N > ``latent_dim``.
        latent_dim: the number :math:`K` of directions.

    Returns:
        :math:`Q` of shape (D, K), D the number of entries of a datum: orthonormal columns, largest variance first. The
        largest entry of each column is positive, so that the sign is reproducible.

    Raises:
        ValueError: if ``x`` has too few data or dimensions, or is not finite.

    Example:
        >>> x = torch.randn(1000, 5) * torch.tensor([0.1, 3.0, 0.1, 2.0, 0.1])
        >>> principal_frame(x, latent_dim=2).abs().round().int().T.tolist()
        [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    """
    _checks.positive_int("latent_dim", latent_dim)
    if x.dim() < 2 or x.shape[0] <= latent_dim or x[0].numel() < latent_dim:
        raise ValueError(
            f"Expected x of shape (N, *event_shape) with N > {latent_dim} data of at least {latent_dim} entries, "
            f"got {tuple(x.shape)}"
        )
    flat = x.reshape(len(x), -1)
    if not flat.is_floating_point():
        flat = flat.to(torch.get_default_dtype())
    if not flat.isfinite().all():
        raise ValueError("Expected x to be finite, got NaN or infinity")
    centered = flat - flat.mean(0)
    if len(flat) > flat.shape[1]:
        # For 60,000 images the scatter matrix is quick to decompose, and the data matrix is slow.
        directions = (
            torch.linalg.eigh((centered.mT @ centered).double()).eigenvectors.flip(-1)[:, :latent_dim].to(flat.dtype)
        )
    else:
        directions = torch.linalg.svd(centered, full_matrices=False).Vh[:latent_dim].mT
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.sign(largest)


def principal_token_frame(x: Tensor, *, vocab_size: int, latent_dim: int) -> Tensor:
    r"""The directions of logits in which the sequences of a sample differ most: a frame for decoders of sequences.

    .. math:: \operatorname{argmax}_{Q^\top Q = I,\; Q^\top 1 = 0} \operatorname{tr}(Q^\top Y^\top Y Q), \qquad
        y_{nv} = \frac{c_{nv} - \bar c_v}{s_v + s_0},

    with :math:`c_{nv}` the number of times that sequence n has token v, :math:`\bar c_v` and :math:`s_v` its mean and
    standard deviation over the sequences, and :math:`s_0` the root mean square of the :math:`s_v`, as for genes in [1].
    Without a scale the commonest tokens would fill all directions. Scaled by :math:`s_v` alone the rarest tokens would:
    two tokens that occur once, in the same sequence, are perfectly correlated. The counts stay sparse.

    Args:
        x: a sample of tokens, int64 of shape (N, T), padded with -1.
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the number :math:`K` of directions.

    Returns:
        :math:`Q` of shape (V, K): orthonormal columns that sum to 0, largest variance first. The largest entry of each
        column is positive.

    Raises:
        ValueError: for tokens outside the vocabulary, and a sample whose counts differ in fewer than K directions.

    References:
        [1] Tusher, Tibshirani & Chu 2001, Significance analysis of microarrays applied to the ionizing radiation
        response, https://doi.org/10.1073/pnas.091062498

    Example:
        >>> principal_token_frame(torch.randint(0, 10, (100, 6)), vocab_size=10, latent_dim=2).shape
        torch.Size([10, 2])
    """
    # Here, because importing SciPy's sparse matrices takes a tenth of a second.
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    _checks.positive_int("vocab_size", vocab_size)
    _checks.positive_int("latent_dim", latent_dim)
    if x.dim() != 2 or x.is_floating_point() or (x.numel() and not -1 <= int(x.min()) <= int(x.max()) < vocab_size):
        raise ValueError(f"Expected x of shape (N, T) with tokens below {vocab_size}, got {x.dtype}, {tuple(x.shape)}")
    if latent_dim >= min(len(x), vocab_size):
        raise ValueError(
            f"Expected latent_dim < {min(len(x), vocab_size)}, the smaller of the numbers of sequences and tokens, "
            f"got {latent_dim}"
        )
    rows, columns = (x >= 0).nonzero(as_tuple=True)
    ones = np.ones(len(rows))
    counts = csr_matrix((ones, (rows.cpu().numpy(), x[rows, columns].cpu().numpy())), (len(x), vocab_size))
    mean = np.asarray(counts.mean(0)).ravel()
    spread = np.sqrt(np.maximum(np.asarray(counts.multiply(counts).mean(0)).ravel() - mean**2, 0.0))
    rank = 0
    if spread.max() > 1e-9:
        scale = spread + np.sqrt(np.square(spread).mean())
        start = np.random.default_rng(0).standard_normal(min(counts.shape))  # fixed, for a reproducible frame
        operator = _centered_operator(counts, mean, scale)
        # Relative to the counts before their rows were centered: what is left may be rounding beside them.
        smallest = 1e-6 * math.sqrt(len(x)) * np.linalg.norm(spread / scale)
        if np.linalg.norm(operator @ np.random.default_rng(1).standard_normal(vocab_size)) > smallest:
            _, values, vectors = svds(operator, latent_dim, v0=start)
            rank = int((values > smallest).sum())
    if rank < latent_dim:
        raise ValueError(f"Expected x whose counts differ in at least {latent_dim} directions, got {rank}")
    directions = torch.from_numpy(vectors[::-1].T.copy()).to(x.device, torch.get_default_dtype())
    return directions * torch.sign(directions.gather(0, directions.abs().argmax(0, keepdim=True)))


def _centered_operator(counts: Any, mean: np.ndarray, scale: np.ndarray) -> Any:
    """The counts without column means, scaled, then without row means, as a product: the matrix would be dense."""
    from scipy.sparse.linalg import LinearOperator

    def product(v: np.ndarray) -> np.ndarray:
        scaled = (v.ravel() - v.mean()) / scale
        return np.asarray(counts @ scaled - mean @ scaled)

    def transposed(u: np.ndarray) -> np.ndarray:
        v = (counts.T @ u.ravel() - mean * u.sum()) / scale
        return np.asarray(v - v.mean())

    return LinearOperator(counts.shape, product, transposed, dtype=np.float64)
