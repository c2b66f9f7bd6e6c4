"""What the likelihoods of independent entries share."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.networks import Module, public_method


class IndependentEntries(Module):
    """Likelihoods of independent entries, whose Fisher information is a number for each entry."""

    _kind = "likelihood"

    support_hint = ""
    integer_data = False
    depends_on_batch = False
    smallest_information: Callable[[Tensor], Tensor]
    _natural_directions = False  # whether a decoder starts with directions of natural parameters, and not of data
    _event_dim: int | None = None  # the number of dimensions of one datum's natural parameters; a model sets it

    def _shown(self, name: str) -> str:
        """The value of a parameter whose logarithm or logits are stored, for ``print``; a prior has none."""
        if name in self._pyro_samples:
            return "a prior"
        value = getattr(self, name).detach()
        value = value.sigmoid() if name.endswith("_logits") else value.exp()
        if value.dim() == 0:
            return f"{float(value):.4g}"
        return f"{float(value.min()):.4g} to {float(value.max()):.4g} of shape {tuple(value.shape)}"

    def _beside(self, name: str, eta: Tensor) -> Tensor:
        """A parameter shared by all data, a number or one for each entry of a datum, that broadcasts with ``eta``.

        Draws from a prior get dimensions for the entries of a datum they lack.
        """
        value: Tensor = getattr(self, name)
        if value.dim() == 0:
            return value
        if name not in self._pyro_samples:
            if eta.shape[max(0, eta.dim() - value.dim()) :] != value.shape:
                raise ValueError(
                    f"Expected {_argument(name)} of the shape of a datum, got {tuple(value.shape)} for eta "
                    f"{tuple(eta.shape)}"
                )
            return value
        value = self._drawn_beside(name, value, eta)
        try:
            torch.broadcast_shapes(value.shape, eta.shape)
        except RuntimeError:
            raise ValueError(
                f"Expected a prior on {name} with draws of the shape of a datum, or of one number, got draws of shape "
                f"{tuple(value.shape)} for eta {tuple(eta.shape)}"
            ) from None
        return value

    def _drawn_beside(self, name: str, value: Tensor, eta: Tensor) -> Tensor:
        """Draws of a parameter from its prior, with dimensions for the entries of a datum."""
        prior: Any = self._pyro_samples[name]
        prior = prior if hasattr(prior, "event_dim") else prior(self)
        own = getattr(prior, "event_dim", None)
        several = getattr(prior, "batch_shape", torch.Size())
        if several.numel() > 1:  # would be taken for draws side by side
            raise ValueError(
                f"Expected a prior on {name} of one draw for all data, got one of batch shape {tuple(several)}; make "
                f"these the entries of a datum by .to_event({len(several)})"
            )
        if own is None or own == value.dim():  # not known, or no draws side by side
            return value
        if self._event_dim is None:
            if own == 0 and value.dim() < eta.dim():
                raise ValueError(
                    f"Expected a prior on {name} with a dimension for the entries of a datum, as by "
                    f".expand([1]).to_event(1), got draws of shape {tuple(value.shape)} for eta {tuple(eta.shape)}"
                )
            return value
        split = value.dim() - own
        return value.reshape(*value.shape[:split], *(1,) * (self._event_dim - own), *value.shape[split:])

    @public_method
    def mean(self, eta: Tensor) -> Tensor:
        """The mean of a datum, of the shape of ``eta``."""
        return self(eta).mean  # type: ignore[no-any-return]

    def information_product(self, eta: Tensor, tangent: Tensor) -> Tensor:
        r"""The product :math:`I(\eta) v` for a ``tangent`` v whose shape ends in the shape of ``eta``."""
        eta = as_eta(eta)
        return self.smallest_information(eta) * as_tangent(tangent, eta)

    def _interior_mean(self, average: Tensor, num_data: int) -> Tensor:
        """The average of ``num_data`` data, moved strictly inside of the range of means by one datum of value 1/2."""
        return (num_data * average + 0.5) / (num_data + 1)


class ExponentialFamily(IndependentEntries):
    """Likelihoods of independent entries, each an exponential family whose natural parameter is linear in eta.

    The divergence and the Fisher information rest on that, so a likelihood that overrides ``forward`` with any other
    density has to override ``divergence``, ``information_product``, ``smallest_information`` and
    ``natural_parameters`` too.
    """

    @public_method
    def divergence(self, eta: Tensor, other: Tensor) -> Tensor:
        r"""The divergence of each entry, :math:`\mathrm{KL}(p(x_d \mid \eta_d) \| p(x_d \mid \eta'_d))`, in nats.

        Computed in double precision, of the shape of ``eta``.
        """
        eta, other = as_pair(eta, other)
        p, q = self(eta.double()), self(other.double())
        # log p(x) - log q(x) is linear in x, so its expectation is its value at the mean. The mean need not be in the
        # support, so validation is off. PyTorch's own formulas are infinite once a probability rounds to one.
        mean = p.mean
        p._validate_args = q._validate_args = False
        return p.log_prob(mean) - q.log_prob(mean)  # type: ignore[no-any-return]


def as_eta(value: Tensor, name: str = "eta") -> Tensor:
    """The natural parameters as a tensor of floating point numbers."""
    eta = _checks.tensor(name, value)
    if eta.is_complex():
        raise ValueError(f"Expected {name} to hold real numbers, got {eta.dtype}")
    return eta if eta.is_floating_point() else eta.to(torch.get_default_dtype())


def as_pair(eta: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Natural parameters of two distributions, whose shapes broadcast."""
    eta, other = as_eta(eta), as_eta(other, "other")
    try:
        torch.broadcast_shapes(eta.shape, other.shape)
    except RuntimeError:
        raise ValueError(f"Expected other of shape {tuple(eta.shape)}, as eta, got {tuple(other.shape)}") from None
    return eta, other


def as_mean(value: Tensor, low: float, high: float) -> Tensor:
    """Means strictly between ``low`` and ``high``, as a tensor of floating point numbers."""
    mean = as_eta(value, "mean")
    inside = (mean > low) & (mean < high)
    if not inside.all():
        raise ValueError(
            f"Expected mean strictly between {low:g} and {high:g}, where natural parameters are finite, got "
            f"{mean[~inside].flatten()[0].item():g}"
        )
    return mean


def as_tangent(value: Tensor, eta: Tensor) -> Tensor:
    tangent = as_eta(value, "tangent")
    if tangent.dim() < eta.dim() or tangent.shape[tangent.dim() - eta.dim() :] != eta.shape:
        raise ValueError(f"Expected tangent of shape (..., *{tuple(eta.shape)}), got {tuple(tangent.shape)}")
    return tangent


def log_of(name: str, value: float | Tensor) -> Tensor:
    """The logarithm of a positive number, or of the numbers of an array, of the default dtype."""
    if _is_number(value):
        return _in_range(name, torch.tensor(math.log(_checks.positive(name, value))), value)  # type: ignore[arg-type]
    values = _checks.real(name, value).detach()
    if values.numel() == 0 or not ((values > 0) & values.isfinite()).all():
        raise ValueError(f"Expected {name} to hold finite numbers > 0, got {values}")
    return _in_range(name, values.double().log().to(torch.get_default_dtype()), value)


def logits_of(name: str, value: float | Tensor) -> Tensor:
    """The logits of a probability, or of the probabilities of an array, of the default dtype."""
    if _is_number(value):
        number = _checks.fraction(name, value, ends=False)  # type: ignore[arg-type]
        return torch.tensor(math.log(number) - math.log1p(-number))
    values = _checks.real(name, value).detach()
    if values.numel() == 0 or not ((values > 0) & (values < 1)).all():
        raise ValueError(f"Expected {name} to hold numbers in (0, 1), got {values}")
    return values.double().logit().to(torch.get_default_dtype())


def _is_number(value: object) -> bool:
    return getattr(value, "ndim", 0) == 0 and not isinstance(value, list | tuple)


def _in_range(name: str, logarithm: Tensor, value: object) -> Tensor:
    """The logarithm of a number, whose exponential must neither be 0 nor infinite in its dtype."""
    if not (logarithm.exp().log() - logarithm).isfinite().all():
        raise ValueError(f"Expected {name} within the range of {logarithm.dtype}, got {value}")
    return logarithm


def _argument(name: str) -> str:
    """What the argument is called from which a parameter was made."""
    return name.removeprefix("log_").removesuffix("_logits")
