"""Brenier and bi-Lipschitz maps as transforms of distributions."""

from typing import Any

import torch
from pyro.distributions import TransformModule, constraints
from torch import Tensor

from pyro_ilvae import _checks
from pyro_ilvae.decoders.bilipschitz import BiLipschitzMap
from pyro_ilvae.decoders.brenier import BrenierMap
from pyro_ilvae.decoders.inversion import constant_is_drawn, default_tolerance, weights_are_drawn

__all__ = ["BrenierTransform"]


class BrenierTransform(TransformModule):
    r"""A :class:`BrenierMap` or :class:`BiLipschitzMap` as a transform of distributions, with its change of variables.

    .. math:: \log |\det \nabla g(z)| = \log \det (c\, \nabla^2\psi(z) + L I) \ge D \log L,

    and, for a bi-Lipschitz map, at most :math:`D \log M`. The inverse is :meth:`BrenierMap.inverse`; draws need
    only the forward map. Register the transform like any Pyro transform, with ``pyro.module("transform", transform)``
    or as an attribute of a PyroModule.

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

    def __init__(self, brenier_map: BrenierMap | BiLipschitzMap) -> None:
        # PyTorch's cache would return points from before an optimizer's step, whose graph is gone.
        super().__init__(cache_size=0)
        kinds = (BrenierMap, BiLipschitzMap)
        self.brenier_map = _checks.instance("brenier_map", brenier_map, kinds, "a BrenierMap or a BiLipschitzMap")
        self._last_draw: tuple[Tensor, Tensor, list[Any], list[Tensor]] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.brenier_map!r})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last_draw": None}

    def _call(self, x: Tensor) -> Tensor:
        y: Tensor = self.brenier_map(x)
        tensors = [x, y, *self._weights()]
        # Weights drawn from priors change with each read, and tensors of inference mode have no version.
        drawn = weights_are_drawn(self.brenier_map) or constant_is_drawn(self.brenier_map)
        traced = not drawn and not any(tensor.is_inference() for tensor in tensors)
        self._last_draw = (x, y, self._state(tensors), tensors) if traced else None
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        if self._last_draw is not None and y is self._last_draw[1]:
            x, _, state, tensors = self._last_draw
            now = [x, y, *self._weights()]
            if (
                state == self._state(now)
                and all(a is b for a, b in zip(now, tensors, strict=True))
                and self._solves(x, y)
            ):
                return x
        return self.brenier_map.inverse(y)

    def _weights(self) -> list[Tensor]:
        nats = getattr(self.brenier_map, "_nats", None)
        return [*self.brenier_map.parameters(), *([] if nats is None else nats.parameters())]

    def _state(self, tensors: list[Tensor]) -> list[Any]:
        # The version of a tensor counts what is changed in place, as by optimizers and load_state_dict. A point drawn
        # without gradients is of no use where gradients are asked for.
        versions = [(tensor._version, tensor.dtype) for tensor in tensors]
        constants = (self.brenier_map.inverse_lipschitz, getattr(self.brenier_map, "lipschitz", None))
        return [constants, torch.is_grad_enabled(), *versions]

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
