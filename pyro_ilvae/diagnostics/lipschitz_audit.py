"""An audit of how little, and how much, a decoder may move when its latent variable moves: distances, Jacobians."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._contexts import evaluation_mode, seeded
from pyro_ilvae.diagnostics._engine import memory, printing
from pyro_ilvae.diagnostics._engine.decoding import (
    certified_constant,
    check_unconditional,
    decode,
    jacobian,
    lipschitz_constant,
    num_features,
    prior_draws,
    split,
)

__all__ = ["LipschitzAudit", "lipschitz_audit"]

_LEARNING_RATE = 0.05  # in units of the prior's standard deviation, and of the logarithm of a distance


class LipschitzAudit(NamedTuple):
    r"""Smallest values found of ||f(z) - f(z')|| / ||z - z'|| and of the Jacobian's singular values, and where.

    All values are in units of f over units of z. The measured values are upper bounds on the true constant. The largest
    values, lower bounds on the true Lipschitz constant, are looked for where the decoder carries one.
    """

    certified: float | None  #: the constant that the decoder carries, a lower bound on all others; None without one
    prior_ratio: float  #: the smallest ratio over pairs of prior draws
    worst_ratio: float  #: the smallest ratio over optimized pairs
    singular_value: float  #: the smallest singular value of the Jacobian over prior draws
    prior_pair: Tensor  #: where ``prior_ratio`` occurs, of shape (2, K)
    worst_pair: Tensor  #: where ``worst_ratio`` occurs, of shape (2, K)
    singular_point: Tensor  #: where ``singular_value`` occurs, of shape (K,)
    #: the Lipschitz constant that the decoder carries, an upper bound on all ratios and singular values; None without
    lipschitz: float | None
    largest: float | None  #: the largest ratio or singular value found; None without ``lipschitz``
    largest_pair: Tensor | None  #: a pair at which the largest ratio occurs, of shape (2, K); None without

    @property
    def smallest(self) -> float:
        """The smallest of the three measured values."""
        return min(self.prior_ratio, self.worst_ratio, self.singular_value)

    def __repr__(self) -> str:
        measured = [
            f"{name.replace('_', ' ')} {printing.number(getattr(self, name))}"
            for name in ("prior_ratio", "worst_ratio", "singular_value")
        ]
        if self.lipschitz is not None:
            measured.append(f"lipschitz {printing.number(self.lipschitz)}")
            measured.append(f"largest {printing.number(self.largest)}")
        return printing.described(self, f"certified {printing.number(self.certified)}", *measured)


def lipschitz_audit(
    decoder: Callable[[Tensor], Tensor],
    *,
    latent_dim: int | None = None,
    num_samples: int = 1000,
    num_worst: int = 20,
    steps: int = 100,
    scale: float = 1.0,
    sampler: Callable[[int], Tensor] | None = None,
    samples_per_pass: int | None = None,
    seed: int | None = None,
) -> LipschitzAudit:
    r"""The smallest stretching of a decoder that a search finds, and the constant that the decoder promises.

    For a decoder with the attribute ``lipschitz``, the largest stretching as well.

    .. math:: L(f) = \inf_{z \ne z'} \frac{\|f(z) - f(z')\|}{\|z - z'\|} \le \min(\text{measured}), \qquad
        \sigma_{\min}(J_f(z)) \ge L(f).

    Every measured value is an upper bound on the true constant :math:`L(f)`. An audit can refute a constant but,
    like any search, cannot certify one; the certificate is the construction of the decoder.

    The ratio is measured over all pairs of prior draws. Gradient descent (Adam) on the logarithm of the ratio then
    starts from the pairs with the smallest ratios, and from near pairs along the least stretched directions at the
    points with the smallest singular values. The descent may leave the region in which the prior draws, because L(f) is
    a property of all of :math:`\mathbb{R}^K`. Pairs nearer than :math:`\varepsilon^{1/4}` prior standard deviations,
    with :math:`\varepsilon` the machine precision of the decoder, are left to the Jacobian, since rounding of f would
    swamp their difference. The ratio of the other pairs has an error of about :math:`\varepsilon^{3/4} \|f\|`.

    A Lipschitz constant that holds for near pairs holds for all, so the largest ratio is looked for by ascent from near
    pairs along the most stretched directions.

    Args:
        decoder: a module or function of z alone, from (N, K) to (N, \*event_shape), that decodes each row by itself. A
            module is audited in evaluation mode. For a decoder with a context or a history, pass
            ``decoder.given(...)``, which fixes them.
        latent_dim: the dimension :math:`K`, if the decoder lacks this attribute and there is no ``sampler``.
        num_samples: the number of prior draws, at least 2. The time grows with its square.
        num_worst: the number of pairs of each kind from which the descent starts.
        steps: the number of steps of the descent; 0 for no descent.
        scale: the standard deviation of the prior, N(0, scale^2 I).
        sampler: a function that draws from another prior, from n to a tensor of shape (n, K), in place of ``scale``.
        samples_per_pass: the number of prior draws treated at a time; if None, as many as fit in bounded memory.
        seed: a seed to draw from, which restores the global random state afterwards; if None, the global state is used.

    Returns:
        The certified constant, the three measured values and where they occur; and the Lipschitz constant, the largest
        value and where it occurs, or None.

    Raises:
        ValueError: for a decoder whose dimension is not known or another, whose output is not finite, has another
            length, differs between two calls, or has lost its derivative, and for arguments out of range.
        TypeError: for a decoder or a sampler that is no function, and for what they return that is no tensor.
        UnavailableError: for a decoder that needs more than z.

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
    _checks.positive_int("num_samples", num_samples, at_least=2)  # a pair takes two draws
    _checks.positive_int("num_worst", num_worst)
    check_unconditional(decoder)
    _checks.positive_int("steps", steps, at_least=0)
    # Outside of inference mode, which has no derivatives.
    with torch.inference_mode(False), evaluation_mode(decoder), seeded(seed):
        z = prior_draws(decoder, num_samples, latent_dim, scale, sampler)
        spread = float(z.std(0).mean())
        if not spread > 0:
            raise ValueError("Expected prior draws that differ, got one point")
        nearest = torch.finfo(z.dtype).eps ** 0.25 * spread
        features = num_features(decoder, z[:2])

        def by_rows(compute: Callable[[Tensor], Tensor], rows: Tensor, numbers: int) -> Tensor:
            return torch.cat([compute(part) for part in split(rows, numbers, samples_per_pass, compute)])

        with torch.no_grad():
            rows_per_pass = len(split(z, features, samples_per_pass, partial(decode, decoder))[0])

            def images_of(part: Tensor) -> Tensor:
                return torch.cat([decode(decoder, rows) for rows in part.split(rows_per_pass)])

            # A few copies of the images, in double precision, are in memory at a time.
            at_a_time = max(1, memory.MOST_BYTES // (64 * features))
            pairs = _worst_pairs(z, images_of, at_a_time, nearest, num_worst)
            ratios = by_rows(partial(_ratios, decoder), z[pairs], 2 * features)

        wide = features * z.shape[1]
        ends = by_rows(partial(_singular_values, decoder), z, wide)
        values = ends[:, 0]

        def near_pairs(end: int) -> Tensor:
            """Near pairs along the directions that the Jacobian stretches least (0) or most (1), where it does."""
            at = z[ends[:, end].topk(min(num_worst, len(z)), largest=end == 1).indices]
            directions = by_rows(partial(_extreme_direction, decoder, end=end), at, wide)
            return torch.stack([at, at + 10 * nearest * directions], 1)

        def search(starts: Tensor, sign: float) -> tuple[Tensor, Tensor]:
            move = partial(_moved_along_the_ratio, decoder, spread=spread, nearest=nearest, sign=sign)
            parts = split(starts, 2 * features, samples_per_pass, partial(move, steps=min(steps, 1)))
            ratios, found = zip(*(move(part, steps=steps) for part in parts), strict=True)
            return torch.cat(ratios), torch.cat(found)

        worst_ratios, worst_pairs = search(torch.cat([z[pairs], near_pairs(0)]), 1.0)
        lipschitz, largest, largest_pair = lipschitz_constant(decoder), None, None
        if lipschitz is not None:
            large_ratios, large_pairs = search(near_pairs(1), -1.0)
            largest = max(float(large_ratios.max()), float(ends[:, 1].max()))
            largest_pair = large_pairs[large_ratios.argmax()]
    return LipschitzAudit(
        certified=certified_constant(decoder),
        prior_ratio=float(ratios.min()),
        worst_ratio=float(worst_ratios.min()),
        singular_value=float(values.min()),
        prior_pair=z[pairs[ratios.argmin()]],
        worst_pair=worst_pairs[worst_ratios.argmin()],
        singular_point=z[values.argmin()],
        lipschitz=lipschitz,
        largest=largest,
        largest_pair=largest_pair,
    )


def _worst_pairs(
    z: Tensor, images_of: Callable[[Tensor], Tensor], images_at_a_time: int, nearest: float, count: int
) -> Tensor:
    """Indices of shape (count, 2) of the pairs of draws, not too near, that have the smallest ratios."""
    # The images of all draws can be more than fits in memory. They are then made anew for each comparison.
    blocks = torch.arange(len(z), device=z.device).split(images_at_a_time)
    kept = images_of(z) if len(blocks) == 1 else None

    def images(block: Tensor) -> Tensor:
        return (images_of(z[block]) if kept is None else kept).double()

    # In double precision, since distances by matrix products cancel, and centered, so that they cancel less.
    points = z.double() - z.double().mean(0)
    mean = sum(images(block).sum(0) for block in blocks) / len(z)
    found = []
    for position, block in enumerate(blocks):
        own = images(block) - mean
        for other_block in blocks[position:]:
            others = own if other_block is block else images(other_block) - mean
            for part in split(torch.arange(len(block), device=z.device), len(other_block)):
                distances = torch.cdist(points[block[part]], points[other_block])
                ratios = torch.cdist(own[part], others) / distances
                ratios[(distances < nearest) | (block[part, None] >= other_block)] = math.inf
                smallest = ratios.flatten().topk(min(count, ratios.numel()), largest=False)
                i, j = smallest.indices // len(other_block), smallest.indices % len(other_block)
                found.append((smallest.values, torch.stack([block[part[i]], other_block[j]], 1)))
    values, pairs = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not values.isfinite().any():
        raise ValueError("Expected prior draws that differ, got none far enough apart to be told from rounding")
    best = values.topk(min(count, int(values.isfinite().sum())), largest=False).indices
    return pairs[best]


def _ratios(decoder: Callable[[Tensor], Tensor], pairs: Tensor) -> Tensor:
    """The ratios of pairs of shape (P, 2, K), in double precision."""
    eta = decode(decoder, pairs.flatten(0, 1)).reshape(*pairs.shape[:2], -1)
    return _ratio(eta.double(), pairs.double())


def _ratio(eta: Tensor, z: Tensor) -> Tensor:
    """||f(z) - f(z')|| / ||z - z'|| of pairs, for ``eta`` of shape (P, 2, D) and ``z`` of shape (P, 2, K)."""
    return (eta[:, 0] - eta[:, 1]).norm(dim=-1) / (z[:, 0] - z[:, 1]).norm(dim=-1)


def _singular_values(decoder: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The K-th (0 for D < K) and the first singular value of the Jacobian at each row of ``z``, of shape (N, 2)."""
    slopes = jacobian(decoder, z).double()
    values = torch.linalg.svdvals(slopes)
    smallest = values[:, -1] if slopes.shape[1] >= slopes.shape[2] else torch.zeros_like(values[:, -1])
    return torch.stack([smallest, values[:, 0]], 1)


def _extreme_direction(decoder: Callable[[Tensor], Tensor], z: Tensor, *, end: int) -> Tensor:
    """The unit vector that the Jacobian stretches least (0) or most (1) at each row of ``z``, of shape (N, K)."""
    slopes = jacobian(decoder, z).double()
    return torch.linalg.eigh(slopes.mT @ slopes).eigenvectors[..., -1 if end else 0].to(z.dtype)


def _moved_along_the_ratio(
    decoder: Callable[[Tensor], Tensor], pairs: Tensor, *, steps: int, spread: float, nearest: float, sign: float
) -> tuple[Tensor, Tensor]:
    """The smallest ratio on the way down from each pair, of shape (P,), and where it is, of shape (P, 2, K).

    With ``sign`` = -1 the largest on the way up.
    """
    gap = pairs[:, 1] - pairs[:, 0]
    length = gap.norm(dim=-1, keepdim=True)
    # A pair is a midpoint, a direction and the logarithm of a distance, so that near and far pairs learn alike.
    midpoint = (pairs.mean(1) / spread).requires_grad_()
    direction = (gap / length).requires_grad_()
    log_length = length.log().requires_grad_()
    coordinates = [midpoint, direction, log_length]
    optimizer = torch.optim.Adam(coordinates, lr=_LEARNING_RATE)
    best, best_pairs = torch.full_like(length[:, 0], sign * math.inf, dtype=torch.float64), pairs.clone()
    for step in range(steps + 1):
        half = 0.5 * log_length.exp() * direction / direction.norm(dim=-1, keepdim=True)
        at = torch.stack([spread * midpoint - half, spread * midpoint + half], 1)
        with torch.set_grad_enabled(step < steps):
            eta = decode(decoder, at.flatten(0, 1)).reshape(*at.shape[:2], -1)
        ratio = _ratio(eta.detach().double(), at.detach().double())
        better = sign * ratio < sign * best
        best[better], best_pairs[better] = ratio[better], at.detach()[better]
        if step == steps:
            break
        square = (eta[:, 0] - eta[:, 1]).square().sum(-1)
        # The smallest positive number keeps the gradient finite where two values are equal.
        objective = (square + torch.finfo(square.dtype).tiny).log() - 2 * log_length[:, 0]
        gradients = torch.autograd.grad(sign * objective.sum(), coordinates, materialize_grads=True)
        for coordinate, gradient in zip(coordinates, gradients, strict=True):
            coordinate.grad = gradient
        optimizer.step()
        with torch.no_grad():
            log_length.clamp_(min=math.log(nearest))
    return best, best_pairs
