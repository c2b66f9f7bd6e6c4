"""Frames: orthonormal columns that place a K-dimensional map in the D-dimensional space of natural parameters."""

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeAlias

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae.decoders.arguments import dense, without_autocast

__all__ = ["Frame", "IdentityFrame", "OrthonormalFrame"]


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

    def embed(self, u: Tensor) -> Tensor:
        """Q u of shape (..., D), for ``u`` of shape (..., K)."""
        return F.pad(u, (0, self.features - self.latent_dim))

    def coordinates(self, y: Tensor) -> Tensor:
        """Q^T y of shape (..., K), for ``y`` of shape (..., D)."""
        return y[..., : self.latent_dim]

    def fold(self, weight: Tensor) -> Tensor:
        """The product ``weight`` Q of shape (..., K), for ``weight`` of shape (..., D)."""
        return weight[..., : self.latent_dim]


class OrthonormalFrame(PyroModule):
    """A frame Q given by its matrix, a buffer: it is saved with the module and never trained.

    A matrix of a state dict has to be orthonormal too, or the constant of the decoder would not hold: to 1e-5, or to
    the rounding of half precision if the matrix or the module is of that precision. With ``num_categories``, because a
    softmax follows, it has to be orthogonal to a shift of all categories as well.

    Args:
        matrix: Q of shape (D, K), with orthonormal columns.
        num_categories: the number of categories, of which the D coordinates hold one or more sets; 0 without a softmax.
    """

    def __init__(self, matrix: Tensor, num_categories: int = 0) -> None:
        super().__init__()
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
        self.matrix.copy_(_orthonormalize(matrix.double(), self.num_categories))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert dtype and device; a matrix whose dtype changes is orthonormalized again, in double precision."""
        before = self.matrix.dtype
        super()._apply(fn, recurse)
        if self.matrix.dtype != before and self.matrix.device.type != "meta":
            self.matrix = _orthonormalize(self.matrix, self.num_categories)
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
                self.matrix.copy_(_orthonormalize(self.matrix, self.num_categories))

    def _check_loaded(self, key: str, loaded: Tensor, dtype: torch.dtype) -> None:
        dtypes = [dtype for dtype in (dtype, loaded.dtype) if dtype.is_floating_point]
        rounding = 2 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        error = _deviation(loaded)
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

    def add(self, y: Tensor, u: Tensor) -> Tensor:
        """y + Q u of shape (..., D), for ``y`` of shape (..., D) and ``u`` of shape (..., K)."""
        if u.shape[:-1] != y.shape[:-1]:  # a context, or weights drawn from a prior, may have more dimensions
            return y + u @ self.matrix.mT
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

    def embed(self, u: Tensor) -> Tensor:
        """Q u of shape (..., D), for ``u`` of shape (..., K)."""
        return u @ self.matrix.mT

    def coordinates(self, y: Tensor) -> Tensor:
        """Q^T y of shape (..., K), for ``y`` of shape (..., D)."""
        return y @ self.matrix

    def fold(self, weight: Tensor) -> Tensor:
        """The product ``weight`` Q of shape (..., K), for ``weight`` of shape (..., D)."""
        return weight @ self.matrix


Frame: TypeAlias = IdentityFrame | OrthonormalFrame


def columns_of(frame: Frame) -> Tensor:
    """The matrix Q of a frame, of shape (D, K)."""
    like = next(frame.buffers(), torch.empty(0))
    return frame.embed(torch.eye(frame.latent_dim, dtype=like.dtype, device=like.device)).mT


def frame_argument(frame: Any) -> str | Tensor:
    """The ``frame`` argument of a decoder, its matrix as a tensor; arrays and nested lists are converted."""
    if isinstance(frame, nn.Module | type):
        raise TypeError(f"Expected frame to be a name or a matrix, such as decoder.frame.matrix, got {frame!r}")
    return frame if isinstance(frame, str) else dense("frame", frame)


def make_frame(frame: str | Tensor, event_shape: torch.Size, latent_dim: int) -> Frame:
    """The frame that a decoder's ``frame`` argument asks for: "identity", "random", "centered" or a (D, K) tensor."""
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
        return OrthonormalFrame(torch.linalg.qr(torch.randn(features, latent_dim).double()).Q)
    if frame == "centered":
        return OrthonormalFrame(_centered(event_shape, latent_dim), event_shape[-1])
    raise ValueError(
        f"Expected frame to be 'identity', 'random', 'centered' or a ({features}, {latent_dim}) tensor, got {frame!r}"
    )


def num_directions(frame: str | Tensor, event_shape: torch.Size) -> int:
    """How many columns a frame can have: as many as it has for a matrix, one less for each set of categories."""
    features = event_shape.numel()
    if isinstance(frame, Tensor):
        if frame.dim() != 2 or frame.shape[0] != features:
            hint = ": pass its transpose, frame.T" if frame.shape[-1:] == (features,) else ""
            raise ValueError(f"Expected frame of shape ({features}, F + K), got {tuple(frame.shape)}{hint}")
        return frame.shape[1]
    return features - features // event_shape[-1] if frame == "centered" else features


def check_centered(frame: Frame, vocab_size: int) -> None:
    """Raise unless the columns are orthogonal to the all-ones vector, along which the softmax ignores a decoder.

    From then on a frame of ours loads no other matrix.
    """
    if not hasattr(frame, "coordinates"):
        raise ValueError(f"Expected decoder with a frame that has the method coordinates, got {type(frame).__name__}")
    state = next(frame.buffers(), torch.empty(0)) if isinstance(frame, nn.Module) else torch.empty(0)
    if isinstance(frame, OrthonormalFrame):
        sums = frame.matrix.double().sum(0)
    else:
        with without_autocast(state.device.type):
            sums = frame.coordinates(torch.ones(vocab_size, dtype=state.dtype, device=state.device))
    largest_sum = sums.abs().max()
    if not largest_sum <= max(1e-4, 2 * torch.finfo(state.dtype).eps):
        raise ValueError(
            "Expected decoder with a frame whose columns are orthogonal to the all-ones vector, got one whose columns "
            f"sum to up to {float(largest_sum):.2g} in absolute value; frame='centered' makes one"
        )
    if isinstance(frame, OrthonormalFrame):
        frame.num_categories = vocab_size


def description(decoder: Any, constant: str) -> str:
    """The sizes and the constant of a decoder with a frame, for ``print``."""
    kind = "identity" if isinstance(decoder.frame, IdentityFrame) else "matrix"
    return (
        f"latent_dim={decoder.latent_dim}, event_shape={tuple(decoder.event_shape)}, {constant}, frame={kind}, "
        f"context_dim={decoder.context_dim}"
    )


def _centered(event_shape: torch.Size, latent_dim: int) -> Tensor:
    """Random orthonormal columns orthogonal to a shift of all categories, which are the last dimension."""
    largest = num_directions("centered", event_shape)
    if latent_dim > largest:
        raise ValueError(
            f"Expected latent_dim <= {largest} with frame='centered', got {latent_dim}: of {tuple(event_shape)} logits "
            f"so many directions are left when the shift of all {event_shape[-1]} categories is taken out"
        )
    # In double precision, because draws that are almost equal leave little but rounding when their mean is taken off.
    directions = torch.randn(*event_shape, latent_dim).double()
    directions = directions - directions.mean(-2, keepdim=True)
    return torch.linalg.qr(directions.reshape(event_shape.numel(), latent_dim)).Q


def _orthonormal(matrix: Tensor, features: int, latent_dim: int) -> Tensor:
    if matrix.shape != (features, latent_dim):
        hint = ": pass its transpose, frame.T" if matrix.shape == (latent_dim, features) else ""
        raise ValueError(f"Expected frame of shape ({features}, {latent_dim}), got {tuple(matrix.shape)}{hint}")
    if matrix.is_complex():
        raise ValueError(f"Expected frame of real numbers, got {matrix.dtype}")
    matrix = matrix.detach().double()
    error = _deviation(matrix)
    # NaN fails the comparison too.
    if not error <= 1e-4:
        raise ValueError(
            f"Expected frame with orthonormal columns, got one with |Q^T Q - I| up to {error:.2g}; "
            "torch.linalg.qr(frame.double()).Q orthonormalizes it"
        )
    # Otherwise an error up to the tolerance would enter the constant.
    return _orthonormalize(matrix)


def _sums(matrix: Tensor, num_categories: int) -> Tensor:
    """The sums of the columns over each set of categories, in double precision."""
    return matrix.double().reshape(-1, num_categories, matrix.shape[-1]).sum(1)


def _deviation(matrix: Tensor) -> float:
    """The largest entry of |Q^T Q - I|, in double precision, in which no setting for faster products has a say."""
    matrix = matrix.detach().double()
    return float(
        (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)).abs().max()
    )


def _orthonormalize(matrix: Tensor, num_categories: int = 0) -> Tensor:
    """Orthonormal columns close to the almost orthonormal columns of ``matrix``, in the precision of the matrix.

    With categories, they are orthogonal to a shift of all categories too.
    """
    columns = matrix.double()
    if num_categories:
        mean = _sums(columns, num_categories) / num_categories
        columns = columns - mean.repeat_interleave(num_categories, 0)
    q, r = torch.linalg.qr(columns)
    return (q * torch.sign(r.diagonal())).to(matrix.dtype)
