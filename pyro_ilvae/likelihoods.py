r"""Likelihoods: from natural parameters eta to a Pyro distribution over data.

Each is called as ``likelihood(eta, x=None)`` and returns a distribution whose batch shape ends in the shape of one
datum. Any callable of that form can take its place; :class:`~pyro_ilvae.protocols.Likelihood` lists what else a
likelihood may say about itself, and how to write one.

Each knows the Fisher information of one datum with respect to eta,

.. math:: I(\eta) = E_{p(x \mid \eta)}[s s^\top], \qquad s = \nabla_\eta \log p(x \mid \eta),

which is block-diagonal, with a block for each entry of the datum: ``information_product(eta, tangent)`` is I v, and
``smallest_information(eta)`` the smallest eigenvalue of each block.
"""

import math
from collections.abc import Callable
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae.distributions import IsotropicNormal, NaturalContinuousBernoulli, NaturalPoisson

__all__ = ["Bernoulli", "Categorical", "ContinuousBernoulli", "NegativeBinomial", "Normal", "Poisson"]


class _Entrywise(PyroModule):
    """Likelihoods with one natural parameter for each entry of a datum, whose Fisher information is a diagonal."""

    support_hint = ""
    integer_data = False
    depends_on_batch = False
    smallest_information: Callable[[Tensor], Tensor]

    @pyro_method
    def mean(self, eta: Tensor) -> Tensor:
        """The mean of a datum, of the shape of ``eta``."""
        return self(eta).mean  # type: ignore[no-any-return]

    @pyro_method
    def divergence(self, eta: Tensor, other: Tensor) -> Tensor:
        r"""The divergence of each entry, :math:`\mathrm{KL}(p(x_d \mid \eta_d) \| p(x_d \mid \eta'_d))`, in nats.

        Computed in double precision, of the shape of ``eta``.
        """
        p, q = self(eta.double()), self(other.double())
        # log p(x) - log q(x) is linear in x, so its expectation is its value at the mean, which need not be in the
        # support. PyTorch's own formulas are infinite as soon as a probability rounds to one.
        mean = p.mean
        p._validate_args = q._validate_args = False
        return p.log_prob(mean) - q.log_prob(mean)  # type: ignore[no-any-return]

    def information_product(self, eta: Tensor, tangent: Tensor) -> Tensor:
        r"""The product :math:`I(\eta) v` with ``tangent`` v, whose shape ends in that of ``eta``."""
        return self.smallest_information(eta) * tangent


class Normal(_Entrywise):
    r"""Independent Normal noise around the decoder's output.

    .. math:: p(x \mid \eta) = \prod_d N(x_d \mid \eta_d, \sigma^2).

    Args:
        scale: the standard deviation :math:`\sigma`, or where its estimate starts.
        estimate: "fixed"; "learned", one scalar trained with the rest; or "optimal", the maximum likelihood value
            :math:`\sigma^2 = \operatorname{mean} (x - \eta)^2` over each training batch (sigma-VAE [1]). The last one
            is remembered as a running average, which is used whenever no gradient is asked for, in ``eval()`` mode
            and without data, so that evaluation does not depend on how data are batched.

    Raises:
        ValueError: for a scale that is not positive, or another ``estimate``.

    References:
        [1] Rybkin, Daniilidis & Levine 2021, Simple and effective VAE training with calibrated decoders,
        https://arxiv.org/abs/2006.13202

    Example:
        >>> likelihood = Normal(scale=0.1)
        >>> likelihood(torch.zeros(5, 8)).scale.unique()
        tensor([0.1000])
    """

    support = constraints.real
    _momentum = 0.05

    def __init__(self, scale: float = 1.0, estimate: Literal["fixed", "learned", "optimal"] = "fixed") -> None:
        super().__init__()
        self.estimate = _checks.choice("estimate", estimate, ("fixed", "learned", "optimal"))
        log_scale = torch.tensor(math.log(_checks.positive("scale", scale)))
        if estimate == "learned":
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.register_buffer("num_updates", torch.tensor(0))

    log_scale: Tensor
    num_updates: Tensor

    def extra_repr(self) -> str:
        """The scale and how it is found, for ``print``."""
        return f"scale={float(self.log_scale.detach().exp()):.4g}, estimate={self.estimate!r}"

    @property
    def scale(self) -> Tensor:
        r"""The standard deviation :math:`\sigma` in use without data, a tensor of shape ()."""
        return self.log_scale.exp()

    @property
    def noise_scale(self) -> Tensor:
        r"""The standard deviation :math:`\sigma` of Normal noise around eta, the same for all entries."""
        return self.scale

    @property
    def depends_on_batch(self) -> bool:  # type: ignore[override]
        """Whether the density of a datum depends on the other data of its batch."""
        return self.estimate == "optimal"

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` serves the optimal scale only."""
        scale = self.scale
        if self.estimate == "optimal" and x is not None and self.training and torch.is_grad_enabled():
            # At its optimum the scale has no first-order effect on the loss, so no gradient flows through it.
            log_scale = 0.5 * (x - eta.detach()).square().mean().clamp(min=1e-12).log()
            scale = log_scale.exp()
            if log_scale.isfinite():  # a step that will be refused must not enter the average
                weight = 1.0 if self.num_updates == 0 else self._momentum
                self.log_scale.lerp_(log_scale.to(self.log_scale.dtype), weight)
                self.num_updates += 1
        return IsotropicNormal(eta, scale)

    @pyro_method
    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`1 / \sigma^2` at the scale in use without data, as ``eta``."""
        return torch.ones_like(eta) / self.scale.square()


class Bernoulli(_Entrywise):
    r"""Binary data, :math:`p(x_d = 1 \mid \eta) = 1 / (1 + e^{-\eta_d})`.

    Example:
        >>> Bernoulli()(torch.zeros(2)).mean
        tensor([0.5000, 0.5000])
    """

    support = constraints.boolean
    support_hint = "; binarize the data or use ContinuousBernoulli for intensities"

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        return dist.Bernoulli(logits=eta)

    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`p (1 - p)`, of the shape of ``eta``."""
        return torch.sigmoid(eta) * torch.sigmoid(-eta)


class ContinuousBernoulli(_Entrywise):
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
        return NaturalContinuousBernoulli(eta)

    def smallest_information(self, eta: Tensor) -> Tensor:
        """The Fisher information of each entry, which is its variance, of the shape of ``eta``."""
        return NaturalContinuousBernoulli(eta).variance


class Categorical(PyroModule):
    r"""One of C categories, :math:`p(x = c \mid \eta) \propto e^{\eta_c}`, with C the last dimension of eta.

    The softmax ignores a shift of all entries of eta, so the inverse Lipschitz constant of the decoder carries over to
    the probabilities only in the other C - 1 directions.

    Args:
        num_categories: the number :math:`C`, the last entry of the decoder's ``event_shape``.

    Example:
        >>> Categorical(num_categories=4)(torch.zeros(10, 3, 4)).batch_shape
        torch.Size([10, 3])
    """

    support_hint = ""
    integer_data = True
    depends_on_batch = False

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.num_categories = _checks.positive_int("num_categories", num_categories)

    def extra_repr(self) -> str:
        """The number of categories, for ``print``."""
        return f"num_categories={self.num_categories}"

    @property
    def support(self) -> constraints.Constraint:
        """The integers 0 ... C - 1."""
        return constraints.integer_interval(0, self.num_categories - 1)

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape[:-1]``; ``x`` is not used."""
        _checks.last_dim("eta", eta, self.num_categories)
        return dist.Categorical(logits=eta)

    def mean(self, eta: Tensor) -> Tensor:
        """The probabilities of the categories, of the shape of ``eta``: categories have no mean."""
        _checks.last_dim("eta", eta, self.num_categories)
        return eta.softmax(-1)

    def divergence(self, eta: Tensor, other: Tensor) -> Tensor:
        r"""The divergence of each entry, :math:`\sum_c p_c \log(p_c / p'_c)`, in nats, of shape ``eta.shape[:-1]``.

        Computed in double precision.
        """
        _checks.last_dim("eta", eta, self.num_categories)
        p, q = dist.Categorical(logits=eta.double()), dist.Categorical(logits=other.double())
        return torch.distributions.kl_divergence(p, q)

    def information_product(self, eta: Tensor, tangent: Tensor) -> Tensor:
        r"""The product :math:`(\operatorname{diag} p - p p^\top) v` for each entry, with ``tangent`` v as ``eta``."""
        _checks.last_dim("eta", eta, self.num_categories)
        p = eta.softmax(-1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def smallest_information(self, eta: Tensor) -> Tensor:
        """The smallest eigenvalue of each entry, of shape ``eta.shape[:-1]``: 0, that of a shift of all categories."""
        _checks.last_dim("eta", eta, self.num_categories)
        return torch.zeros_like(eta[..., 0])


class Poisson(_Entrywise):
    r"""Counts with rate :math:`e^{\eta_d}`.

    Example:
        >>> Poisson()(torch.zeros(2)).mean
        tensor([1., 1.])
    """

    support = constraints.nonnegative_integer

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        return NaturalPoisson(eta)

    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`e^\eta`, of the shape of ``eta``."""
        return eta.exp()


class NegativeBinomial(_Entrywise):
    r"""Overdispersed counts with logits eta: mean :math:`r e^{\eta_d}`, variance :math:`r e^{\eta_d}(1 + e^{\eta_d})`.

    Args:
        total_count: the number :math:`r > 0`, or where its estimate starts.
        estimate: "fixed" or "learned", one scalar trained with the rest.

    Raises:
        ValueError: for a ``total_count`` that is not positive, or another ``estimate``.

    Example:
        >>> NegativeBinomial(total_count=3.0, estimate="fixed")(torch.zeros(2)).mean
        tensor([3., 3.])
    """

    support = constraints.nonnegative_integer

    def __init__(self, total_count: float = 1.0, estimate: Literal["fixed", "learned"] = "learned") -> None:
        super().__init__()
        log_total_count = torch.tensor(math.log(_checks.positive("total_count", total_count)))
        if _checks.choice("estimate", estimate, ("fixed", "learned")) == "learned":
            self.log_total_count = nn.Parameter(log_total_count)
        else:
            self.register_buffer("log_total_count", log_total_count)

    log_total_count: Tensor

    def extra_repr(self) -> str:
        """The total count, for ``print``."""
        return f"total_count={float(self.log_total_count.detach().exp()):.4g}"

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        return dist.NegativeBinomial(self.log_total_count.exp(), logits=eta)

    @pyro_method
    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`r / (1 + e^{-\eta})`, of the shape of ``eta``."""
        return self.log_total_count.exp() * torch.sigmoid(eta)


def check_support(likelihood: object, x: Tensor, site: str) -> None:
    """Raise a ValueError that names the ``site`` and the offending range if ``x`` is not in the likelihood's support.

    A likelihood without a ``support`` is asked for finite data only.
    """
    name = type(likelihood).__name__
    # One pass over data that are as they should be, at every step of training.
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


def mean_of_data(likelihood: Callable[..., TorchDistribution], eta: Tensor) -> Tensor:
    """What the likelihood gives as its mean, or else the mean of its distribution."""
    own = getattr(likelihood, "mean", None)
    mean: Tensor = likelihood(eta).mean if own is None else own(eta)
    return mean
