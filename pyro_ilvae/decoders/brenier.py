"""Brenier maps: gradients of strongly convex potentials, which are inverse Lipschitz and invertible."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import torch
from pyro.distributions import TransformModule, constraints
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.decoders.arguments import dtype_of, points, without_autocast
from pyro_ilvae.decoders.frames import Frame
from pyro_ilvae.decoders.icnn import ICNN
from pyro_ilvae.decoders.inversion import default_tolerance, invert, weights_are_drawn
from pyro_ilvae.networks import Module, public_method

__all__ = ["BrenierMap", "BrenierTransform"]

LARGEST_CONSTANT = 1e18  # its square, with which divergences grow, is finite in single precision
INITIAL_SCALE = 0.3  # root mean square of what an ICNN adds to each coordinate of a linear map at the start


def constant(name: str, value: SupportsFloat) -> float:
    """Return ``value`` as an inverse Lipschitz constant, or raise."""
    number = _checks.non_negative(name, value)
    if number > LARGEST_CONSTANT:
        raise ValueError(f"Expected {name} <= {LARGEST_CONSTANT:g}, got {number:g}")
    return number


class BrenierMap(Module):
    r"""The gradient of a strongly convex potential, an L-inverse Lipschitz map of :math:`\mathbb{R}^D` to itself.

    .. math:: g(z) = \nabla\psi(z) + L z, \qquad (g(z) - g(z'))^\top (z - z') \ge L \|z - z'\|^2,

    with :math:`\psi` an :class:`~pyro_ilvae.ICNN`. It follows by the Cauchy-Schwarz inequality that
    :math:`\|g(z) - g(z')\| \ge L \|z - z'\|`.

    Args:
        features: the dimension :math:`D`.
        inverse_lipschitz: the constant :math:`L \ge 0`; 0 is the map of LIDVAE [2].
        hidden_features: the widths of the hidden layers of :math:`\psi`.
        activation: as for :class:`~pyro_ilvae.ICNN`.
        input_skips: as for :class:`~pyro_ilvae.ICNN`.

    Raises:
        ValueError: for a negative or non-finite constant, or widths below 1.

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

    def __init__(
        self,
        features: int,
        inverse_lipschitz: float = 1.0,
        hidden_features: Sequence[int] = (64, 64),
        activation: str | Sequence[str] = "softplus",
        input_skips: bool = True,
    ) -> None:
        super().__init__()
        self.features = _checks.positive_int("features", features)
        self.inverse_lipschitz = inverse_lipschitz
        self.icnn = ICNN(features, hidden_features, activation, input_skips)

    def extra_repr(self) -> str:
        """Dimension and constant, for ``print``."""
        return f"features={self.features}, inverse_lipschitz={self.inverse_lipschitz:g}"

    @property
    def inverse_lipschitz(self) -> float:
        """The constant L of this map; it is saved in ``state_dict()`` and may be set at any time."""
        return self._inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float) -> None:
        # A Python float stays exact when the module's dtype changes.
        self._inverse_lipschitz = constant("inverse_lipschitz", value)

    def get_extra_state(self) -> Tensor:
        # A tensor, because some formats of checkpoints hold only tensors.
        return torch.tensor(self._inverse_lipschitz, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.inverse_lipschitz = state  # type: ignore[assignment]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict:  # checked here, where the error can name the key
            constant(f"{key}, the inverse Lipschitz constant,", state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, z: Tensor, frame: Frame | None = None) -> Tensor:
        r"""The map at ``z`` of shape (..., D), of the same shape.

        With a ``frame`` B, ``z`` has shape (..., K) and the result is g(B z), computed without forming B z.
        """
        z = points("z", z, self.features if frame is None else frame.latent_dim, self._dtype)
        with without_autocast(z.device.type):
            if frame is None:
                return self.icnn.gradient(z) + self._inverse_lipschitz * z
            return frame.add(self.icnn.gradient_in_frame(z, frame), self._inverse_lipschitz * z)

    @public_method
    def potential(self, z: Tensor) -> Tensor:
        r"""The potential :math:`\psi(z) + \frac{L}{2}\|z\|^2`, of shape (...), whose gradient is the map."""
        z = points("z", z, self.features, self._dtype)
        with without_autocast(z.device.type):
            return self.icnn(z) + 0.5 * self._inverse_lipschitz * z.square().sum(-1)

    @public_method
    def jacobian(self, z: Tensor) -> Tensor:
        """The Jacobian at ``z`` of shape (..., D): (..., D, D), symmetric, with eigenvalues of at least L."""
        z = points("z", z, self.features, self._dtype)
        with without_autocast(z.device.type):
            eye = torch.eye(self.features, dtype=z.dtype, device=z.device)
            return self.icnn.hessian(z) + self._inverse_lipschitz * eye

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


class BrenierTransform(TransformModule):
    r"""A :class:`BrenierMap` as a transform of distributions, with its change of variables.

    .. math:: \log |\det \nabla g(z)| = \log \det (\nabla^2\psi(z) + L I) \ge D \log L.

    The inverse is :meth:`BrenierMap.inverse`; draws need only the forward map. Register the transform like any Pyro
    transform, with ``pyro.module("transform", transform)`` or as an attribute of a PyroModule.

    Args:
        brenier_map: the map; with L = 0 it may fail to be onto, and the inverse then raises.

    Example:
        >>> import pyro.distributions as dist
        >>> base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> flow = dist.TransformedDistribution(base, [BrenierTransform(BrenierMap(2, inverse_lipschitz=0.1))])
        >>> flow.log_prob(flow.sample((5,))).shape
        torch.Size([5])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, brenier_map: BrenierMap) -> None:
        # PyTorch's cache would return points from before an optimizer's step, whose graph is gone.
        super().__init__(cache_size=0)
        self.brenier_map = _checks.instance("brenier_map", brenier_map, BrenierMap, "a BrenierMap")
        self._last_draw: tuple[Tensor, Tensor, list[Any], list[Tensor]] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.brenier_map!r})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last_draw": None}

    def _call(self, x: Tensor) -> Tensor:
        y: Tensor = self.brenier_map(x)
        tensors = [x, y, *self.brenier_map.parameters()]
        # Weights drawn from priors change with each read, and tensors of inference mode have no version.
        traced = not weights_are_drawn(self.brenier_map) and not any(tensor.is_inference() for tensor in tensors)
        self._last_draw = (x, y, self._state(tensors), tensors) if traced else None
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        if self._last_draw is not None and y is self._last_draw[1]:
            x, _, state, tensors = self._last_draw
            now = [x, y, *self.brenier_map.parameters()]
            if (
                state == self._state(now)
                and all(a is b for a, b in zip(now, tensors, strict=True))
                and self._solves(x, y)
            ):
                return x
        return self.brenier_map.inverse(y)

    def _state(self, tensors: list[Tensor]) -> list[Any]:
        # The version of a tensor counts what is changed in place, as by optimizers and load_state_dict. A point drawn
        # without gradients is of no use where gradients are asked for.
        versions = [(tensor._version, tensor.dtype) for tensor in tensors]
        return [self.brenier_map.inverse_lipschitz, torch.is_grad_enabled(), *versions]

    @torch.no_grad()
    def _solves(self, x: Tensor, y: Tensor) -> bool:
        """Whether y is still the image of x: what is written through ``.data`` has no version."""
        residual = (self.brenier_map(x) - y).norm(dim=-1)
        try:
            return bool((residual <= default_tolerance(y.dtype) * (1 + y.norm(dim=-1))).all())
        except RuntimeError:  # vmap cannot look at values
            return False

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log determinant, of shape (...), at ``x`` of shape (..., D); ``y`` is not used."""
        return torch.linalg.slogdet(self.brenier_map.jacobian(x)).logabsdet
