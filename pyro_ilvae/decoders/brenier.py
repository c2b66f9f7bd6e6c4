"""Brenier maps: gradients of strongly convex potentials, which are inverse Lipschitz and invertible."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self, SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae._recording import is_recording
from pyro_ilvae.decoders.arguments import dtype_of, points, without_autocast
from pyro_ilvae.decoders.frames import Frame
from pyro_ilvae.decoders.icnn import ICNN
from pyro_ilvae.decoders.inversion import default_tolerance, invert
from pyro_ilvae.decoders.learned import LearnedConstant
from pyro_ilvae.decoders.nats import Nats, check_kappa
from pyro_ilvae.networks import Module, public_method

__all__ = ["BrenierMap"]

LARGEST_CONSTANT = 1e18  # its square, with which divergences grow, is finite in single precision
INITIAL_SCALE = 0.3  # root mean square of what an ICNN adds to each coordinate of a linear map at the start


def constant(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as an inverse Lipschitz constant, or raise."""
    number = _checks.non_negative(name, value)
    if number > LARGEST_CONSTANT:
        raise ValueError(f"Expected {name} <= {LARGEST_CONSTANT:g}, got {number:g}")
    return number


def shown(part: Any) -> str:
    """The constant of a map or decoder, and its nats if it was given so, for ``print``."""
    nats: Nats | None = part._nats
    value = "drawn" if nats is not None and nats.is_drawn else f"{part.inverse_lipschitz:g}"
    return f"inverse_lipschitz={value}" if nats is None else f"inverse_lipschitz={value}, nats={part.nats:g}"


def _smallest(value: float | Tensor) -> float:
    """A constant as a number: draws of a noise scale from a prior may stand side by side."""
    return float(value.detach().min()) if isinstance(value, Tensor) else value


def following(nats: Nats | None) -> Nats:
    """Return the nats that a constant follows, or raise for one that is a number."""
    if nats is None:
        raise ValueError(
            "Expected inverse_lipschitz in nats to set nats, got a number: set inverse_lipschitz to "
            "Nats(kappa, likelihood) first"
        )
    return nats


class BrenierMap(Module):
    r"""The gradient of a strongly convex potential, an L-inverse Lipschitz map of :math:`\mathbb{R}^D` to itself.

    .. math:: g(z) = c\, \nabla\psi(z) + L z, \qquad (g(z) - g(z'))^\top (z - z') \ge L \|z - z'\|^2,

    with :math:`\psi` an :class:`~pyro_ilvae.ICNN`, :math:`c > 0`. It follows by the Cauchy-Schwarz inequality that
    :math:`\|g(z) - g(z')\| \ge L \|z - z'\|`.

    Args:
        features: the dimension :math:`D`.
        inverse_lipschitz: the constant :math:`L \ge 0`, a number, :class:`~pyro_ilvae.Nats` or a
            :class:`~pyro_ilvae.LearnedConstant`; 0 is the map of LIDVAE [2].
        hidden_features: the widths of the hidden layers of :math:`\psi`.
        activation: as for :class:`~pyro_ilvae.ICNN`.
        input_skips: as for :class:`~pyro_ilvae.ICNN`.
        gain: the factor :math:`c`. An optimizer such as Adam moves each weight by about a learning rate a step, and the
            map by c times as much.

    Raises:
        ValueError: for a negative or non-finite constant, widths below 1, and a gain that is not positive.

    References:
        | [1] Kinoshita et al. 2023, Controlling posterior collapse by an inverse Lipschitz constraint on the decoder
          network, https://arxiv.org/abs/2304.12770
        | [2] Wang, Blei & Cunningham 2021, Posterior collapse and latent variable non-identifiability,
          https://arxiv.org/abs/2301.00537

    Example:
        >>> brenier = BrenierMap(features=2, inverse_lipschitz=0.5)
        >>> near, far = torch.randn(100, 2), torch.randn(100, 2)
        >>> ratio = (brenier(near) - brenier(far)).norm(dim=-1) / (near - far).norm(dim=-1)
        >>> bool((ratio >= 0.5 - 1e-4).all())
        True
    """

    # What a graph reads from ``_factor`` instead.
    _tensors_when_recorded = frozenset({"_inverse_lipschitz", "_nats", "_other"})
    _factor: Tensor

    def __init__(
        self,
        features: int,
        inverse_lipschitz: float | Nats | LearnedConstant = 1.0,
        hidden_features: Sequence[int] = (64, 64),
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
        *,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.features = _checks.positive_int("features", features)
        self.gain = _checks.positive("gain", gain)
        self.register_buffer("_factor", torch.tensor(0.0), persistent=False)
        self.inverse_lipschitz = inverse_lipschitz
        self.icnn = ICNN(features, hidden_features, activation, input_skips)

    def extra_repr(self) -> str:
        """Dimension and constant, for ``print``."""
        return f"features={self.features}, {shown(self)}"

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of this map; it is saved in ``state_dict()`` and may be set to a number or ``Nats``."""
        # What is drawn above the floor differs from draw to draw, and the floor holds for all of them.
        return _smallest(self._floor if "excess_raw" in self._pyro_samples else self._constant)

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | Nats | LearnedConstant) -> None:
        self._set_constant(value)

    @property
    def minimum_inverse_lipschitz(self) -> float | None:
        """The floor of a learned constant, which holds at every step; None for a constant that is not learned."""
        return _smallest(self._floor) if self._is_learned else None

    @property
    def nats(self) -> float | None:
        """The nats kappa per dimension by which L was given; it may be set to another number. None for a number L."""
        return None if self._nats is None else self._nats.kappa

    @nats.setter
    def nats(self, value: float) -> None:
        self._set_floor(following(self._nats).with_kappa(value), self._other)

    def _set_constant(self, value: float | Nats | LearnedConstant, other: float = 1.0) -> None:
        """Set L, or the nats of a composition of this map with another one of the constant ``other``."""
        if isinstance(value, LearnedConstant):
            floor = value.minimum
            if not isinstance(floor, Nats):  # before anything changes
                constant("inverse_lipschitz, the sum of minimum and excess,", floor + constant("excess", value.excess))
            self._set_floor(floor, other)
            if "excess_raw" not in self._parameters:
                self.excess_raw = nn.Parameter(self._factor.new_zeros(()))
            with torch.no_grad():  # the parameter that an optimizer may have
                self.excess_raw.fill_(value.raw)
            return
        self._set_floor(value, other)
        if self._is_learned:
            del self.excess_raw

    def _as_learned(self, floor: float | Nats) -> float | Nats | LearnedConstant:
        """Another constant, as the floor of a learned one where this one is learned."""
        if not self._is_learned:
            return floor
        if "excess_raw" in self._pyro_samples:
            raise ValueError("Expected inverse_lipschitz without a prior on its excess_raw, got one that is drawn")
        # In double precision, in which a small excess is not 0.
        excess = float(F.softplus(self.excess_raw.detach().double()))
        return LearnedConstant(floor, excess=max(excess, sys.float_info.min))

    def _set_floor(self, value: float | Nats, other: float) -> None:
        """Set the constant, or the floor of a learned one, which goes on to be learned."""
        self._other = other
        if isinstance(value, Nats):
            value = value.at(torch.zeros(self.features))
            if not value.is_drawn:
                now = torch.as_tensor(value.constant()).detach().max()
                constant("inverse_lipschitz", float(now) / other)
            self._nats: Nats | None = value
        else:
            # A Python float stays exact when the module's dtype changes.
            self._inverse_lipschitz, self._nats = constant("inverse_lipschitz", value), None
        self._fill_factor()

    def _fill_factor(self) -> None:
        """Put L, or its ratio to the noise scale that it follows, into a tensor for recorded graphs."""
        if self._nats is None:
            factor: float | Tensor = self._inverse_lipschitz
        else:
            factor = self._nats.ratio / self._other * (self._nats.scale() if self._nats.is_reference else 1.0)
        with torch.no_grad():
            self._factor.fill_(factor)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._factor.dtype in (torch.float16, torch.bfloat16):
            self._factor = self._factor.float()
        if not self._factor.is_meta:
            self._fill_factor()  # the old dtype may have been a shorter one
        return self

    @property
    def _is_learned(self) -> bool:
        """Whether there is a parameter above the floor, which may also be drawn from a prior, or constrained."""
        return any("excess_raw" in table for table in (self._parameters, self._pyro_samples, self._pyro_params))

    @property
    def _excess(self) -> Tensor:
        """What a learned constant has above its floor, in double precision, in which the sum is not below the floor."""
        unit = 1.0 if self._nats is None else self._nats.scale()
        logit = self.excess_raw
        # Draws stand to the left of points.
        excess: Tensor = F.softplus((logit.unsqueeze(-1) if logit.dim() else logit).double()) * unit / self._other
        return excess

    @property
    def _constant(self) -> float | Tensor:
        if not self._is_learned:
            return self._floor
        with nullcontext() if self._nats is None else self._nats.one_draw():
            return self._floor + self._excess

    @property
    def _floor(self) -> float | Tensor:
        if is_recording():
            return self._factor if self._nats is None or self._nats.is_reference else self._factor * self._nats.scale()
        return self._inverse_lipschitz if self._nats is None else self._nats.constant() / self._other

    def _times_constant(self, z: Tensor) -> Tensor:
        value = self._constant
        if not isinstance(value, Tensor):
            return value * z
        wide = torch.promote_types(z.dtype, torch.float32)  # half precision would change the constant
        return (value.to(wide) * z.to(wide)).to(z.dtype)

    def get_extra_state(self) -> Tensor:
        # A tensor, because some formats of checkpoints hold only tensors.
        if self._nats is None:
            return torch.tensor(self._inverse_lipschitz, dtype=torch.float64)
        unit = math.nan if self._nats.unit is None else self._nats.unit
        value = math.nan if self._nats.is_drawn else _smallest(self._floor)
        return torch.tensor([value, self._nats.kappa, unit, self._other], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if state.dim() == 0:
            self._set_floor(state, self._other)  # type: ignore[arg-type]
            return
        _, kappa, unit, other = state.tolist()
        nats = following(self._nats)
        self._set_floor(Nats(kappa, nats.likelihood, unit=None if math.isnan(unit) else unit), other)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict:  # checked here, where the error can name the key
            self._check_state(f"{key}, the inverse Lipschitz constant,", torch.as_tensor(state_dict[key]))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _check_state(self, name: str, state: Tensor) -> None:
        if state.dim() == 0:
            constant(name, state)  # type: ignore[arg-type]
            return
        if state.shape != (4,):
            raise ValueError(f"Expected {name} to be a number or four numbers, got shape {tuple(state.shape)}")
        value, kappa, unit, other = state.tolist()
        constant(name, 0.0 if math.isnan(value) else value)
        check_kappa(f"the nats in {name}", kappa)
        _checks.positive(f"the factor in {name}", other)
        if self._nats is None or self._nats.is_reference == math.isnan(unit):
            likelihood = "one with Normal noise" if math.isnan(unit) else "one without Normal noise"
            raise ValueError(
                f"Expected {name} to be a number, got {kappa:g} nats per dimension: build the decoder with "
                f"inverse_lipschitz=Nats({kappa:g}, likelihood), the likelihood {likelihood}"
            )

    def forward(self, z: Tensor, frame: Frame | None = None) -> Tensor:
        r"""The map at ``z`` of shape (..., D), of the same shape.

        With a ``frame`` B, ``z`` has shape (..., K) and the result is g(B z), computed without forming B z.
        """
        z = points("z", z, self.features if frame is None else frame.latent_dim, self._dtype)
        with without_autocast(z.device.type):
            if frame is None:
                return self._amplified(self.icnn.gradient(z)) + self._times_constant(z)
            return frame.add(self._amplified(self.icnn.gradient_in_frame(z, frame)), self._times_constant(z))

    def _amplified(self, value: Tensor) -> Tensor:
        return value if self.gain == 1 else self.gain * value

    @public_method
    def potential(self, z: Tensor) -> Tensor:
        r"""The potential :math:`c\, \psi(z) + \frac{L}{2}\|z\|^2`, of shape (...), whose gradient is the map."""
        z = points("z", z, self.features, self._dtype)
        with without_autocast(z.device.type):
            return self._amplified(self.icnn(z)) + 0.5 * (self._times_constant(z) * z).sum(-1)

    @public_method
    def jacobian(self, z: Tensor) -> Tensor:
        """The Jacobian at ``z`` of shape (..., D): (..., D, D), symmetric, with eigenvalues of at least L."""
        z = points("z", z, self.features, self._dtype)
        with without_autocast(z.device.type):
            eye = torch.eye(self.features, dtype=z.dtype, device=z.device)
            value = self._constant
            if isinstance(value, Tensor):
                value = value.to(z.dtype) if value.dim() == 0 else value.to(z.dtype).unsqueeze(-1)
            return self._amplified(self.icnn.hessian(z)) + value * eye

    @public_method
    def inverse(self, y: Tensor, *, tolerance: float | None = None, max_iterations: int = 100) -> Tensor:
        r"""The point :math:`z` with :math:`g(z) = y`, found by Newton's method with backtracking on the residual.

        .. math:: z_{t+1} = z_t - \lambda_t \, \nabla g(z_t)^{-1} (g(z_t) - y), \qquad
            \|z_t - g^{-1}(y)\| \le \|g(z_t) - y\| / L.

        The bound on the right is the inverse Lipschitz inequality: a small residual certifies the point. Each point
        of the batch has its own step length and its own last step. It is found and certified in double precision. The
        result can be differentiated twice with respect to ``y`` and the parameters, by the implicit
        function theorem, also in forward mode and by ``torch.func``.

        Args:
            y: values of shape (..., D).
            tolerance: the largest norm of the residual, relative to 1 + \|y\|; if None, 1e-9 in float64, 1e-5 in
                float32, and 8 units of rounding in half precision: 0.008 in float16 and 0.06 in bfloat16.
            max_iterations: the number of Newton steps allowed.

        Returns:
            The points, of shape (..., D).

        Raises:
            ValueError: if ``y`` is not finite or has the wrong width, and for a tolerance that is not positive.
            RuntimeError: if some residual stays above the tolerance, as with weights that are NaN; with L = 0 the map
                need not reach every point, nor be one to one, which a singular Jacobian shows.

        Example:
            >>> brenier = BrenierMap(features=3, inverse_lipschitz=1.0).double()
            >>> z = torch.randn(10, 3, dtype=torch.double)
            >>> bool((brenier.inverse(brenier(z)) - z).norm(dim=-1).max() < 1e-6)
            True
        """
        y = points("y", y, self.features, self._dtype)
        tolerance = default_tolerance(y.dtype) if tolerance is None else _checks.positive("tolerance", tolerance)
        return invert(self, y, tolerance, _checks.positive_int("max_iterations", max_iterations))

    @property
    def _dtype(self) -> torch.dtype | None:
        return dtype_of(self, "icnn")
