"""What the diagnostics of decoders share: draws of the latent variable, checked outputs, Jacobians."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from pyro_ilvae import _checks
from pyro_ilvae.diagnostics._engine.arrays import check_finite
from pyro_ilvae.diagnostics._engine.memory import fitting_rows
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError

_MOST_NUMBERS = 10_000_000  # held at a time for distances and Jacobians, unless a caller says otherwise


def check_unconditional(decoder: object) -> None:
    """Raise for a decoder that is no function of z alone."""
    _checks.function("decoder", decoder, "a module or a function of z")
    if getattr(decoder, "conditional", False):
        way = "decoder.given(...)" if hasattr(decoder, "given") else "lambda z: decoder(z, context) for one context"
        raise UnavailableError(
            f"Expected a decoder of z alone, got {type(decoder).__name__}, which needs more than z: pass {way}"
        )


def has_context(decoder: object) -> bool:
    """Whether a decoder is a function of z at each context, and needs nothing else, as a decoder of sequences does."""
    conditional = getattr(decoder, "conditional", False) and getattr(decoder, "context_dim", None) is not None
    return conditional and not hasattr(decoder, "vocab_size")


def at_any_context(decoder: Any) -> Any:
    """The decoder at one context, where what it guarantees is the same in all of them; otherwise the decoder itself."""
    if not has_context(decoder) or getattr(decoder, "_channel", None) is None:
        return decoder
    like = state_of(decoder)
    return decoder.given((torch.empty(0) if like is None else like).new_zeros(decoder.context_dim))


def state_of(decoder: object) -> Tensor | None:
    """A parameter or buffer of the decoder, for dtype and device; None without one."""
    state = [*decoder.parameters(), *decoder.buffers()] if isinstance(decoder, nn.Module) else []
    return next((tensor for tensor in state if tensor.is_floating_point()), None)


def certified_constant(decoder: object) -> float | None:
    """The inverse Lipschitz constant that the decoder carries; None without one."""
    return _constant(decoder, "inverse_lipschitz")


def lipschitz_constant(decoder: object) -> float | None:
    """The Lipschitz constant that the decoder carries; None without one."""
    return _constant(decoder, "lipschitz")


def _constant(decoder: object, name: str) -> float | None:
    value: Any = getattr(decoder, name, None)
    return None if value is None else float(value.detach() if isinstance(value, Tensor) else value)


def prior_draws(
    decoder: Callable[[Tensor], Tensor],
    num_samples: int,
    latent_dim: int | None,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Draws of shape (num_samples, K) from the sampler or from N(0, scale^2 I), of the decoder's dtype and device."""
    own = getattr(decoder, "latent_dim", None)
    known = own if latent_dim is None else _checks.positive_int("latent_dim", latent_dim)
    if isinstance(own, int) and known != own:
        raise ValueError(f"Expected latent_dim to be {own}, as the decoder's own, got {latent_dim}")
    like = state_of(decoder)
    if sampler is not None:
        if scale != 1:
            raise ValueError(f"Expected a sampler or a scale, got both, with scale={scale!r}")
        z = _checks.tensor("draws of sampler", _checks.function("sampler", sampler)(num_samples))
        if like is not None or not z.is_floating_point():
            z = z.to(torch.empty(0) if like is None else like)
        if z.dim() != 2 or len(z) != num_samples or (known is not None and z.shape[1] != known):
            raise ValueError(
                f"Expected sampler to return shape ({num_samples}, {'K' if known is None else known}), got "
                f"{tuple(z.shape)}"
            )
        check_finite("draws of sampler", z)
        return z.detach()
    if known is None:
        raise ValueError("Expected latent_dim or a sampler for a decoder without the attribute latent_dim, got neither")
    _checks.positive("scale", scale)
    like = torch.empty(0) if like is None else like
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
        _check_derivative(decoder, z, eta)
    return eta.shape[1]


def _check_derivative(decoder: Callable[[Tensor], Tensor], z: Tensor, eta: Tensor) -> None:
    """Raise if the Jacobian has nothing of how the output moves, as where it is detached or leaves PyTorch."""
    resolution = torch.finfo(z.dtype).eps
    step = resolution ** (1 / 3) * (z.flip(0) - z if len(z) > 1 else z)
    # On both sides, because an edge may lie between a flat part and the other side.
    found = torch.minimum(*((decode(decoder, at) - eta).norm(dim=-1) for at in (z + step, z - step)))
    derivative = (jacobian(decoder, z) @ step[..., None])[..., 0].norm(dim=-1)
    if ((found > 100 * resolution * eta.norm(dim=-1)) & (derivative <= 1e-3 * found)).any():
        raise ValueError(
            "Expected decoder to be differentiable, got a derivative of zero where its output moves: leave out what "
            "detaches the output"
        )


def decode(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The decoder's output of shape (N, D)."""
    return parameters_of(decoder, z).reshape(len(z), -1)


def parameters_of(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The decoder's output of shape (N, *event_shape)."""
    try:
        eta = decoder(z)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        expected = f"{str(z.dtype).removeprefix('torch.')} of shape {tuple(z.shape)}"
        raise ValueError(f"Expected decoder to take z, {expected}, got {type(error).__name__}: {error}") from error
    if not isinstance(eta, Tensor) or not eta.is_floating_point():
        got = eta.dtype if isinstance(eta, Tensor) else f"a {type(eta).__name__}"
        raise TypeError(f"Expected decoder to return a floating-point tensor, got {got}")
    if eta.dim() == 0 or len(eta) != len(z) or eta.numel() == 0:
        raise ValueError(f"Expected decoder to return shape ({len(z)}, *event_shape), got {tuple(eta.shape)}")
    if not eta.isfinite().all():
        raise ValueError("Expected decoder to return finite values, got NaN or infinity")
    return eta


def check_likelihood(likelihood: object) -> None:
    """Raise for what is no function from natural parameters to a distribution."""
    # The class of a distribution is one.
    if not (isinstance(likelihood, type) and issubclass(likelihood, torch.distributions.Distribution)):
        _checks.function("likelihood", likelihood, "a function from natural parameters to a distribution")


def one_draw(likelihood: object) -> AbstractContextManager[Any]:
    """A context in which all methods of the likelihood see the same draw of a parameter with a prior."""
    context: AbstractContextManager[Any] = getattr(likelihood, "_pyro_context", nullcontext())
    return context


def distribution_of(likelihood: Callable[[Tensor], Any], eta: Tensor) -> Any:
    """The likelihood's distribution of the data."""
    try:
        distribution = likelihood(eta)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"Expected likelihood to take the decoder's output, got {got}") from error
    if not hasattr(distribution, "log_prob"):
        raise TypeError(f"Expected likelihood to return a distribution, got a {type(distribution).__name__}")
    return distribution


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
        try:
            return torch.autograd.functional.jacobian(lambda at: flat(at).sum(0), z).transpose(0, 1)
        except RuntimeError as error:
            raise ValueError(f"Expected decoder to be differentiable, got {error}") from error
