"""The frame of a decoder from its ``frame`` argument, and what a decoder of sequences asks of a frame."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.decoders.arguments import without_autocast
from pyro_ilvae.decoders.frames import (
    Frame,
    IdentityFrame,
    MatrixFrame,
    OrthonormalFrame,
    TrainedFrame,
    centered,
    deviation,
    orthonormalize,
)

__all__ = ["check_centered", "description", "frame_argument", "make_frame", "num_directions"]


def frame_argument(frame: Any) -> str | Tensor:
    """The ``frame`` argument of a decoder, its matrix as a tensor; arrays and nested lists are converted."""
    if isinstance(frame, nn.Module | type):
        raise TypeError(f"Expected frame to be a name or a matrix, such as decoder.frame.matrix, got {frame!r}")
    return frame if isinstance(frame, str) else _checks.tensor("frame", frame)


def make_frame(frame: str | Tensor, event_shape: torch.Size, latent_dim: int, *, trained: bool = False) -> Frame:
    """The frame that a decoder's ``frame`` argument asks for: "identity", "random", "centered" or a (D, K) tensor."""
    if trained:
        start = make_frame(frame, event_shape, latent_dim)
        if isinstance(start, IdentityFrame):
            return TrainedFrame(torch.eye(start.features, latent_dim))
        return TrainedFrame(start.matrix, start.num_categories)  # type: ignore[union-attr]
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
    if isinstance(frame, MatrixFrame):
        sums = frame.matrix.detach().double().sum(0)
    else:
        with without_autocast(state.device.type):
            sums = frame.coordinates(torch.ones(vocab_size, dtype=state.dtype, device=state.device))
    largest_sum = sums.abs().max()
    if not largest_sum <= max(1e-4, 2 * torch.finfo(state.dtype).eps):
        raise ValueError(
            "Expected decoder with a frame whose columns are orthogonal to the all-ones vector, got one whose columns "
            f"sum to up to {float(largest_sum):.2g} in absolute value; frame='centered' makes one"
        )
    if isinstance(frame, OrthonormalFrame | TrainedFrame):
        frame.num_categories = vocab_size


def description(decoder: Any, constant: str) -> str:
    """The sizes and the constant of a decoder with a frame, for ``print``."""
    kinds: dict[type, str] = {IdentityFrame: "identity", TrainedFrame: "trained"}
    kind = kinds.get(type(decoder.frame), "matrix")
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
    directions = torch.randn(event_shape.numel(), latent_dim).double()
    return torch.linalg.qr(centered(directions, event_shape[-1])).Q


def _orthonormal(matrix: Tensor, features: int, latent_dim: int) -> Tensor:
    if matrix.shape != (features, latent_dim):
        hint = ": pass its transpose, frame.T" if matrix.shape == (latent_dim, features) else ""
        raise ValueError(f"Expected frame of shape ({features}, {latent_dim}), got {tuple(matrix.shape)}{hint}")
    if matrix.is_complex():
        raise ValueError(f"Expected frame of real numbers, got {matrix.dtype}")
    matrix = matrix.detach().double()
    error = deviation(matrix)
    # NaN fails the comparison too.
    if not error <= 1e-4:
        raise ValueError(
            f"Expected frame with orthonormal columns, got one with |Q^T Q - I| up to {error:.2g}; "
            "torch.linalg.qr(frame.double()).Q orthonormalizes it"
        )
    # Otherwise an error up to the tolerance would enter the constant.
    return orthonormalize(matrix)
