r"""Likelihoods: from natural parameters eta to a Pyro distribution over data.

A likelihood is called as ``likelihood(eta, x=None)`` and returns a distribution whose batch shape ends in the shape of
one datum. Any callable of that form will do; :class:`~pyro_ilvae.protocols.Likelihood` says how to write one, and which
optional attributes it may have.

The likelihoods of this module know the Fisher information of one datum with respect to eta,

.. math:: I(\eta) = E_{p(x \mid \eta)}[s s^\top], \qquad s = \nabla_\eta \log p(x \mid \eta),

which is block-diagonal, with a block for each entry of the datum. ``information_product(eta, tangent)`` is the product
I v, and ``smallest_information(eta)`` is the smallest eigenvalue of each block.
"""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae._counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial, ZeroInflatedPoisson
from pyro_ilvae._exponential_family import ExponentialFamily, as_eta, as_mean, as_pair, as_tangent
from pyro_ilvae._normal import Normal
from pyro_ilvae.distributions import NaturalContinuousBernoulli

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
]

_NEWTON_STEPS = 8  # five reach the rounding error for every mean
_TOLERANCE = 1e-3  # of the sum of probabilities, which may have been rounded to half precision


def __dir__() -> list[str]:
    return __all__


class Bernoulli(ExponentialFamily):
    r"""Binary data, :math:`p(x_d = 1 \mid \eta) = 1 / (1 + e^{-\eta_d})`.

    Example:
        >>> Bernoulli()(torch.zeros(2)).mean
        tensor([0.5000, 0.5000])
    """

    support = constraints.boolean
    support_hint = "; binarize the data or use ContinuousBernoulli for intensities"

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        return dist.Bernoulli(logits=as_eta(eta))

    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`p (1 - p)`, of the shape of ``eta``."""
        eta = as_eta(eta)
        return torch.sigmoid(eta) * torch.sigmoid(-eta)

    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with a mean in (0, 1), :math:`\log(m / (1 - m))`, of the shape of ``mean``."""
        return as_mean(mean, 0, 1).logit()


class ContinuousBernoulli(ExponentialFamily):
    r"""Intensities in [0, 1], :math:`p(x_d \mid \eta) \propto e^{\eta_d x_d}`.

    References:
        Loaiza-Ganem & Cunningham 2019, The continuous Bernoulli, https://arxiv.org/abs/1907.06845

    Example:
        >>> ContinuousBernoulli()(torch.zeros(2)).mean
        tensor([0.5000, 0.5000])
    """

    support = constraints.unit_interval
    support_hint = "; divide intensities by their largest possible value"

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        return NaturalContinuousBernoulli(as_eta(eta))

    def smallest_information(self, eta: Tensor) -> Tensor:
        """The Fisher information of each entry, which is its variance, of the shape of ``eta``."""
        return NaturalContinuousBernoulli(as_eta(eta)).variance

    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with a mean in (0, 1), :math:`1 / (1 - e^{-\eta}) - 1 / \eta = m`, as ``mean``.

        Found by Newton's method in double precision, and differentiable once.
        """
        mean = as_mean(mean, 0, 1)
        m = mean.detach().double()
        # The size a of eta < 0 with the mean c <= 1/2, which eta > 0 mirrors. 1 / mean(-a) is nearly linear in a.
        c = torch.minimum(m, 1 - m)
        size = 6 - 12 * c  # where the tangent at 0 has the mean c, which is less than a because the mean is convex
        for _ in range(_NEWTON_STEPS):
            at = NaturalContinuousBernoulli(-size, validate_args=False)
            size = size + (1 / c - 1 / at.mean) * at.mean.square() / at.variance
            size = torch.minimum(size, 1 / c)
        size = torch.where(c < 1 / 40, 1 / c, size)  # the other term, 1 / (e^a - 1), is below the rounding
        eta = torch.copysign(size, m - 0.5)
        slope = NaturalContinuousBernoulli(eta, validate_args=False).variance.clamp(min=1e-300)
        return (eta + (mean.double() - m) / slope).to(mean.dtype)  # the second term is 0, and has the gradient


class Categorical(PyroModule):
    r"""One of C categories, :math:`p(x = c \mid \eta) \propto e^{\eta_c}`, with C the last dimension of eta.

    The softmax ignores a shift of all entries of eta, so the probabilities inherit the decoder's inverse Lipschitz
    constant only in the other C - 1 directions.

    Args:
        num_categories: the number :math:`C`, the last entry of the decoder's ``event_shape``.

    Example:
        >>> Categorical(num_categories=4)(torch.zeros(10, 3, 4)).batch_shape
        torch.Size([10, 3])
    """

    _kind = "likelihood"

    support_hint = ""
    integer_data = True
    depends_on_batch = False

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.num_categories = _checks.positive_int("num_categories", num_categories, at_least=2)

    def extra_repr(self) -> str:
        """The number of categories, for ``print``."""
        return f"num_categories={self.num_categories}"

    @property
    def support(self) -> constraints.Constraint:
        """The integers 0 ... C - 1."""
        return constraints.integer_interval(0, self.num_categories - 1)

    def _logits(self, value: Tensor, name: str = "eta") -> Tensor:
        eta = as_eta(value, name)
        _checks.last_dim(name, eta, self.num_categories)
        return eta

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape[:-1]``; ``x`` is not used."""
        eta = self._logits(eta)
        return dist.Categorical(logits=eta)

    def mean(self, eta: Tensor) -> Tensor:
        """The probabilities of the categories, of the shape of ``eta``: categories have no mean."""
        eta = self._logits(eta)
        return eta.softmax(-1)

    def divergence(self, eta: Tensor, other: Tensor) -> Tensor:
        r"""The divergence of each entry, :math:`\sum_c p_c \log(p_c / p'_c)`, in nats, of shape ``eta.shape[:-1]``.

        Computed in double precision.
        """
        eta, other = as_pair(self._logits(eta), self._logits(other, "other"))
        p, q = dist.Categorical(logits=eta.double()), dist.Categorical(logits=other.double())
        return torch.distributions.kl_divergence(p, q)

    def information_product(self, eta: Tensor, tangent: Tensor) -> Tensor:
        r"""The product :math:`(\operatorname{diag} p - p p^\top) v` of each entry, for a ``tangent`` v as ``eta``."""
        eta = self._logits(eta)
        p = eta.softmax(-1)
        tangent = as_tangent(tangent, eta)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def smallest_information(self, eta: Tensor) -> Tensor:
        """The smallest eigenvalue of each entry, of shape ``eta.shape[:-1]``: 0, for a shift of all categories."""
        eta = self._logits(eta)
        return torch.zeros_like(eta[..., 0])

    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with these probabilities of categories and mean 0, of the shape of ``mean``.

        .. math:: \eta_c = \log p_c - \frac1C \sum_{c'} \log p_{c'}.
        """
        mean = as_mean(self._logits(mean, "mean"), 0, 1)
        error = (mean.detach().double().sum(-1) - 1).abs()
        if (error > _TOLERANCE).any():
            raise ValueError(f"Expected mean to hold probabilities that sum to 1, got sums off by {error.max():.3g}")
        logits = mean.log()
        return logits - logits.mean(-1, keepdim=True)

    def _interior_mean(self, average: Tensor, num_data: int) -> Tensor:
        """The frequencies in ``num_data`` data, made positive by one datum that is spread over the categories."""
        return (num_data * average + 1 / self.num_categories) / (num_data + 1)


def check_support(likelihood: object, x: Tensor, site: str) -> None:
    """Raise a ValueError that names the ``site`` and the offending range if ``x`` is not in the likelihood's support.

    A likelihood without a ``support`` takes all finite data.
    """
    name = type(likelihood).__name__
    # A single pass over valid data, because every step of training checks its batch.
    if not torch.stack(x.aminmax()).isfinite().all():
        raise ValueError(
            f"Expected finite data at site '{site}', got {int((~x.isfinite()).sum())} NaN or infinite values"
        )
    support = getattr(likelihood, "support", None)
    if support is None or support is constraints.real:
        return
    valid = support.check(x)
    if not valid.all():
        low, high = x[~valid].min().item(), x[~valid].max().item()
        raise ValueError(
            f"Expected data at site '{site}' in the support of {name}, {support}, got {int((~valid).sum())} values "
            f"outside it, from {low:g} to {high:g}{getattr(likelihood, 'support_hint', '')}"
        )


def shape_of_datum(likelihood: object, event_shape: torch.Size) -> torch.Size | None:
    """The shape of one datum with natural parameters of shape ``event_shape``; None for a likelihood of a user."""
    forward = getattr(type(likelihood), "forward", None)  # which decides it, also in classes that users derive
    if forward not in [globals()[name].forward for name in __all__]:
        return None
    return event_shape[:-1] if isinstance(likelihood, Categorical) else event_shape


def mean_of_data(likelihood: Callable[..., TorchDistribution], eta: Tensor) -> Tensor:
    """The mean by the likelihood's own method ``mean``, or the mean of its distribution without such a method."""
    own = getattr(likelihood, "mean", None)
    mean: Tensor = likelihood(eta).mean if own is None else own(eta)
    return mean
