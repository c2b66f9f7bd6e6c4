"""Likelihoods of counts, and of counts with more zeros than these have."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_ilvae import _checks
from pyro_ilvae._exponential_family import (
    ExponentialFamily,
    IndependentEntries,
    as_eta,
    as_mean,
    as_pair,
    log_of,
    logits_of,
)
from pyro_ilvae.distributions import NaturalNegativeBinomial, NaturalPoisson, ZeroInflated
from pyro_ilvae.networks import public_method


class Poisson(ExponentialFamily):
    r"""Counts with rate :math:`e^{\eta_d}`.

    Example:
        >>> Poisson()(torch.zeros(2)).mean
        tensor([1., 1.])
    """

    support = constraints.nonnegative_integer
    _natural_directions = True

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        return NaturalPoisson(as_eta(eta))

    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`e^\eta`, of the shape of ``eta``."""
        return as_eta(eta).exp()

    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with a mean above 0, :math:`\log m`, of the shape of ``mean``."""
        return as_mean(mean, 0, math.inf).log()


class NegativeBinomial(ExponentialFamily):
    r"""Overdispersed counts with logits eta: mean :math:`r e^{\eta_d}`, variance :math:`r e^{\eta_d}(1 + e^{\eta_d})`.

    Args:
        total_count: the number :math:`r > 0`, or the value at which its estimate starts: a number, equal for all
            entries of a datum, or a tensor or array of the shape of a datum, with a number :math:`r_d` for each.
        estimate: "fixed", or "learned" for a parameter of the shape of ``total_count``, trained with the other
            parameters.

    Raises:
        ValueError: for a ``total_count`` that is not positive, for natural parameters whose shape does not end in the
            shape of ``total_count``, and for another ``estimate``.
        TypeError: for a ``total_count`` that is neither a number nor a tensor nor an array.

    Example:
        >>> NegativeBinomial(total_count=3.0, estimate="fixed")(torch.zeros(2)).mean
        tensor([3., 3.])
        >>> NegativeBinomial(total_count=torch.tensor([1.0, 5.0]), estimate="fixed")(torch.zeros(2)).variance
        tensor([ 2., 10.])
    """

    support = constraints.nonnegative_integer
    _natural_directions = True

    def __init__(self, total_count: float | Tensor = 1.0, estimate: Literal["fixed", "learned"] = "learned") -> None:
        super().__init__()
        self.estimate = _checks.choice("estimate", estimate, ("fixed", "learned"))
        _store(self, estimate, "log_total_count", log_of("total_count", total_count))

    log_total_count: Tensor

    def extra_repr(self) -> str:
        """The total count and its estimate, for ``print``."""
        return f"total_count={self._shown('log_total_count')}, estimate={self.estimate!r}"

    @property
    def total_count(self) -> Tensor:
        """The number :math:`r`, of shape () or of the shape of a datum."""
        return self.log_total_count.exp()

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        eta = as_eta(eta)
        return NaturalNegativeBinomial(self._beside("log_total_count", eta).exp(), eta)

    @public_method
    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, :math:`r / (1 + e^{-\eta})`, of the shape of ``eta``."""
        eta = as_eta(eta)
        return self._beside("log_total_count", eta).exp() * torch.sigmoid(eta)

    @public_method
    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with a mean above 0, :math:`\log(m / r)`, of the shape of ``mean``."""
        mean = as_mean(mean, 0, math.inf)
        return mean.log() - self._beside("log_total_count", mean)


class _ZeroInflatedCounts(IndependentEntries):
    """Counts of an exponential family, each of them 0 instead with a probability that is the same for all eta.

    A class that derives from it says what the distribution and the Fisher information of the counts are.
    """

    support = constraints.nonnegative_integer
    _natural_directions = True

    def __init__(self, gate: float | Tensor, estimate: Literal["fixed", "learned"]) -> None:
        super().__init__()
        self.estimate = _checks.choice("estimate", estimate, ("fixed", "learned"))
        _store(self, estimate, "gate_logits", logits_of("gate", gate))

    gate_logits: Tensor
    _counts: Callable[[Tensor], NaturalPoisson | NaturalNegativeBinomial]  # the distribution without inflation
    _count_information: Callable[[Tensor], Tensor]  # its Fisher information I; the score of a count of 0 is -I

    @property
    def gate(self) -> Tensor:
        r"""The probability :math:`\pi` of an extra zero, of shape () or of the shape of a datum."""
        return self.gate_logits.sigmoid()

    def extra_repr(self) -> str:
        """The parameters and their estimate, for ``print``."""
        return f"gate={self._shown('gate_logits')}, estimate={self.estimate!r}"

    def forward(self, eta: Tensor, x: Tensor | None = None) -> TorchDistribution:
        """The distribution of batch shape ``eta.shape``; ``x`` is not used."""
        eta = as_eta(eta)
        return ZeroInflated(self._counts(eta), self._beside("gate_logits", eta))

    @public_method
    def divergence(self, eta: Tensor, other: Tensor) -> Tensor:
        r"""The divergence of each entry, :math:`\mathrm{KL}(p(x_d \mid \eta_d) \| p(x_d \mid \eta'_d))`, in nats.

        With :math:`p_0` the counts without inflation and :math:`P_0 = \pi + (1 - \pi) p_0(0)` it is

        .. math:: (1 - \pi) \Big( \mathrm{KL}(p_0 \| p'_0) - p_0(0) \log \frac{p_0(0)}{p'_0(0)} \Big)
            + P_0 \log \frac{P_0}{P'_0}.

        Computed in double precision, of the shape of ``eta``.
        """
        eta, other = as_pair(eta, other)
        p, q = self(eta.double()), self(other.double())
        zero = eta.new_zeros(())
        # log p_0(x) - log p'_0(x) is linear in x, so its expectation is its value at the mean, which need not be an
        # integer. Above 0 the inflated densities differ by a factor that cancels.
        mean = p.counts.mean
        all_counts = p.counts._in_double(mean) - q.counts._in_double(mean)
        log_p0, log_q0 = p.counts._in_double(zero), q.counts._in_double(zero)
        above = all_counts - log_p0.exp() * (log_p0 - log_q0)
        p._validate_args = q._validate_args = False
        at_zero = p.log_prob(zero)
        rest = torch.sigmoid(-p.gate_logits.double())
        # The two terms cancel for parameters that are nearly the same.
        return (rest * above + at_zero.exp() * (at_zero - q.log_prob(zero))).clamp(min=0)

    @public_method
    def smallest_information(self, eta: Tensor) -> Tensor:
        r"""The Fisher information of each entry, of the shape of ``eta``.

        With :math:`I_0` and :math:`p_0` the information and density of the counts without inflation, whose score at 0
        is :math:`-I_0`, and :math:`w = (1 - \pi) p_0(0) / (\pi + (1 - \pi) p_0(0))` the probability that a zero is none
        of the extra ones, the score at 0 is :math:`-w I_0` and the information

        .. math:: I = (1 - \pi) I_0 \, \big( 1 - (1 - w) \, I_0 \, p_0(0) \big), \qquad I_0 \, p_0(0) \le 1 / e.
        """
        eta = as_eta(eta)
        counts, logits = self._counts(eta), self._beside("gate_logits", eta)
        information = self._count_information(eta)
        log_p0 = counts._in_double(eta.new_zeros(())).to(eta.dtype)
        # Where the information has no number, p_0(0) is 0, and so is their product.
        lost = information.clamp(max=torch.finfo(eta.dtype).max) * log_p0.exp() * torch.sigmoid(logits - log_p0)
        return torch.sigmoid(-logits) * information * (1 - lost)

    def _log_share(self, mean: Tensor) -> Tensor:
        r"""The logarithm of :math:`1 - \pi`, which the mean of the counts is multiplied by."""
        return nn.functional.logsigmoid(-self._beside("gate_logits", mean))


class ZeroInflatedPoisson(_ZeroInflatedCounts):
    r"""Counts with rate :math:`e^{\eta_d}`, each of them 0 instead with probability :math:`\pi`.

    .. math:: p(x_d \mid \eta) = \pi \, 1[x_d = 0] + (1 - \pi) \, \mathrm{Poisson}(x_d \mid e^{\eta_d}).

    A shift of :math:`\eta_d` by :math:`\log s` multiplies the mean, :math:`(1 - \pi) e^{\eta_d}`, by s.
    The logits of :math:`\pi` are the attribute ``gate_logits``, which a ``PyroSample`` may replace.

    Args:
        gate: the probability :math:`\pi` in (0, 1), or the value at which its estimate starts: a number, equal for all
            entries of a datum, or a tensor or array of the shape of a datum, with a probability :math:`\pi_d` for each.
        estimate: "fixed", or "learned" for a parameter of the shape of ``gate``, trained with the other parameters.

    Raises:
        ValueError: for a ``gate`` outside (0, 1), for natural parameters whose shape does not end in the shape of
            ``gate``, and for another ``estimate``.
        TypeError: for a ``gate`` that is neither a number nor a tensor nor an array.

    References:
        Lambert 1992, Zero-inflated Poisson regression, with an application to defects in manufacturing,
        Technometrics 34, https://doi.org/10.2307/1269547

    Example:
        >>> ZeroInflatedPoisson(gate=0.25, estimate="fixed")(torch.zeros(2)).mean
        tensor([0.7500, 0.7500])
    """

    def __init__(self, gate: float | Tensor = 0.1, estimate: Literal["fixed", "learned"] = "learned") -> None:
        super().__init__(gate, estimate)

    def _counts(self, eta: Tensor) -> NaturalPoisson:
        return NaturalPoisson(eta)

    def _count_information(self, eta: Tensor) -> Tensor:
        return eta.exp()

    @public_method
    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with a mean above 0, :math:`\log(m / (1 - \pi))`, of the shape of ``mean``."""
        mean = as_mean(mean, 0, math.inf)
        return mean.log() - self._log_share(mean)


class ZeroInflatedNegativeBinomial(_ZeroInflatedCounts):
    r"""Overdispersed counts with logits eta, each of them 0 instead with probability :math:`\pi`.

    .. math:: p(x_d \mid \eta) = \pi \, 1[x_d = 0] + (1 - \pi) \, \mathrm{NB}(x_d \mid r, \eta_d),

    with NB the distribution of :class:`NegativeBinomial`. A shift of :math:`\eta_d` by :math:`\log s` multiplies the
    mean, :math:`(1 - \pi) r e^{\eta_d}`, by s. The attributes ``log_total_count`` and ``gate_logits``, the logits of
    :math:`\pi`, may be replaced by a ``PyroSample``.

    Args:
        total_count: the number :math:`r > 0`, or the value at which its estimate starts: a number, equal for all
            entries of a datum, or a tensor or array of the shape of a datum, with a number :math:`r_d` for each.
        gate: the probability :math:`\pi` in (0, 1), or the value at which its estimate starts, in the same forms.
        estimate: "fixed", or "learned" for parameters of the shapes of ``total_count`` and ``gate``, trained with the
            other parameters.

    Raises:
        ValueError: for a ``total_count`` that is not positive, for a ``gate`` outside (0, 1), for natural parameters
            whose shape does not end in the shapes of both, and for another ``estimate``.
        TypeError: for a ``total_count`` or a ``gate`` that is neither a number nor a tensor nor an array.

    References:
        Greene 1994, Accounting for excess zeros and sample selection in Poisson and negative binomial regression
        models, NYU Working Paper EC-94-10, https://ssrn.com/abstract=1293115

    Example:
        >>> ZeroInflatedNegativeBinomial(total_count=2.0, gate=0.25, estimate="fixed")(torch.zeros(2)).mean
        tensor([1.5000, 1.5000])
    """

    def __init__(
        self,
        total_count: float | Tensor = 1.0,
        gate: float | Tensor = 0.1,
        estimate: Literal["fixed", "learned"] = "learned",
    ) -> None:
        super().__init__(gate, estimate)
        _store(self, estimate, "log_total_count", log_of("total_count", total_count))

    log_total_count: Tensor

    @property
    def total_count(self) -> Tensor:
        """The number :math:`r`, of shape () or of the shape of a datum."""
        return self.log_total_count.exp()

    def extra_repr(self) -> str:
        """The parameters and their estimate, for ``print``."""
        return f"total_count={self._shown('log_total_count')}, {super().extra_repr()}"

    def _counts(self, eta: Tensor) -> NaturalNegativeBinomial:
        return NaturalNegativeBinomial(self._beside("log_total_count", eta).exp(), eta)

    def _count_information(self, eta: Tensor) -> Tensor:
        return self._beside("log_total_count", eta).exp() * torch.sigmoid(eta)

    @public_method
    def natural_parameters(self, mean: Tensor) -> Tensor:
        r"""The natural parameters with a mean above 0, :math:`\log(m / ((1 - \pi) r))`, of the shape of ``mean``."""
        mean = as_mean(mean, 0, math.inf)
        return mean.log() - self._log_share(mean) - self._beside("log_total_count", mean)


def _store(likelihood: nn.Module, estimate: str, name: str, value: Tensor) -> None:
    """Give the likelihood a parameter, or a buffer if it is fixed."""
    if estimate == "learned":
        setattr(likelihood, name, nn.Parameter(value))
    else:
        likelihood.register_buffer(name, value)
