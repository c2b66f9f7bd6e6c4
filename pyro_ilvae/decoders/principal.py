"""Frames from data: the leading principal directions of a sample, or of its token counts."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.decoders.frames import centered

__all__ = ["principal_frame", "principal_token_frame"]


def principal_frame(x: Any, latent_dim: int) -> Tensor:
    r"""The leading principal directions of a data sample, the natural frame of a decoder for these data.

    .. math:: \operatorname{argmax}_{Q^\top Q = I} \operatorname{tr}(Q^\top S Q), \qquad
        S = \tfrac{1}{N} \sum_n (x_n - \bar x)(x_n - \bar x)^\top.

    They are computed in double precision, from a triangular factor of the centered data and not from S, in which the
    square of a small variation would be lost beside the square of a large one. Memory beyond ``x`` is of the order
    :math:`D^2`, whatever N is.

    Args:
        x: a data sample of shape (N, \*event_shape), N > ``latent_dim``, as a tensor, an array or a data frame; or an
            iterable of batches of such data, as a ``DataLoader`` is; a batch may be a tuple that begins with them.
        latent_dim: the number :math:`K` of directions.

    Returns:
        :math:`Q` of shape (D, K), D the number of entries of a datum: orthonormal columns, largest variance first. The
        largest entry of each column is positive, so that the sign is reproducible. It has the dtype of data in single
        or double precision, and the default dtype for others.

    Raises:
        TypeError: if ``x`` is neither data nor an iterable of batches.
        ValueError: if ``x`` has too few data or dimensions, varies in fewer than K directions, or is not finite.

    Example:
        >>> x = torch.randn(1000, 5) * torch.tensor([0.1, 3.0, 0.1, 2.0, 0.1])
        >>> principal_frame(x, latent_dim=2).abs().round().int().T.tolist()
        [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    """
    latent_dim = _checks.positive_int("latent_dim", latent_dim)
    moments = Moments()
    dtype = torch.get_default_dtype()
    for batch in batches_of(x):
        moments.add(batch)
        dtype = batch.dtype if batch.dtype in (torch.float32, torch.float64) else torch.get_default_dtype()
    features = 0 if moments.total == 0 else len(moments.mean)
    if moments.total <= latent_dim or features < latent_dim:
        raise ValueError(
            f"Expected x of shape (N, *event_shape) with N > {latent_dim} data of at least {latent_dim} entries, "
            f"got {moments.total} of {features} for latent_dim = {latent_dim}"
        )
    directions = moments.directions(latent_dim)
    if directions.shape[1] < latent_dim:
        raise ValueError(f"Expected x that varies in at least {latent_dim} directions, got {directions.shape[1]}")
    return directions.to(dtype)


class Moments:
    """Mean and covariance of data that come in batches, in double precision, the covariance by a triangular factor.

    Memory is of the order D^2, whatever the number of data is.
    """

    def __init__(self) -> None:
        self.total = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._rows: list[Tensor] = []

    def add(self, batch: Tensor) -> None:
        """Take in a batch of shape (N, \\*event_shape)."""
        flat = batch.detach().flatten(1).double()
        if self.total and flat.shape[1:] != self.mean.shape:
            raise ValueError(f"Expected x with batches of data of {len(self.mean)} entries, got {tuple(batch.shape)}")
        if not flat.isfinite().all():
            raise ValueError("Expected x to be finite, got NaN or infinity")
        if len(flat) == 0:
            return
        mean_of_batch = flat.mean(0)
        step = mean_of_batch - self.mean if self.total else torch.zeros_like(mean_of_batch)
        share = len(flat) / (self.total + len(flat))
        # The last row is what the means of the data so far and of this batch add to N S.
        self._rows += [flat - mean_of_batch, math.sqrt(self.total * share) * step[None]]
        self.mean = self.mean + share * step if self.total else mean_of_batch
        self.total += len(flat)
        if sum(map(len, self._rows)) > _most_rows(len(self.mean)):
            self._rows = [torch.linalg.qr(torch.cat(self._rows), mode="r").R]

    def directions(self, num_directions: int, scales: Tensor | None = None, num_categories: int = 0) -> Tensor:
        """The leading principal directions, at most so many and at most the rank, of shape (D, K).

        Those of the data divided by ``scales`` of shape (D,), if they are given, and without their mean over each set
        of categories, if there are any.
        """
        rows, mean = torch.cat(self._rows), self.mean
        if scales is not None:
            rows, mean = rows / scales.to(rows), mean / scales.to(mean)
        rows = centered(rows.mT, num_categories).mT
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        eps = torch.finfo(torch.float64).eps
        # The mean is rounded, which gives equal data a variation of that size.
        of_mean = 4 * math.sqrt(self.total) * float(mean.norm())
        rank = int((values > eps * max(float(values[0]) * max(self.total, len(self.mean)), of_mean)).sum())
        return _signed(vectors[: min(num_directions, rank)].mT)

    def variances(self, columns: Tensor) -> Tensor:
        """The variances of the data times vectors, the columns of shape (D, K)."""
        return (torch.cat(self._rows) @ columns.to(self.mean)).square().sum(0) / self.total


def batches_of(x: Any, shape: torch.Size | None = None, features: int | None = None) -> Iterator[Tensor]:
    """The data in pieces of bounded size: of a whole sample, or of the batches of an iterable.

    Args:
        x: the data.
        shape: the shape of a datum; any of at least one dimension if None.
        features: how many numbers a datum is; as many as it has entries if None.
    """
    event_dim = 1 if shape is None else len(shape)
    parts = [x]
    if _is_iterable_of_batches(x, event_dim):
        parts = (batch[0] if isinstance(batch, list | tuple) and len(batch) > 0 else batch for batch in x)  # type: ignore[assignment]
    name = "x" if isinstance(parts, list) else "each batch of x"
    for part in parts:
        batch = _sample(name, part, event_dim)
        if shape is not None and batch.shape[1:] != shape:
            expected = ", ".join(["N", *map(str, shape)])
            raise ValueError(f"Expected {name} of shape ({expected}), got {tuple(batch.shape)}")
        yield from batch.split(_most_rows(math.prod(batch.shape[1:]) if features is None else features))


def _sample(name: str, x: Any, event_dim: int) -> Tensor:
    x = _checks.tensor(name, x)
    if x.dim() < 1 + event_dim or x.is_complex():
        raise ValueError(f"Expected {name} of shape (N, *event_shape), real, got {tuple(x.shape)}, {x.dtype}")
    return x


def _most_rows(features: int) -> int:
    """How many rows are taken at once: more are quicker, and they take memory."""
    return max(2 * features, min(8 * features, 2**23 // max(features, 1)), 1)


def _is_iterable_of_batches(x: Any, event_dim: int = 1) -> bool:
    if isinstance(x, list | tuple):
        first = x[0] if len(x) > 0 else None
        first = first[0] if isinstance(first, list | tuple) and len(first) > 0 else first
        return getattr(first, "ndim", 0) >= 1 + event_dim
    # Tensors, arrays and data frames have __array__; sparse matrices and strings are refused as they are.
    return hasattr(x, "__iter__") and not (
        hasattr(x, "__array__") or hasattr(x, "toarray") or isinstance(x, str | bytes)
    )


def _signed(directions: Tensor) -> Tensor:
    """The columns with their largest entries positive."""
    return directions * torch.sign(directions.gather(0, directions.abs().argmax(0, keepdim=True)))


def principal_token_frame(x: Any, *, vocab_size: int, latent_dim: int) -> Tensor:
    r"""The directions of logits in which the sequences of a sample differ most: a frame for decoders of sequences.

    .. math:: \operatorname{argmax}_{Q^\top Q = I,\; Q^\top 1 = 0} \operatorname{tr}(Q^\top Y^\top Y Q), \qquad
        y_{nv} = \frac{c_{nv} - \bar c_v}{s_v + s_0},

    with :math:`c_{nv}` the number of times that sequence n has token v, :math:`\bar c_v` and :math:`s_v` its mean and
    standard deviation over the sequences, and :math:`s_0` the root mean square of the :math:`s_v`, as for genes in [1].
    Without a scale the commonest tokens would fill all directions. Scaled by :math:`s_v` alone the rarest tokens would:
    two tokens that occur once, in the same sequence, are perfectly correlated. The counts stay sparse.

    Args:
        x: a sample of tokens, int64 of shape (N, T), padded with -1, or an iterable of batches, whose T may differ.
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
    vocab_size = _checks.positive_int("vocab_size", vocab_size)
    latent_dim = _checks.positive_int("latent_dim", latent_dim)
    counts = TokenCounts(x, vocab_size)
    if latent_dim >= min(counts.num_sequences, vocab_size):
        raise ValueError(
            f"Expected latent_dim < {min(counts.num_sequences, vocab_size)}, the smaller of the numbers of sequences "
            f"and tokens, got {latent_dim}"
        )
    directions = counts.directions(latent_dim)
    if directions.shape[1] < latent_dim:
        raise ValueError(
            f"Expected x whose counts differ in at least {latent_dim} directions, got {directions.shape[1]}"
        )
    return directions


class TokenCounts:
    """How often each sequence of a sample or of its batches has each token, as a sparse matrix."""

    def __init__(self, x: Any, vocab_size: int) -> None:
        # Here, because importing SciPy's sparse matrices takes a tenth of a second.
        from scipy.sparse import csr_matrix, vstack

        parts = []
        if not _is_iterable_of_batches(x):
            x = _checks.tensor("x", x)
            _check_tokens(x, vocab_size)
        for batch in batches_of(x):
            _check_tokens(batch, vocab_size)
            rows, columns = (batch >= 0).nonzero(as_tuple=True)
            tokens = batch[rows, columns].cpu().numpy()
            parts.append(csr_matrix((np.ones(len(rows)), (rows.cpu().numpy(), tokens)), (len(batch), vocab_size)))
            self.device = batch.device
        self.matrix = vstack(parts, "csr") if parts else csr_matrix((0, vocab_size))

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return int(self.matrix.shape[0])

    def totals(self) -> Tensor:
        """How often each token occurs, of shape (V,)."""
        return torch.from_numpy(np.asarray(self.matrix.sum(0)).ravel())

    def directions(self, num_directions: int) -> Tensor:
        """The leading directions, at most so many and at most as many as the counts differ in, of shape (V, K)."""
        from scipy.sparse.linalg import svds

        counts = self.matrix
        num_directions = min(num_directions, min(counts.shape) - 1)
        mean = np.asarray(counts.mean(0)).ravel()
        spread = np.sqrt(np.maximum(np.asarray(counts.multiply(counts).mean(0)).ravel() - mean**2, 0.0))
        vectors, rank = np.zeros((0, counts.shape[1])), 0
        if num_directions > 0 and spread.max() > 1e-9:
            scale = spread + np.sqrt(np.square(spread).mean())
            start = np.random.default_rng(0).standard_normal(min(counts.shape))  # fixed, for a reproducible frame
            operator = _centered_operator(counts, mean, scale)
            # Relative to the counts before their rows were centered: what is left may be rounding beside them.
            smallest = 1e-6 * math.sqrt(counts.shape[0]) * np.linalg.norm(spread / scale)
            if np.linalg.norm(operator @ np.random.default_rng(1).standard_normal(counts.shape[1])) > smallest:
                _, values, vectors = svds(operator, num_directions, v0=start)
                rank = int((values > smallest).sum())
        # The iteration leaves vectors of small singular values only roughly orthogonal.
        found = torch.linalg.qr(torch.from_numpy(vectors[::-1][:rank].T.copy())).Q
        return _signed(found).to(self.device, torch.get_default_dtype())


def _check_tokens(x: Tensor, vocab_size: int) -> None:
    if (
        x.dim() != 2
        or x.is_floating_point()
        or x.is_complex()
        or (x.numel() and not -1 <= int(x.min()) <= int(x.max()) < vocab_size)
    ):
        raise ValueError(f"Expected x of shape (N, T) with tokens below {vocab_size}, got {x.dtype}, {tuple(x.shape)}")


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
