"""What the diagnostics of decoders share: draws of the latent variable, checked outputs, Jacobians."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from pyro_ilvae import _checks
from pyro_ilvae._memory import fitting_rows
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError

_MOST_NUMBERS = 10_000_000  # held at a time for distances and Jacobians, unless a caller says otherwise


def check_unconditional(decoder: object) -> None:
    """Raise for a decoder that is no function of z alone."""
    if getattr(decoder, "conditional", False):
        way = "decoder.given(...)" if hasattr(decoder, "given") else "lambda z: decoder(z, context) for one context"
        raise UnavailableError(
            f"Expected a decoder of z alone, got {type(decoder).__name__}, which needs more than z: pass {way}"
        )


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
        raise ValueError("Expected latent_dim or a sampler for a decoder without the attribute latent_dim, got neither")
    _checks.positive("scale", scale)
    state = [*decoder.parameters(), *decoder.buffers()] if isinstance(decoder, nn.Module) else []
    like = next((tensor for tensor in state if tensor.is_floating_point()), torch.empty(0))
    shape = (num_samples, _checks.positive_int("latent_dim", known))
    return scale * torch.randn(shape, dtype=like.dtype, device=like.device)


def num_features(decoder: Callable[[Tensor], Tensor], z: Tensor) -> int:
    """The number D of entries of the decoder's output, once the decoder has proved to be one function.

    The calls are also the ordinary ones that Pyro's modules need before a transform of ``torch.func``.
    """
    with torch.no_grad():
        eta = decode(decoder, z)
        if not torch.equal(eta, decode(decoder, z)):
            raise ValueError(
                "Expected decoder to be one function, got two results for the same z: condition weights that have a "
                "prior, and leave out noise"
            )
    return eta.shape[1]


def decode(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The decoder's output of shape (N, D)."""
    eta = decoder(z)
    if eta.dim() == 0 or len(eta) != len(z):
        raise ValueError(f"Expected decoder to return shape ({len(z)}, *event_shape), got {tuple(eta.shape)}")
    if not eta.isfinite().all():
        raise ValueError("Expected decoder to return finite values, got NaN or infinity")
    return eta.reshape(len(z), -1)


def split(
    rows: Tensor, numbers: int, rows_per_pass: int | None = None, compute: Callable[[Tensor], Any] | None = None
) -> tuple[Tensor, ...]:
    """Parts of ``rows_per_pass`` rows; if None, of as many rows as fit in memory.

    Each row takes ``numbers``, and what ``compute`` takes for it where that is more, such as hidden layers.
    """
    if rows_per_pass is None:
        rows_per_pass = max(1, _MOST_NUMBERS // numbers)
        if compute is not None and rows_per_pass > 1 and len(rows) > 1:
            rows_per_pass = min(rows_per_pass, fitting_rows(compute, rows))
    return rows.split(_checks.positive_int("samples_per_pass", rows_per_pass))


def jacobian(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The Jacobian at each row of ``z``, of shape (N, D, K)."""
    columns = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    def flat(at: Tensor) -> Tensor:
        return decoder(at).reshape(len(at), -1)

    # K forward derivatives take less time than D backward ones. vmap is avoided, because not every backbone takes it.
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The first forward derivative loads a part of PyTorch that warns about another part.
            warnings.filterwarnings("ignore", "`torch.jit")
            return torch.stack([jvp(flat, (z,), (column.expand_as(z),))[1] for column in columns], -1)
    except RuntimeError:  # something inside has a backward derivative only
        return torch.autograd.functional.jacobian(lambda at: flat(at).sum(0), z).transpose(0, 1)
