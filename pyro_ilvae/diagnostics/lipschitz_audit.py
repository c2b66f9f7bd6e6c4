"""An audit of how little a decoder may move when its latent variable moves: distances, worst pairs, Jacobians."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine.decoding import (
    _MOST_NUMBERS,
    _decode,
    _features,
    _jacobian,
    _split,
    certified_constant,
    prior_draws,
)

_LEARNING_RATE = 0.05  # in units of the prior's standard deviation, and of the logarithm of a distance


class LipschitzAudit(NamedTuple):
    r"""Smallest values found of ||f(z) - f(z')|| / ||z - z'|| and of the Jacobian's singular values, and where.

    Each is in units of f over units of z. The measured ones are upper bounds on the true constant.
    """

    certified: float | None  #: the constant that the decoder carries, a lower bound on all others; None without one
    prior_ratio: float  #: the smallest ratio over pairs of prior draws
    worst_ratio: float  #: the smallest ratio over optimized pairs
    singular_value: float  #: the smallest singular value of the Jacobian over prior draws
    prior_pair: Tensor  #: where ``prior_ratio`` occurs, of shape (2, K)
    worst_pair: Tensor  #: where ``worst_ratio`` occurs, of shape (2, K)
    singular_point: Tensor  #: where ``singular_value`` occurs, of shape (K,)

    @property
    def smallest(self) -> float:
        """The smallest of the three measured values."""
        return min(self.prior_ratio, self.worst_ratio, self.singular_value)


def lipschitz_audit(
    decoder: Callable[[Tensor], Tensor],
    *,
    latent_dim: int | None = None,
    num_samples: int = 1000,
    num_worst: int = 20,
    steps: int = 100,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> LipschitzAudit:
    r"""The smallest stretching of a decoder that a search finds, beside the constant that it promises.

    .. math:: L(f) = \inf_{z \ne z'} \frac{\|f(z) - f(z')\|}{\|z - z'\|} \le \min(\text{measured}), \qquad
        \sigma_{\min}(J_f(z)) \ge L(f).

    Whatever is measured is an upper bound on the true constant :math:`L(f)`: this is an audit, which can refute a
    constant, not a certificate, which no search can give. The certificate is the construction of the decoder.

    The ratio is measured over all pairs of prior draws, and over pairs found by gradient descent (Adam) on its
    logarithm from the worst of them and from near pairs at the points with the smallest singular values, in the
    directions of these. The descent may leave the region in which the prior draws: L(f) is a property of all of
    :math:`\mathbb{R}^K`. Pairs nearer than :math:`\varepsilon^{1/4}` prior standard deviations, with
    :math:`\varepsilon` the machine precision of the decoder, are left to the Jacobian, since rounding of f would
    swamp their difference; what remains is an error of about :math:`\varepsilon^{3/4} \|f\|` in the ratio.

    Args:
        decoder: a module or function from (N, K) to (N, \*event_shape), each row by itself. A module is audited in
            evaluation mode.
        latent_dim: the dimension :math:`K`, where the decoder lacks the attribute and there is no ``sampler``.
        num_samples: the number of prior draws, at least 2. Time grows with its square.
        num_worst: the number of pairs of either kind from which the descent starts.
        steps: the number of its steps; 0 for none.
        scale: the standard deviation of the prior, N(0, scale^2 I).
        sampler: draws from another prior: a function from n to a tensor of shape (n, K).
        batch_size: the number of latent points treated at a time; in bounded memory if None.
        seed: for the draws; None for the global random state.

    Returns:
        The certified constant, the three measured values and where they occur.

    Raises:
        ValueError: for a decoder whose dimension is not known, whose output is not finite, has another length, or
            differs between two calls, and for arguments out of range.

    References:
        Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network,
        https://arxiv.org/abs/2304.12770

    Example:
        >>> from pyro_ilvae import InverseLipschitzDecoder
        >>> decoder = InverseLipschitzDecoder(latent_dim=2, event_shape=8, inverse_lipschitz=0.5, map_features=(16,))
        >>> audit = lipschitz_audit(decoder, num_samples=100)
        >>> round(audit.certified, 6), audit.smallest >= 0.4999
        (0.5, True)
    """
    if _checks.positive_int("num_samples", num_samples) < 2:
        raise ValueError("Expected num_samples >= 2, got 1: a pair takes two draws")
    _checks.positive_int("num_worst", num_worst)
    if steps != 0:
        _checks.positive_int("steps", steps)
    # Not inference mode, which knows no derivatives.
    with torch.inference_mode(False), evaluation_mode(decoder), seeded(seed):
        z = prior_draws(decoder, num_samples, latent_dim, scale, sampler)
        spread = float(z.std(0).mean())
        if not spread > 0:
            raise ValueError("Expected prior draws that differ, got one point")
        nearest = torch.finfo(z.dtype).eps ** 0.25 * spread
        features = _features(decoder, z[:2])

        with torch.no_grad():
            eta = torch.cat([_decode(decoder, part) for part in _split(z, features, batch_size)])
        pairs = _worst_pairs(z, eta, nearest, num_worst)
        ratios = _ratio(eta[pairs].double(), z[pairs].double())

        wide = features * z.shape[1]
        values = torch.cat([_singular_values(decoder, part) for part in _split(z, wide, batch_size)])
        weakest = z[values.topk(min(num_worst, len(z)), largest=False).indices]
        directions = torch.cat([_weakest_direction(decoder, part) for part in _split(weakest, wide, batch_size)])
        near = torch.stack([weakest, weakest + 10 * nearest * directions], 1)

        starts = torch.cat([z[pairs], near])
        descents = [
            _descend(decoder, part, steps, spread, nearest) for part in _split(starts, 2 * features, batch_size)
        ]
        worst_ratios, worst_pairs = (torch.cat(found) for found in zip(*descents, strict=True))
    return LipschitzAudit(
        certified=certified_constant(decoder),
        prior_ratio=float(ratios.min()),
        worst_ratio=float(worst_ratios.min()),
        singular_value=float(values.min()),
        prior_pair=z[pairs[ratios.argmin()]],
        worst_pair=worst_pairs[worst_ratios.argmin()],
        singular_point=z[values.argmin()],
    )


def _worst_pairs(z: Tensor, eta: Tensor, nearest: float, count: int) -> Tensor:
    """Indices of shape (count, 2) of the pairs of draws, not too near, that have the smallest ratios."""
    # In double, since distances by matrix products cancel; and centered, so that they cancel less.
    points, images = (tensor.double() - tensor.double().mean(0) for tensor in (z, eta))
    found = []
    rows = torch.arange(len(z), device=z.device)
    for part in rows.split(max(1, _MOST_NUMBERS // len(z))):
        distances = torch.cdist(points[part], points)
        ratios = torch.cdist(images[part], images) / distances
        ratios[(distances < nearest) | (part[:, None] >= rows)] = math.inf
        smallest = ratios.flatten().topk(min(count, ratios.numel()), largest=False)
        i, j = smallest.indices // len(z), smallest.indices % len(z)
        found.append((smallest.values, torch.stack([part[i], j], 1)))
    values, pairs = (torch.cat(kept) for kept in zip(*found, strict=True))
    if not values.isfinite().any():
        raise ValueError("Expected prior draws that differ, got none far enough apart to be told from rounding")
    best = values.topk(min(count, int(values.isfinite().sum())), largest=False).indices
    return pairs[best]


def _ratio(eta: Tensor, z: Tensor) -> Tensor:
    """||f(z) - f(z')|| / ||z - z'|| of pairs, for ``eta`` of shape (P, 2, D) and ``z`` of shape (P, 2, K)."""
    return (eta[:, 0] - eta[:, 1]).norm(dim=-1) / (z[:, 0] - z[:, 1]).norm(dim=-1)


def _singular_values(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The K-th singular value of the Jacobian at each row of ``z``, of shape (N,); 0 for D < K."""
    jacobian = _jacobian(decoder, z).double()
    values = torch.linalg.svdvals(jacobian)
    return values[:, -1] if jacobian.shape[1] >= jacobian.shape[2] else torch.zeros_like(values[:, -1])


def _weakest_direction(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The unit vector that the Jacobian stretches least at each row of ``z``, of shape (N, K)."""
    jacobian = _jacobian(decoder, z).double()
    return torch.linalg.eigh(jacobian.mT @ jacobian).eigenvectors[..., 0].to(z.dtype)


def _descend(
    decoder: Callable[[Tensor], Tensor], pairs: Tensor, steps: int, spread: float, nearest: float
) -> tuple[Tensor, Tensor]:
    """The smallest ratio on the way down from each pair, of shape (P,), and where it is, of shape (P, 2, K)."""
    gap = pairs[:, 1] - pairs[:, 0]
    length = gap.norm(dim=-1, keepdim=True)
    # A pair as a midpoint, a direction and the logarithm of a distance: near pairs and far ones then learn alike.
    midpoint = (pairs.mean(1) / spread).requires_grad_()
    direction = (gap / length).requires_grad_()
    log_length = length.log().requires_grad_()
    coordinates = [midpoint, direction, log_length]
    optimizer = torch.optim.Adam(coordinates, lr=_LEARNING_RATE)
    best, best_pairs = torch.full_like(length[:, 0], math.inf, dtype=torch.float64), pairs.clone()
    for step in range(steps + 1):
        half = 0.5 * log_length.exp() * direction / direction.norm(dim=-1, keepdim=True)
        at = torch.stack([spread * midpoint - half, spread * midpoint + half], 1)
        with torch.set_grad_enabled(step < steps):
            eta = _decode(decoder, at.flatten(0, 1)).reshape(*at.shape[:2], -1)
        ratio = _ratio(eta.detach().double(), at.detach().double())
        better = ratio < best
        best[better], best_pairs[better] = ratio[better], at.detach()[better]
        if step == steps:
            break
        square = (eta[:, 0] - eta[:, 1]).square().sum(-1)
        # The smallest number keeps the gradient finite where two values are equal.
        objective = (square + torch.finfo(square.dtype).tiny).log() - 2 * log_length[:, 0]
        gradients = torch.autograd.grad(objective.sum(), coordinates, materialize_grads=True)
        for coordinate, gradient in zip(coordinates, gradients, strict=True):
            coordinate.grad = gradient
        optimizer.step()
        with torch.no_grad():
            log_length.clamp_(min=math.log(nearest))
    return best, best_pairs
