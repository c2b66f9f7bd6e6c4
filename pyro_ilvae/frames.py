"""Frames: orthonormal columns that place a K-dimensional map inside the D-dimensional space of natural parameters."""

import math
from collections.abc import Callable
from typing import Self, TypeAlias

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ilvae import _checks


class IdentityFrame(PyroModule):
    """The frame [I; 0], which puts the latent coordinates on the first K of D coordinates.

    Args:
        features: the dimension D.
        latent_dim: the dimension K.
    """

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.features = features
        self.latent_dim = latent_dim

    def add(self, y: Tensor, u: Tensor) -> Tensor:
        """y + Q u of shape (..., D), for ``y`` of shape (..., D) and ``u`` of shape (..., K)."""
        return self.replace(y, self.coordinates(y) + u)

    def replace(self, y: Tensor, u: Tensor) -> Tensor:
        """Q u + (I - Q Q^T) y of shape (..., D): ``y`` with ``u`` in place of its coordinates in the frame."""
        outside = y[..., self.latent_dim :]
        if u.shape[:-1] != y.shape[:-1]:  # weights drawn from a prior bring dimensions of their own
            batch = torch.broadcast_shapes(u.shape[:-1], y.shape[:-1])
            u, outside = u.expand(*batch, -1), outside.expand(*batch, -1)
        return torch.cat([u, outside], dim=-1)

    def coordinates(self, y: Tensor) -> Tensor:
        """Q^T y of shape (..., K), for ``y`` of shape (..., D)."""
        return y[..., : self.latent_dim]

    def fold(self, weight: Tensor) -> Tensor:
        """The product ``weight`` Q of shape (..., K), for ``weight`` of shape (..., D)."""
        return weight[..., : self.latent_dim]


class OrthonormalFrame(PyroModule):
    """A frame Q given by its matrix, which is a buffer: it is saved with the module and never trained.

    Args:
        matrix: Q of shape (D, K), with orthonormal columns.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.features, self.latent_dim = matrix.shape
        # On the device where parameters are made, wherever the data were that the matrix is from.
        device = torch.empty(0).device
        self.register_buffer("matrix", matrix.detach().clone().to(device, torch.get_default_dtype()))

    matrix: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Conversions of dtype and device; what single precision rounded off is orthonormalised in double."""
        before = self.matrix.dtype
        super()._apply(fn, recurse)
        if self.matrix.dtype != before and self.matrix.device.type != "meta":
            self.matrix = _orthonormalise(self.matrix)
        return self

    def add(self, y: Tensor, u: Tensor) -> Tensor:
        """y + Q u of shape (..., D), for ``y`` of shape (..., D) and ``u`` of shape (..., K)."""
        if u.shape[:-1] != y.shape[:-1]:  # weights drawn from a prior bring dimensions of their own
            return y + u @ self.matrix.mT
        # One pass over the D-wide result, in place of a product and a sum.
        flat = torch.addmm(y.reshape(-1, self.features), u.reshape(-1, self.latent_dim), self.matrix.mT)
        return flat.reshape(y.shape)

    def replace(self, y: Tensor, u: Tensor) -> Tensor:
        """Q u + (I - Q Q^T) y of shape (..., D): ``y`` with ``u`` in place of its coordinates in the frame."""
        return self.add(y, u - self.coordinates(y))

    def coordinates(self, y: Tensor) -> Tensor:
        """Q^T y of shape (..., K), for ``y`` of shape (..., D)."""
        return y @ self.matrix

    def fold(self, weight: Tensor) -> Tensor:
        """The product ``weight`` Q of shape (..., K), for ``weight`` of shape (..., D)."""
        return weight @ self.matrix


Frame: TypeAlias = IdentityFrame | OrthonormalFrame


def make_frame(frame: str | Tensor, event_shape: torch.Size, latent_dim: int) -> Frame:
    """The frame that a decoder's ``frame`` argument asks for: "identity", "random", "centred" or a (D, K) tensor."""
    features = event_shape.numel()
    if latent_dim > features:
        raise ValueError(
            f"Expected latent_dim <= {features}, the number of entries of event_shape, got {latent_dim}: a map into "
            "fewer dimensions cannot be inverse Lipschitz"
        )
    if isinstance(frame, Tensor):
        return OrthonormalFrame(_orthonormal(frame, features, latent_dim))
    if frame == "identity":
        return IdentityFrame(features, latent_dim)
    if frame == "random":
        return OrthonormalFrame(torch.linalg.qr(torch.randn(features, latent_dim)).Q)
    if frame == "centred":
        return OrthonormalFrame(_centred(event_shape, latent_dim))
    raise ValueError(
        f"Expected frame to be 'identity', 'random', 'centred' or a ({features}, {latent_dim}) tensor, got {frame!r}"
    )


def centred_matrix(frame: str | Tensor, vocab_size: int, latent_dim: int) -> Tensor:
    """Orthonormal columns of shape (V, K) orthogonal to the all-ones vector: random ones ("centred"), or those given.

    The softmax ignores what a decoder does along that vector, so only the rest counts for the probabilities.
    """
    if isinstance(frame, Tensor):
        matrix = _orthonormal(frame, vocab_size, latent_dim)
        largest_sum = matrix.sum(0).abs().max()
        if not largest_sum <= 1e-4:
            raise ValueError(
                "Expected frame with columns orthogonal to the all-ones vector, got one whose columns sum to up to "
                f"{float(largest_sum):.2g} in absolute value; frame='centred' makes one"
            )
        return _orthonormalise(matrix - matrix.mean(0))
    if frame != "centred":
        raise ValueError(f"Expected frame to be 'centred' or a ({vocab_size}, {latent_dim}) tensor, got {frame!r}")
    return _centred(torch.Size([vocab_size]), latent_dim)


def principal_frame(x: Tensor, latent_dim: int) -> Tensor:
    r"""The leading principal directions of a data sample, the natural frame of a decoder for these data.

    .. math:: \operatorname{argmax}_{Q^\top Q = I} \operatorname{tr}(Q^\top S Q), \qquad
        S = \tfrac{1}{N} \sum_n (x_n - \bar x)(x_n - \bar x)^\top.

    Args:
        x: a data sample of shape (N, \*event_shape), N > ``latent_dim``.
        latent_dim: the number :math:`K` of directions.

    Returns:
        :math:`Q` of shape (D, K), D the number of entries of a datum: orthonormal columns, largest variance first,
        each with its largest entry positive so that the sign is reproducible.

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
    centred = flat - flat.mean(0)
    if len(flat) > flat.shape[1]:
        # Of 60,000 images the scatter matrix is quick to decompose and the data matrix is not.
        directions = (
            torch.linalg.eigh((centred.mT @ centred).double()).eigenvectors.flip(-1)[:, :latent_dim].to(flat.dtype)
        )
    else:
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:latent_dim].mT
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.sign(largest)


def principal_token_frame(x: Tensor, vocab_size: int, latent_dim: int) -> Tensor:
    r"""The directions of logits in which the sequences of a sample differ most: a frame for decoders of sequences.

    .. math:: \operatorname{argmax}_{Q^\top Q = I,\; Q^\top 1 = 0} \operatorname{tr}(Q^\top Y^\top Y Q), \qquad
        y_{nv} = \frac{c_{nv} - \bar c_v}{s_v + s_0},

    with :math:`c_{nv}` the number of times sequence n has token v, :math:`\bar c_v` and :math:`s_v` its mean and
    standard deviation over the sequences, and :math:`s_0` the root mean square of the :math:`s_v`, as for genes in [1].
    Unscaled, the commonest tokens would fill all directions; scaled by s alone, the rarest would, since two that occur
    once, in the same sequence, are perfectly correlated. The counts stay sparse.

    Args:
        x: a sample of tokens, int64 of shape (N, T), padded with -1.
        vocab_size: the number :math:`V` of tokens.
        latent_dim: the number :math:`K` of directions.

    Returns:
        :math:`Q` of shape (V, K): orthonormal columns that sum to 0, largest variance first, each with its largest
        entry positive.

    Raises:
        ValueError: for tokens outside the vocabulary, and a sample whose counts differ in fewer than K directions.

    References:
        [1] Tusher, Tibshirani & Chu 2001, Significance analysis of microarrays applied to the ionizing radiation
        response, https://doi.org/10.1073/pnas.091062498

    Example:
        >>> principal_token_frame(torch.randint(0, 10, (100, 6)), vocab_size=10, latent_dim=2).shape
        torch.Size([10, 2])
    """
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
    counts = scipy.sparse.csr_matrix((ones, (rows.cpu().numpy(), x[rows, columns].cpu().numpy())), (len(x), vocab_size))
    mean = np.asarray(counts.mean(0)).ravel()
    spread = np.sqrt(np.maximum(np.asarray(counts.multiply(counts).mean(0)).ravel() - mean**2, 0.0))
    rank = 0
    if spread.max() > 1e-9:
        scale = spread + np.sqrt(np.square(spread).mean())
        start = np.random.default_rng(0).standard_normal(min(counts.shape))  # fixed, for a reproducible frame
        operator = _centred_operator(counts, mean, scale)
        # Against the size of the counts before their rows were centred, beside which the rest may be rounding.
        smallest = 1e-6 * math.sqrt(len(x)) * np.linalg.norm(spread / scale)
        if np.linalg.norm(operator @ np.random.default_rng(1).standard_normal(vocab_size)) > smallest:
            _, values, vectors = scipy.sparse.linalg.svds(operator, latent_dim, v0=start)
            rank = int((values > smallest).sum())
    if rank < latent_dim:
        raise ValueError(f"Expected x whose counts differ in at least {latent_dim} directions, got {rank}")
    directions = torch.from_numpy(vectors[::-1].T.copy()).to(x.device, torch.get_default_dtype())
    return directions * torch.sign(directions.gather(0, directions.abs().argmax(0, keepdim=True)))


def _centred_operator(
    counts: scipy.sparse.csr_matrix, mean: np.ndarray, scale: np.ndarray
) -> scipy.sparse.linalg.LinearOperator:
    """The counts without column means, scaled, then without row means: a product, as the matrix would be dense."""

    def product(v: np.ndarray) -> np.ndarray:
        scaled = (v.ravel() - v.mean()) / scale
        return np.asarray(counts @ scaled - mean @ scaled)

    def transposed(u: np.ndarray) -> np.ndarray:
        v = (counts.T @ u.ravel() - mean * u.sum()) / scale
        return np.asarray(v - v.mean())

    return scipy.sparse.linalg.LinearOperator(counts.shape, product, transposed, dtype=np.float64)


def _centred(event_shape: torch.Size, latent_dim: int) -> Tensor:
    """Random orthonormal columns without a component along a shift of all categories, the last dimension."""
    features, categories = event_shape.numel(), event_shape[-1]
    largest = features - features // categories
    if latent_dim > largest:
        raise ValueError(
            f"Expected latent_dim <= {largest} with frame='centred', got {latent_dim}: of {tuple(event_shape)} logits, "
            f"so many directions are left when the shift of all {categories} categories is taken out"
        )
    directions = torch.randn(*event_shape, latent_dim)
    directions = directions - directions.mean(-2, keepdim=True)
    return torch.linalg.qr(directions.reshape(features, latent_dim)).Q


def _orthonormal(matrix: Tensor, features: int, latent_dim: int) -> Tensor:
    if matrix.shape != (features, latent_dim):
        raise ValueError(f"Expected frame of shape ({features}, {latent_dim}), got {tuple(matrix.shape)}")
    matrix = matrix.detach().to(torch.get_default_dtype())
    gram = matrix.mT @ matrix
    error = (gram - torch.eye(latent_dim, dtype=gram.dtype, device=gram.device)).abs().max()
    # NaN fails the comparison too.
    if not error <= 1e-4:
        raise ValueError(
            f"Expected frame with orthonormal columns, got one with |Q^T Q - I| up to {float(error):.2g}; "
            "torch.linalg.qr(frame).Q orthonormalises it"
        )
    # A user's rounding up to the tolerance would otherwise enter the constant.
    return _orthonormalise(matrix)


def _orthonormalise(matrix: Tensor) -> Tensor:
    """The orthonormal columns next to the almost orthonormal ones of ``matrix``, up to its own precision."""
    q, r = torch.linalg.qr(matrix.double())
    return (q * torch.sign(r.diagonal())).to(matrix.dtype)
