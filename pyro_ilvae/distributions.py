"""Distributions in the natural parameters of decoders, for which PyTorch's forms are slow, saturate or turn NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_ilvae import _checks
from pyro_ilvae._count_distributions import NaturalNegativeBinomial, NaturalPoisson, ZeroInflated
from pyro_ilvae._natural import Natural

__all__ = [
    "PADDING",
    "IsotropicNormal",
    "NaturalContinuousBernoulli",
    "NaturalNegativeBinomial",
    "NaturalPoisson",
    "TokenSequence",
    "ZeroInflated",
]

PADDING = -1  #: the number that fills a row of tokens after the last token of a shorter sequence


def innermost(distribution: Any) -> Any:
    """The distribution inside all wrappers: event dimensions, masks and transforms."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def without_event(distribution: Any) -> Any:
    """The distribution inside ``to_event``, with these dimensions as batch dimensions again."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


class IsotropicNormal(dist.Normal):
    r"""A Normal with one scale for all data, which the log density uses as it is, as a scalar for one number.

    .. math:: \log p(x \mid \mu) = -\tfrac12 (x - \mu)^2 / \sigma^2 - \log \sigma - \tfrac12 \log 2\pi.

    PyTorch's form expands the scale to all entries first, and computes a square and a logarithm for each of them.

    Args:
        loc: the mean :math:`\mu`, of any shape.
        scale: the standard deviation :math:`\sigma > 0`, of shape (), or of another one that broadcasts with ``loc``.

    Example:
        >>> IsotropicNormal(torch.zeros(3), torch.tensor(2.0)).log_prob(torch.zeros(3))
        tensor([-1.6121, -1.6121, -1.6121])
    """

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        loc = _checks.tensor("loc", loc)
        self.common_scale = scale = _checks.tensor("scale", scale)
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.common_scale = self.common_scale
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        error = (value - self.loc) / self.common_scale
        return -0.5 * error.square() - (self.common_scale.log() + 0.5 * math.log(2 * math.pi))


class NaturalContinuousBernoulli(Natural):
    r"""Intensities in [0, 1] with a density that is exponential in them.

    .. math:: \log p(x \mid \eta) = \eta x - \log \frac{e^\eta - 1}{\eta}
        = \eta (x - \tfrac12) - \log \frac{\sinh(\eta / 2)}{\eta / 2}.

    PyTorch's form takes probabilities and clamps them: for |eta| > 15 in float32 it is no density.

    Args:
        eta: the natural parameter :math:`\eta`, of any shape.

    References:
        Loaiza-Ganem & Cunningham 2019, The continuous Bernoulli, https://arxiv.org/abs/1907.06845

    Example:
        >>> NaturalContinuousBernoulli(torch.tensor([-200.0, 0.0, 200.0])).mean
        tensor([0.0050, 0.5000, 0.9950])
    """

    support = constraints.unit_interval
    has_rsample = True

    @property
    def mean(self) -> Tensor:
        r""":math:`1 / (1 - e^{-\eta}) - 1 / \eta`."""
        small = self.eta.abs() < 0.1
        eta = torch.where(small, torch.ones_like(self.eta), self.eta)
        near_zero = 0.5 + self.eta / 12 - self.eta**3 / 720 + self.eta**5 / 30240 - self.eta**7 / 1209600
        return torch.where(small, near_zero, -1 / torch.expm1(-eta) - 1 / eta)

    @property
    def variance(self) -> Tensor:
        r""":math:`1 / \eta^2 - 1 / (4 \sinh^2(\eta / 2))`."""
        small = self.eta.abs() < 2
        size = torch.where(small, torch.full_like(self.eta, 2), self.eta.abs())
        far = 1 / size**2 - torch.exp(-size) / torch.expm1(-size) ** 2
        # The two terms cancel near 0. A form in y = eta / 2 and the series of r = (sinh y - y) / y^3 has no such terms.
        y2 = torch.where(small, 0.25 * self.eta**2, torch.zeros_like(self.eta))
        r = torch.ones_like(self.eta)
        for n in range(8, 1, -1):
            r = 1 + y2 * r / (2 * n * (2 * n + 1))
        r = r / 6
        return torch.where(small, r * (2 + y2 * r) / (4 * (1 + y2 * r) ** 2), far)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws by the inverse of the distribution function, with gradients."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=self.eta.dtype, device=self.eta.device)
        small = self.eta.abs() < 1e-3
        # The inverse is for eta > 0. For eta < 0 the distribution is mirrored; near 0 a first-order expansion serves.
        size = torch.where(small, torch.ones_like(self.eta), self.eta.abs())
        above = torch.where(self.eta < 0, 1 - u, u)
        inverse = 1 + torch.log(above + (1 - above) * torch.exp(-size)) / size
        inverse = torch.where(self.eta < 0, 1 - inverse, inverse)
        return torch.where(small, u + 0.5 * self.eta * u * (1 - u), inverse).clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        size = self.eta.abs()
        small = size < 0.1
        safe = torch.where(small, torch.ones_like(size), size)
        # log(sinh(a / 2) / (a / 2)) for a = |eta|, because the function is even.
        log_sinhc = torch.where(
            small, self.eta**2 / 24 - self.eta**4 / 2880, safe / 2 + torch.log(-torch.expm1(-safe)) - torch.log(safe)
        )
        return self.eta * (value - 0.5) - log_sinhc


class TokenSequence(TorchDistribution):
    r"""Sequences of tokens of different lengths, each token given the tokens before it.

    .. math:: \log p(x) = \sum_{t \le T_x} \log \operatorname{softmax}(\eta_t)_{x_t},

    with :math:`T_x` the number of tokens before the padding. The padding has no density.

    The logits of a token depend on the tokens before it, so ``logits`` belong to one history, ``tokens``. Draws come
    from the function ``draw``, and the density at other tokens uses the function ``logits_of``.

    Args:
        logits: :math:`\eta` of shape (..., T, V).
        tokens: the history, of shape (..., T): numbers below V, followed by any amount of :data:`PADDING`.
        draw: a function from a batch shape to independent draws and their logits, of shapes (\*batch shape, T) and
            (\*batch shape, T, V); if None, ``sample`` returns the history.
        logits_of: a function from other tokens to their logits.
        drawn: whether the history is a draw, which the first call of ``sample`` then returns.

    Raises:
        ValueError: for logits and tokens of different lengths. Without ``logits_of``, ``log_prob`` raises it for tokens
            that are neither the history nor the last draw.

    Example:
        >>> tokens = torch.tensor([[1, 0], [1, PADDING]])
        >>> TokenSequence(torch.zeros(2, 2, 4), tokens).log_prob(tokens).exp()
        tensor([0.0625, 0.2500])
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 2)}  # noqa: RUF012 - PyTorch's form

    def __init__(
        self,
        logits: Tensor,
        tokens: Tensor,
        draw: Callable[[torch.Size], tuple[Tensor, Tensor]] | None = None,
        logits_of: Callable[[Tensor], Tensor] | None = None,
        *,
        drawn: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        logits, tokens = _checks.tensor("logits", logits), _checks.tensor("tokens", tokens)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"Expected tokens of dtype torch.int64, got {tokens.dtype}")
        if logits.shape[-2:-1] != tokens.shape[-1:]:
            raise ValueError(
                f"Expected logits of shape (..., T, V) for tokens of shape (..., T), got {tuple(logits.shape)} and "
                f"{tuple(tokens.shape)}"
            )
        self.logits = logits
        self.tokens = tokens
        self._draw = draw
        self._logits_of = logits_of
        self._drawn = drawn
        self._last_draw: tuple[Tensor, Tensor] | None = None
        batch_shape = torch.broadcast_shapes(logits.shape[:-2], tokens.shape[:-1])
        super().__init__(batch_shape, tokens.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            self._check_tokens(tokens)

    @property
    def support(self) -> constraints.Constraint:
        """Rows of the integers from :data:`PADDING` to V - 1."""
        return constraints.independent(constraints.integer_interval(PADDING, self.logits.shape[-1] - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.logits, new.tokens, new._drawn, new._last_draw = self.logits, self.tokens, self._drawn, self._last_draw
        new._draw, new._logits_of = self._draw, self._logits_of
        super(TokenSequence, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, of shape (..., T)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        # A history with fewer dimensions than the shape asked for would repeat one draw along the other dimensions.
        if self._draw is None or (self._drawn and self.tokens.shape == shape):
            self._drawn = False
            return self.tokens.expand(shape)
        self._last_draw = self._draw(shape[:-1])
        return self._last_draw[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats."""
        logits = self._logits_at(value)
        batch_shape = torch.broadcast_shapes(logits.shape[:-2], value.shape[:-1])
        targets = value.expand(*batch_shape, -1)
        # One fused pass, because a normalized copy of the logits would be the largest tensor of a step.
        nats = cross_entropy(
            logits.expand(*batch_shape, *logits.shape[-2:]).flatten(0, -2),
            targets.flatten(),
            ignore_index=PADDING,
            reduction="none",
        )
        return -nats.reshape(targets.shape).sum(-1).expand(torch.broadcast_shapes(batch_shape, self.batch_shape))

    def _logits_at(self, value: Tensor) -> Tensor:
        known = [(self.tokens, self.logits), *([] if self._last_draw is None else [self._last_draw])]
        for tokens, logits in known:
            # The identity first: comparing values waits for the device, and a step of training should not.
            if value is tokens or (value.shape[-1] == tokens.shape[-1] and bool((value == tokens).all())):
                return logits
        if self._logits_of is None:
            raise ValueError(
                f"Expected the tokens that the logits were computed for, got others, of shape {tuple(value.shape)}"
            )
        self._check_tokens(value)
        return self._logits_of(value)

    def _check_tokens(self, value: Tensor) -> None:
        inside = (value >= PADDING) & (value < self.logits.shape[-1])
        if not inside.all():
            raise ValueError(f"Expected tokens from {PADDING} to {self.logits.shape[-1] - 1}, got {value[~inside][0]}")
