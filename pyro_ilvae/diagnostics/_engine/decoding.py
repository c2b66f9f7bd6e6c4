"""An audit of how little a decoder may move when its latent variable moves: distances, worst pairs, Jacobians."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from pyro_ilvae import _checks

_MOST_NUMBERS = 10_000_000  # held at a time for distances and Jacobians, unless a caller says otherwise


def certified_constant(decoder: object) -> float | None:
    """The inverse Lipschitz constant that the decoder carries; None without one."""
    value: Any = getattr(decoder, "inverse_lipschitz", None)
    return None if value is None else float(value.detach() if isinstance(value, Tensor) else value)


def prior_draws(
    decoder: Callable[[Tensor], Tensor],
    num_samples: int,
    latent_dim: int | None,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Draws of shape (num_samples, K) from the sampler or from N(0, scale^2 I), of the decoder's dtype and device."""
    known = latent_dim if latent_dim is not None else getattr(decoder, "latent_dim", None)
    if sampler is not None:
        z = sampler(num_samples)
        if z.dim() != 2 or len(z) != num_samples or (known is not None and z.shape[1] != known):
            raise ValueError(
                f"Expected sampler to return shape ({num_samples}, {'K' if known is None else known}), got "
                f"{tuple(z.shape)}"
            )
        return z.detach()
    if known is None:
        raise ValueError("Expected latent_dim or a sampler for a decoder without this attribute, got neither")
    _checks.positive("scale", scale)
    state = [*decoder.parameters(), *decoder.buffers()] if isinstance(decoder, nn.Module) else []
    like = next((tensor for tensor in state if tensor.is_floating_point()), torch.empty(0))
    shape = (num_samples, _checks.positive_int("latent_dim", known))
    return scale * torch.randn(shape, dtype=like.dtype, device=like.device)


def _features(decoder: Callable[[Tensor], Tensor], z: Tensor) -> int:
    """The number D of entries of the decoder's output, after a look at what kind of function it is.

    It is also the ordinary call that Pyro's modules need before a transform of ``torch.func``.
    """
    with torch.no_grad():
        eta = _decode(decoder, z)
        if not torch.equal(eta, _decode(decoder, z)):
            raise ValueError(
                "Expected decoder to be one function, got two results for the same z: condition weights that have a "
                "prior, and leave out noise"
            )
    return eta.shape[1]


def _decode(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The decoder's output of shape (N, D)."""
    eta = decoder(z)
    if eta.dim() == 0 or len(eta) != len(z):
        raise ValueError(f"Expected decoder to return shape ({len(z)}, *event_shape), got {tuple(eta.shape)}")
    if not eta.isfinite().all():
        raise ValueError("Expected decoder to return finite values, got NaN or infinity")
    return eta.reshape(len(z), -1)


def _split(rows: Tensor, numbers: int, batch_size: int | None) -> tuple[Tensor, ...]:
    """Parts of ``batch_size`` rows, or of so many that ``numbers`` for each of them fit."""
    size = max(1, _MOST_NUMBERS // numbers) if batch_size is None else _checks.positive_int("batch_size", batch_size)
    return rows.split(size)


def _jacobian(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The Jacobian at each row of ``z``, of shape (N, D, K)."""
    columns = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    def decode(at: Tensor) -> Tensor:
        return decoder(at).reshape(len(at), -1)

    # K forward derivatives and not D backward ones; rows by themselves, so no vmap that a backbone might not take.
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The first of them loads a part of PyTorch that warns of another one.
            warnings.filterwarnings("ignore", "`torch.jit")
            return torch.stack([jvp(decode, (z,), (column.expand_as(z),))[1] for column in columns], -1)
    except RuntimeError:  # something inside has a backward derivative only
        return torch.autograd.functional.jacobian(lambda at: decode(at).sum(0), z).transpose(0, 1)
