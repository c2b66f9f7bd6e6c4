"""Distributions over counts. Their densities are computed in double precision, where PyTorch's terms cancel.

For a count of a million the terms of a log density are about 1e7, and a density in single precision is off by 1 nat.
"""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ilvae import _checks
from pyro_ilvae._natural import Natural


def _wide(value: Tensor) -> Tensor:
    """The value in double precision, where a device has it."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


class NaturalPoisson(Natural):
    r"""Counts with log rate eta.

    .. math:: \log p(x \mid \eta) = x \eta - e^\eta - \log x!.

    PyTorch's form takes the rate, which underflows for eta < -104 in float32 and makes the gradient NaN.

    Args:
        eta: the log rate :math:`\eta`, of any shape.

    Example:
        >>> NaturalPoisson(torch.tensor(-200.0)).log_prob(torch.tensor(1.0))
        tensor(-200.)
    """

    support = constraints.nonnegative_integer

    @property
    def mean(self) -> Tensor:
        """The rate."""
        return self.eta.exp()

    @property
    def variance(self) -> Tensor:
        """The rate."""
        return self.eta.exp()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, without gradients."""
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self._in_double(value).to(torch.result_type(self.eta, value))

    def _in_double(self, value: Tensor) -> Tensor:
        """The log density in double precision, of values that are not checked."""
        eta, value = _wide(self.eta), _wide(value)
        return value * eta - eta.exp() - torch.lgamma(value + 1)


class NaturalNegativeBinomial(dist.NegativeBinomial):
    r"""Counts with logits eta, PyTorch's distribution with a log density to more digits.

    .. math:: \log p(x \mid \eta) = \log \Gamma(x + r) - \log \Gamma(r) - \log x!
        - r \log(1 + e^\eta) - x \log(1 + e^{-\eta}).

    Args:
        total_count: the number :math:`r > 0`, of any shape that broadcasts with ``logits``.
        logits: the natural parameter :math:`\eta`, of any shape.

    Example:
        >>> NaturalNegativeBinomial(torch.tensor(1.0), torch.tensor(0.0)).log_prob(torch.tensor(1e6))
        tensor(-693147.8750)
    """

    def __init__(self, total_count: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        logits = _checks.tensor("logits", logits)
        self.common_total_count = total_count = _checks.tensor("total_count", total_count)
        super().__init__(total_count, logits=logits, validate_args=validate_args)

    @property
    def eta(self) -> Tensor:
        """The logits."""
        return self.logits

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.common_total_count = self.common_total_count
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self._in_double(value).to(torch.result_type(self.eta, value))

    def _in_double(self, value: Tensor) -> Tensor:
        """The log density in double precision, of values that are not checked."""
        # The total count as it was given, because a number needs the Gamma function once and not for each entry.
        eta, r, value = _wide(self.eta), _wide(self.common_total_count), _wide(value)
        ways = torch.lgamma(value + r) - torch.lgamma(r) - torch.lgamma(value + 1)
        return r * logsigmoid(-eta) + value * logsigmoid(eta) + ways


class ZeroInflated(TorchDistribution):
    r"""Counts with more zeros than a Poisson or negative binomial distribution has.

    .. math:: p(x) = \pi \, 1[x = 0] + (1 - \pi) \, p_0(x).

    Pyro's form of the Poisson takes the rate, with the limits of PyTorch's form, and the variance is NaN for large
    means.

    Args:
        counts: the distribution :math:`p_0`, a :class:`NaturalPoisson` or a :class:`NaturalNegativeBinomial`.
        gate_logits: the logits of :math:`\pi`, of any shape that broadcasts with the batch shape of ``counts``.

    References:
        Lambert 1992, Zero-inflated Poisson regression, with an application to defects in manufacturing, Technometrics

    Example:
        >>> counts = NaturalPoisson(torch.tensor([-200.0, 0.0, 80.0]))
        >>> ZeroInflated(counts, torch.tensor(0.0)).log_prob(torch.zeros(3)).exp()
        tensor([1.0000, 0.6839, 0.5000])
    """

    arg_constraints = {"gate_logits": constraints.real}  # noqa: RUF012 - PyTorch's name and form
    support = constraints.nonnegative_integer

    def __init__(
        self,
        counts: NaturalPoisson | NaturalNegativeBinomial,
        gate_logits: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        kinds = (NaturalPoisson, NaturalNegativeBinomial)
        _checks.instance("counts", counts, kinds, "a NaturalPoisson or a NaturalNegativeBinomial")
        self.gate_logits = gate_logits = _checks.tensor("gate_logits", gate_logits)
        batch_shape = torch.broadcast_shapes(counts.batch_shape, gate_logits.shape)
        self.counts = counts.expand(batch_shape)  # not base_dist, which would be taken for the inside of a wrapper
        super().__init__(batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.gate_logits = self.gate_logits
        new.counts = self.counts.expand(batch_shape)
        super(ZeroInflated, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        r"""The mean, :math:`(1 - \pi) \mu` with :math:`\mu` the mean of ``counts``."""
        return torch.sigmoid(-self.gate_logits) * self.counts.mean

    @property
    def variance(self) -> Tensor:
        r"""The variance, :math:`(1 - \pi)(v + \pi \mu^2)`, from mean :math:`\mu` and variance v of ``counts``."""
        mean = self.counts.mean
        gate, rest = torch.sigmoid(self.gate_logits), torch.sigmoid(-self.gate_logits)
        return rest * self.counts.variance + (rest * mean) * (gate * mean)  # without a square that has no number

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, without gradients."""
        with torch.no_grad():
            draws = self.counts.sample(torch.Size(sample_shape))
            is_zero = torch.bernoulli(torch.sigmoid(self.gate_logits).expand(draws.shape)).bool()
            return draws.masked_fill(is_zero, 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats."""
        if self._validate_args:
            self._validate_sample(value)
        logits = _wide(self.gate_logits)
        nats = logsigmoid(-logits) + self.counts._in_double(value)
        # In double precision both are finite, also where single precision has no number for the rate.
        log_gate = logsigmoid(logits)
        # log(pi + e^nats), in a form whose second derivatives are finite too.
        nats = torch.where(value == 0, log_gate - logsigmoid(log_gate - nats), nats)
        return nats.to(torch.result_type(self.counts.eta, value))
