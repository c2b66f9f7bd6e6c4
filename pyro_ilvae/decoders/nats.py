"""Inverse Lipschitz constants in nats per dimension, relative to the noise of a likelihood."""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ilvae import _checks

__all__ = ["Nats"]

_NUM_PROBES = 64
LARGEST_NATS = 40.0  # L is then 2e17 noise units, and its square still finite in single precision


class Nats:
    r"""An inverse Lipschitz constant given in nats per dimension, relative to the noise of a likelihood.

    .. math:: L = \sigma \sqrt{e^{2 \kappa} - 1}, \qquad I(x; z) \ge \tfrac{K}{2} \log(1 + L^2 / \sigma^2) = K \kappa,

    for Normal noise of scale :math:`\sigma` and the prior N(0, I); see
    :func:`~pyro_ilvae.diagnostics.guaranteed_information`. Pass it to a decoder as ``inverse_lipschitz``. L then
    follows :math:`\sigma` at every step, with its gradient, so that the same nats are guaranteed while :math:`\sigma`
    is learned. For a scale :math:`\sigma_d` for each entry of a datum, the decoder is :math:`b + S \tilde f(z)` with
    :math:`S = \operatorname{diag}(\sigma_d)`: the constant of :math:`\tilde f` is :math:`\sqrt{e^{2 \kappa} - 1}`, and
    the constant of the decoder that times the smallest :math:`\sigma_d`. L follows the running
    average of an optimal scale, and each draw of a scale with a prior. The model must have this very likelihood.

    For a likelihood without Normal noise no such bound is known, and :math:`\kappa` is a *reference*: a noise unit
    takes the place of :math:`\sigma`,

    .. math:: u = \big( \operatorname{tr} I(b) / \operatorname{tr} I(b)^2 \big)^{1/2},

    with :math:`I` the Fisher information and :math:`b` the natural parameters of the mean of the data: :math:`u^{-2}`
    is a mean of the information of the entries in which entries with more information count more. The decoder's
    ``initialize`` computes it from data; before that :math:`b` is the decoder's bias, 0 at the start.

    Args:
        kappa: the nats :math:`\kappa` per dimension, from 0 to 40.
        likelihood: the likelihood of the model, with the attribute ``noise_scale``, as
            :class:`~pyro_ilvae.likelihoods.Normal` has it, or the method ``information_product``.
        unit: the noise unit :math:`u` of a likelihood without Normal noise; computed by the decoder if None.

    Raises:
        ValueError: for :math:`\kappa` outside of its limits, a unit that is not positive, and a unit for Normal noise.
        TypeError: for a likelihood with neither of the two.

    Example:
        >>> from pyro_ilvae import ProjectedDecoder, likelihoods, mlp
        >>> likelihood = likelihoods.Normal(0.1, estimate="learned")
        >>> decoder = ProjectedDecoder(
        ...     mlp(2, (128,), 64), latent_dim=2, event_shape=64, inverse_lipschitz=Nats(0.5, likelihood)
        ... )
        >>> decoder.nats, round(decoder.inverse_lipschitz, 3)
        (0.5, 0.131)
    """

    def __init__(self, kappa: float, likelihood: Any, *, unit: float | None = None) -> None:
        self.kappa = check_kappa("kappa", kappa)
        if isinstance(likelihood, type):
            raise TypeError(f"Expected likelihood to be an object, got the class {likelihood.__name__}")
        self.is_reference = getattr(likelihood, "noise_scale", None) is None
        if self.is_reference and not callable(getattr(likelihood, "information_product", None)):
            raise TypeError(
                "Expected likelihood with the attribute noise_scale or the method information_product, got "
                f"{likelihood!r}"
            )
        if unit is not None and not self.is_reference:
            raise ValueError(f"Expected unit=None for a likelihood with a noise_scale, got {unit!r}")
        self.likelihood = likelihood
        self.unit = None if unit is None else _checks.positive("unit", unit)

    def __repr__(self) -> str:
        unit = "" if self.unit is None else f", unit={self.unit:.4g}"
        return f"Nats({self.kappa:g}, {type(self.likelihood).__name__}{unit})"

    @property
    def ratio(self) -> float:
        r"""The constant in noise units, :math:`\sqrt{e^{2 \kappa} - 1}`."""
        return math.exp(self.kappa) * math.sqrt(-math.expm1(-2 * self.kappa))

    def with_kappa(self, kappa: float) -> "Nats":
        """The same with other nats per dimension."""
        other = copy.copy(self)
        other.kappa = check_kappa("nats", kappa)
        return other

    def with_unit(self, unit: float) -> "Nats":
        """The same with another noise unit, if it has need of one."""
        if not self.is_reference:
            return self
        return Nats(self.kappa, self.likelihood, unit=unit)

    def at(self, bias: Tensor) -> "Nats":
        """The same with the noise unit at b = ``bias``, if it needs one and has none."""
        if not self.is_reference or self.unit is not None:
            return self
        try:
            return self.with_unit(noise_unit(self.likelihood, bias))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"Expected inverse_lipschitz with a likelihood of natural parameters of shape {tuple(bias.shape)}, "
                f"got a {type(self.likelihood).__name__}: {error}"
            ) from error

    @property
    def is_drawn(self) -> bool:
        """Whether the scale is drawn from a prior, by each reading of it."""
        return not self.is_reference and bool(getattr(self.likelihood, "_pyro_samples", None))

    def one_draw(self) -> AbstractContextManager[Any]:
        """A context in which all readings see the same draw of a scale with a prior."""
        return self.likelihood._pyro_context if self.is_drawn else nullcontext()  # type: ignore[no-any-return]

    def parameters(self) -> list[Tensor]:
        """The tensors of the likelihood that the constant follows."""
        if self.is_reference or not isinstance(self.likelihood, nn.Module):
            return []
        return [*self.likelihood.parameters(), *self.likelihood.buffers()]

    def constant(self) -> float | Tensor:
        r"""The constant :math:`L`, relative to the geometric mean of the scales if there are several.

        A tensor that broadcasts with points of shape (..., K), if it depends on one.
        """
        return self.ratio * self.scale()

    def scale(self) -> float | Tensor:
        """The scale that the constant is relative to: the noise scale, a geometric mean of several, or a unit."""
        return self._scale()[0]

    def weights(self) -> Tensor | None:
        """The scales of the entries over their geometric mean, of shape (..., D); None for a single scale."""
        return self._scale()[1]

    def smallest_weight(self) -> float:
        """The smallest of the weights, 1 for a single scale."""
        weights = self.weights()
        return 1.0 if weights is None else float(weights.detach().min())

    def _scale(self) -> tuple[float | Tensor, Tensor | None]:
        if self.is_reference:
            return 1.0 if self.unit is None else self.unit, None
        scale = self.likelihood.noise_scale
        if not isinstance(scale, Tensor):
            return _checks.positive("likelihood.noise_scale", scale), None
        if scale.numel() == 1:  # without the dimensions of a datum, which are not those of points
            return scale.reshape(()), None
        event_dim = self._event_dim()
        if event_dim == 0:  # a draw of one scale for each left dimension
            return scale.unsqueeze(-1), None
        if scale.shape[-event_dim:].numel() == 1:
            return scale.flatten(-event_dim), None
        flat = scale.flatten(-event_dim)
        mean = flat.log().mean(-1, keepdim=True).exp()
        return mean if mean.dim() > 1 else mean.squeeze(-1), flat / mean

    def _event_dim(self) -> int:
        """The number of dimensions of the scale that belong to a datum, and not to draws from a prior."""
        prior = getattr(self.likelihood, "_pyro_samples", {}).get("log_scale")
        if prior is None:
            return int(self.likelihood.noise_scale.dim())
        prior = prior if hasattr(prior, "event_dim") else prior(self.likelihood)
        return int(prior.event_dim)


def check_kappa(name: str, value: Any) -> float:
    """Return ``value`` as nats per dimension, or raise."""
    number = _checks.non_negative(name, value)
    if number > LARGEST_NATS:
        raise ValueError(f"Expected {name} <= {LARGEST_NATS:g} nats per dimension, got {number:g}")
    return number


@torch.no_grad()
def noise_unit(likelihood: Any, bias: Tensor) -> float:
    r"""The noise unit :math:`(\operatorname{tr} I / \operatorname{tr} I^2)^{1/2}` of a likelihood at ``bias``."""
    probes, products = _probed(likelihood, bias)
    trace, trace_of_square = float((probes * products).sum()), float(products.square().sum())
    if not 0 < trace < math.inf or not 0 < trace_of_square < math.inf:
        raise ValueError(f"Expected likelihood with information about its natural parameters, got a trace of {trace:g}")
    return math.sqrt(trace / trace_of_square)


@torch.no_grad()
def information_diagonal(likelihood: Any, bias: Tensor) -> Tensor:
    """The Fisher information of each natural parameter at ``bias``, of its shape, in double precision."""
    probes, products = _probed(likelihood, bias)
    return (probes * products).mean(0)


def _probed(likelihood: Any, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of signs, and the information times each of them, in double precision.

    Hutchinson's estimates of traces and diagonals from them are exact where the entries of a datum are independent.
    """
    probes = torch.randint(0, 2, (_NUM_PROBES, *bias.shape), generator=torch.Generator().manual_seed(0))
    probes = (2.0 * probes - 1).to(bias)
    return probes.double(), likelihood.information_product(bias, probes).double()
