"""A decoder with Normal noise as a channel from K numbers to K numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ilvae.diagnostics._engine.decoding import (
    certified_constant,
    check_unconditional,
    decode,
    distribution_of,
    num_features,
    parameters_of,
    split,
)
from pyro_ilvae.diagnostics._engine.posteriors import UnavailableError

_ROWS = 8  # of natural parameters at which the noise is looked at first
_NUMBERS = 8  # that it takes for each of them, in double precision too


class Channel(NamedTuple):
    """P x = m(z) + noise, with m(z) = P f(z) from R^K to itself."""

    mean: Callable[[Tensor], Tensor]  #: m up to a shift, from (N, K) to (N, K)
    covariance: Tensor  #: of the noise, of shape (K, K), in double precision
    constant: float  #: the inverse Lipschitz constant of m
    coordinate_constant: float | None  #: a lower bound on the derivative of each m_j along its z_j; None without one


def channel_of(
    decoder: Callable[[Tensor], Tensor],
    likelihood: Callable[[Tensor], Any],
    z: Tensor,
    samples_per_pass: int | None = None,
) -> Channel:
    """The channel of a decoder and a likelihood, of which ``z`` are some points; raises where there is none."""
    kind, latent_dim = type(decoder).__name__, z.shape[1]
    shape = getattr(decoder, "event_shape", None)
    if getattr(decoder, "conditional", False) and shape is not None:
        # The first reason to give, because a context that is given would not help where noise is not Normal.
        eta = z.new_zeros(1, *shape)
        _scale(likelihood, distribution_of(likelihood, eta), eta)
    check_unconditional(decoder)
    constant = certified_constant(decoder)
    if constant is None:
        raise UnavailableError(f"Expected a decoder that carries inverse_lipschitz, got {kind}")
    # First, because a decoder in nats is no function either where its noise is drawn.
    scale = noise_scale(likelihood, parameters_of(decoder, z[:_ROWS]))
    features = num_features(decoder, z[:2])
    for rows in split(z[_ROWS:], _NUMBERS * features, samples_per_pass) if len(z) > _ROWS else ():
        noise_scale(likelihood, parameters_of(decoder, rows), scale)
    scale = scale.flatten()
    coordinates: Callable[[Tensor], Tensor] | None = getattr(decoder, "coordinates", None)
    if coordinates is None:
        if features != latent_dim:
            raise UnavailableError(
                f"Expected a decoder with K = D or the method coordinates, got {kind} with K = {latent_dim} and "
                f"D = {features}"
            )
        if constant == 0:
            raise UnavailableError(
                f"Expected a decoder with inverse_lipschitz > 0, or the method coordinates, got {kind} with 0, which "
                "need not be one to one"
            )
        return Channel(lambda at: decode(decoder, at), scale.square().diag(), constant, None)
    eta = parameters_of(decoder, z[:2])
    found = coordinates(eta)
    if found.shape != (len(eta), latent_dim):
        raise UnavailableError(
            f"Expected coordinates of a decoder of shape (..., {latent_dim}), got {tuple(found.shape)} from {kind}"
        )
    rows = scale * _matrix(coordinates, eta)
    own, of_coordinates = (getattr(decoder, name, None) for name in ("channel_constant", "coordinate_constant"))
    direct: Callable[[Tensor], Tensor] | None = getattr(decoder, "_channel", None)
    if direct is not None and not _same_up_to_shift(direct, lambda at: coordinates(decoder(at)), z[:_ROWS]):
        direct = None  # of a class that overrides the decoder's other methods
    return Channel(
        direct or (lambda at: coordinates(decoder(at))),
        rows @ rows.mT,
        constant if own is None else float(own),
        None if of_coordinates is None else float(of_coordinates),
    )


def _same_up_to_shift(one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor], z: Tensor) -> bool:
    """Whether two maps move alike between points; of a single point that is not known."""
    moves = [value - value[:1] for value in (one(z).double(), two(z).double())]
    rounding = torch.finfo(z.dtype).eps ** 0.5 * two(z).abs().max()
    return len(z) > 1 and bool(((moves[0] - moves[1]).abs() <= rounding).all())


def _matrix(coordinates: Callable[[Tensor], Tensor], eta: Tensor) -> Tensor:
    """The matrix P of the linear map ``coordinates``, of shape (K, D), in double precision."""
    latent_dim = coordinates(eta).shape[1]
    with torch.enable_grad():
        at = torch.zeros_like(eta[:1]).expand(latent_dim, *eta.shape[1:]).clone().requires_grad_()
        (rows,) = torch.autograd.grad(coordinates(at).diagonal().sum(), at)
    return rows.flatten(1).double()


def noise_scale(likelihood: Callable[[Tensor], Any], eta: Tensor, expected: Tensor | None = None) -> Tensor:
    """The scale of the Normal noise of each entry, of the shape of a datum, in double precision.

    Raises where it is none, or not the same in all rows and as ``expected``.
    """
    eta = eta if eta.element_size() >= 4 else eta.float()  # densities of half precision say little
    kind = type(likelihood).__name__
    found, again = distribution_of(likelihood, eta), distribution_of(likelihood, eta)
    scale = _scale(likelihood, found, eta)
    if not (scale.isfinite() & (scale > 0)).all():
        raise UnavailableError(f"Expected a finite noise scale above 0, got {float(scale.min()):.4g} from {kind}")
    scale = scale[0] if expected is None else expected
    # Where the values of x do not matter, a fixed pattern uses up no draws.
    steps = torch.arange(eta.numel(), dtype=torch.float64, device=eta.device).reshape(eta.shape)
    x = eta + (scale * (4 * (0.618034 * steps).frac() - 2)).to(eta)
    own, same, normal = (
        fn.log_prob(x).double().reshape(len(x), -1).sum(1)
        for fn in (found, again, torch.distributions.Normal(eta, scale.to(eta), validate_args=False))
    )
    if not torch.equal(own, same):
        raise UnavailableError(f"Expected noise of one scale, got {kind}, whose scale is drawn from a prior")
    of_rows = _scale(likelihood, found, eta)
    if not torch.allclose(of_rows, scale.expand_as(of_rows), rtol=1e-4, atol=0) or not torch.allclose(
        own, normal, rtol=1e-4, atol=1e-4
    ):
        raise UnavailableError(
            f"Expected a likelihood whose density is Normal around the decoder's output, with a scale that is the same "
            f"for all z, got another one from {kind}"
        )
    return scale


def _scale(likelihood: Callable[[Tensor], Any], found: Any, eta: Tensor) -> Tensor:
    """What the likelihood says of its noise, of the shape of ``eta``; raises without Normal noise."""
    kind, scale = type(likelihood).__name__, getattr(likelihood, "noise_scale", None)
    shape = tuple(found.batch_shape + found.event_shape)[1:]
    while isinstance(found, torch.distributions.Independent):
        found = found.base_dist
    if scale is None and isinstance(found, torch.distributions.Normal) and found.scale.shape == eta.shape:
        scale = found.scale
    if scale is None and hasattr(likelihood, "information_product"):
        raise UnavailableError(
            f"Expected a likelihood with Normal noise, got {kind}, whose noise unit is a reference, not a bound"
        )
    if scale is None:
        raise UnavailableError(
            f"Expected a likelihood with Normal noise in each of the {tuple(eta.shape[1:])} entries of a datum, got "
            f"{type(found).__name__} for data of shape {shape} from {kind}"
        )
    scale = torch.as_tensor(scale, device=eta.device).detach().double()
    try:
        return scale.expand(eta.shape)
    except RuntimeError as error:
        got = tuple(scale.shape)
        raise UnavailableError(f"Expected a noise scale of the shape of a datum, got {got}") from error
