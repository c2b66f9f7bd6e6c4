"""Frames: orthonormal columns that place a K-dimensional map in the D-dimensional space of natural parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeAlias

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae.decoders.arguments import without_autocast

__all__ = ["Frame", "IdentityFrame", "MatrixFrame", "OrthonormalFrame", "TrainedFrame"]

SPEED = 0.125  # entries of a trained frame's free matrix at the start, as a root mean square


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

    def extra_repr(self) -> str:
        """The shape, for ``print``."""
        return f"{self.features} x {self.latent_dim}"

    def add(self, y: Tensor, u: Tensor) -> Tensor:
        """y + Q u of shape (..., D), for ``y`` of shape (..., D) and ``u`` of shape (..., K)."""
        return self.replace(y, self.coordinates(y) + u)

    def replace(self, y: Tensor, u: Tensor) -> Tensor:
        """Q u + (I - Q Q^T) y of shape (..., D): ``y`` with ``u`` in place of its coordinates in the frame."""
        outside = y[..., self.latent_dim :]
        if u.shape[:-1] != y.shape[:-1]:  # a context, or weights drawn from a prior, may have more dimensions
            batch = torch.broadcast_shapes(u.shape[:-1], y.shape[:-1])
            u, outside = u.expand(*batch, -1), outside.expand(*batch, -1)
        return torch.cat([u, outside], dim=-1)

    def fixed(self) -> "IdentityFrame":
        """The frame as it is now."""
        return self

    def embed(self, u: Tensor) -> Tensor:
        """Q u of shape (..., D), for ``u`` of shape (..., K)."""
        return F.pad(u, (0, self.features - self.latent_dim))

    def coordinates(self, y: Tensor) -> Tensor:
        """Q^T y of shape (..., K), for ``y`` of shape (..., D)."""
        return y[..., : self.latent_dim]

    def fold(self, weight: Tensor) -> Tensor:
        """The product ``weight`` Q of shape (..., K), for ``weight`` of shape (..., D)."""
        return weight[..., : self.latent_dim]


class MatrixFrame:
    """A frame Q given by its matrix.

    Args:
        matrix: Q of shape (D, K), with orthonormal columns.
    """

    matrix: Tensor
    features: int
    latent_dim: int

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.features, self.latent_dim = matrix.shape[-2:]

    def add(self, y: Tensor, u: Tensor) -> Tensor:
        """y + Q u of shape (..., D), for ``y`` of shape (..., D) and ``u`` of shape (..., K)."""
        if u.shape[:-1] != y.shape[:-1] or self.matrix.dim() > 2:
            return y + self.embed(u)  # a context, or what is drawn from a prior, may have more dimensions
        # One pass over the D-wide result instead of a product and a sum.
        flat = torch.addmm(y.reshape(-1, self.features), u.reshape(-1, self.latent_dim), self.matrix.mT)
        return flat.reshape(y.shape)

    def replace(self, y: Tensor, u: Tensor) -> Tensor:
        """Q u + (I - Q Q^T) y of shape (..., D): ``y`` with ``u`` in place of its coordinates in the frame."""
        eta = self.add(y, u - self.coordinates(y))
        if self.features <= 4 * self.latent_dim:
            # Much of y lies inside of the frame, and rounding of it is left there. The correction is 0 but for that.
            with torch.no_grad():
                rounded = self.embed(u - self.coordinates(eta))
            eta = eta + rounded
        return eta

    def fixed(self) -> "MatrixFrame":
        """The frame as it is now, its matrix computed once."""
        return self

    def embed(self, u: Tensor) -> Tensor:
        """Q u of shape (..., D), for ``u`` of shape (..., K)."""
        return _product(u, self.matrix.mT)

    def coordinates(self, y: Tensor) -> Tensor:
        """Q^T y of shape (..., K), for ``y`` of shape (..., D)."""
        return _product(y, self.matrix)

    def fold(self, weight: Tensor) -> Tensor:
        """The product ``weight`` Q of shape (..., K), for ``weight`` of shape (..., D)."""
        return weight @ self.matrix


class OrthonormalFrame(MatrixFrame, PyroModule):
    """A frame Q given by its matrix, a buffer: it is saved with the module and never trained.

    A matrix of a state dict has to be orthonormal too, or the constant of the decoder would not hold: to 1e-5, or to
    the rounding of half precision if the matrix or the module is of that precision. With ``num_categories``, because a
    softmax follows, it has to be orthogonal to a shift of all categories as well.

    Args:
        matrix: Q of shape (D, K), with orthonormal columns.
        num_categories: the number of categories, of which the D coordinates hold one or more sets; 0 without a softmax.
    """

    def __init__(self, matrix: Tensor, num_categories: int = 0) -> None:
        PyroModule.__init__(self)
        self.num_categories = num_categories
        self.features, self.latent_dim = matrix.shape
        # On the device where parameters are made, which need not be the device of the data behind the matrix.
        device = torch.empty(0).device
        self.register_buffer("matrix", matrix.detach().clone().to(device, torch.get_default_dtype()))

    matrix: Tensor

    def extra_repr(self) -> str:
        """The shape, for ``print``."""
        return f"{self.features} x {self.latent_dim}"

    @torch.no_grad()
    def turn(self, matrix: Tensor) -> None:
        """Take the columns of another matrix in place of its own, orthonormalized in double precision."""
        self.matrix.copy_(orthonormalize(matrix.double(), self.num_categories))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert dtype and device; a matrix whose dtype changes is orthonormalized again, in double precision."""
        before = self.matrix.dtype
        super()._apply(fn, recurse)
        if self.matrix.dtype != before and self.matrix.device.type != "meta":
            self.matrix = orthonormalize(self.matrix, self.num_categories)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *others: Any
    ) -> None:
        key = f"{prefix}matrix"
        loaded = state_dict.get(key)
        if isinstance(loaded, Tensor) and loaded.shape == self.matrix.shape and loaded.device.type != "meta":
            assigned = local_metadata.get("assign_to_params_buffers", False)
            self._check_loaded(key, loaded, loaded.dtype if assigned else self.matrix.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
        if isinstance(loaded, Tensor) and self.matrix.dtype != loaded.dtype and self.matrix.device.type != "meta":
            with torch.no_grad():  # the rounding of the other precision would stay in the constant
                self.matrix.copy_(orthonormalize(self.matrix, self.num_categories))

    def _check_loaded(self, key: str, loaded: Tensor, dtype: torch.dtype) -> None:
        dtypes = [dtype for dtype in (dtype, loaded.dtype) if dtype.is_floating_point]
        rounding = 2 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        error = deviation(loaded)
        if not error <= max(1e-5, rounding):
            raise ValueError(
                f"Expected {key} with orthonormal columns, got a matrix with |Q^T Q - I| up to {error:.2g}, for which "
                "the inverse Lipschitz constant does not hold"
            )
        if not self.num_categories:
            return
        largest_sum = float(_sums(loaded, self.num_categories).abs().max())
        if not largest_sum <= max(1e-4, rounding):
            raise ValueError(
                f"Expected {key} with columns orthogonal to the all-ones vector of each set of {self.num_categories} "
                f"categories, got columns that sum to up to {largest_sum:.2g} in absolute value"
            )


class TrainedFrame(MatrixFrame, PyroModule):
    r"""A frame that is trained: the orthonormal factor of a free matrix.

    .. math:: Q R = A, \qquad Q^\top Q = I, \qquad R_{jj} > 0,

    so the columns of Q are orthonormal for every value of A. With ``num_categories``, the columns of A lose their mean
    over each set of categories first, so that Q has no share in a shift of all of them.

    Args:
        matrix: the value Q at the start, of shape (D, K), with orthonormal columns.
        num_categories: as for :class:`OrthonormalFrame`.
    """

    def __init__(self, matrix: Tensor, num_categories: int = 0) -> None:
        PyroModule.__init__(self)
        self.num_categories = num_categories
        self.features, self.latent_dim = matrix.shape
        self.free_matrix = nn.Parameter(torch.empty(self.features, self.latent_dim))
        self.turn(matrix)

    def extra_repr(self) -> str:
        """The shape, for ``print``."""
        return f"{self.features} x {self.latent_dim}"

    @property
    def matrix(self) -> Tensor:  # type: ignore[override]
        """Q of shape (D, K); each read computes it."""
        columns = centered(self.free_matrix, self.num_categories)
        with without_autocast(columns.device.type):
            q, r = torch.linalg.qr(columns.to(torch.promote_types(columns.dtype, torch.float32)))
            signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
            return (q * signs.unsqueeze(-2).to(q.dtype)).to(columns.dtype)

    def fixed(self) -> MatrixFrame:
        """The frame as it is now, its matrix computed once."""
        return MatrixFrame(self.matrix)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        key = f"{prefix}free_matrix"
        loaded = state_dict.get(key)
        if isinstance(loaded, Tensor) and loaded.shape == (self.features, self.latent_dim) and not loaded.is_meta:
            # Columns that depend on each other have no orthonormal factor of their own, and no gradient.
            largest = loaded.abs().max().double()
            values = (
                torch.linalg.svdvals(centered(loaded.double(), self.num_categories))
                if largest.isfinite()
                else largest[None]
            )
            if not (values.min() > torch.finfo(torch.float32).eps * largest and largest.isfinite()):
                of_sets = f" after their mean over {self.num_categories} categories" if self.num_categories else ""
                raise ValueError(f"Expected {key} with finite and linearly independent columns{of_sets}, got others")
        super()._load_from_state_dict(state_dict, prefix, *others)

    @torch.no_grad()
    def turn(self, matrix: Tensor) -> None:
        """Take the columns of another matrix in place of its own."""
        # An optimizer such as Adam moves each entry by a learning rate, and entries of about 1 by a small angle.
        self.free_matrix.copy_(math.sqrt(self.features) * SPEED * matrix)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x A; the batch dimensions of a matrix drawn from a prior broadcast with the batch dimensions of x."""
    return x @ matrix if matrix.dim() == 2 else (x.unsqueeze(-2) @ matrix).squeeze(-2)


Frame: TypeAlias = IdentityFrame | OrthonormalFrame | TrainedFrame


def columns_of(frame: Frame) -> Tensor:
    """The matrix Q of a frame, of shape (D, K)."""
    return torch.eye(frame.features, frame.latent_dim) if isinstance(frame, IdentityFrame) else frame.matrix


def centered(columns: Tensor, num_categories: int) -> Tensor:
    """The columns of shape (..., D, K) without their mean over each set of categories, if there are any."""
    if not num_categories:
        return columns
    sets = columns.unflatten(-2, (-1, num_categories))
    return (sets - sets.mean(-2, keepdim=True)).flatten(-3, -2)


def _sums(matrix: Tensor, num_categories: int) -> Tensor:
    """The sums of the columns over each set of categories, in double precision."""
    return matrix.double().reshape(-1, num_categories, matrix.shape[-1]).sum(1)


def deviation(matrix: Tensor) -> float:
    """The largest entry of |Q^T Q - I|, in double precision, in which no setting for faster products has a say."""
    matrix = matrix.detach().double()
    return float(
        (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)).abs().max()
    )


def orthonormalize(matrix: Tensor, num_categories: int = 0) -> Tensor:
    """Orthonormal columns close to the almost orthonormal columns of ``matrix``, in the precision of the matrix.

    With categories, they are orthogonal to a shift of all categories too.
    """
    q, r = torch.linalg.qr(centered(matrix.double(), num_categories))
    return (q * torch.sign(r.diagonal())).to(matrix.dtype)
