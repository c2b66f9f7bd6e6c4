"""Convex activations of input convex networks, each with its first two derivatives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Activation"]

LEAKY_SLOPE = 0.2


class Activation(NamedTuple):
    r"""A convex activation with its derivatives, all elementwise.

    ``monotone`` says that the activation is non-decreasing, which every layer but the first needs. ``smooth`` says
    that its derivative is differentiable everywhere, and so is the gradient of a network that uses it.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    second_derivative: Callable[[Tensor], Tensor]
    smooth: bool
    monotone: bool


def _softplus(x: Tensor) -> Tensor:
    # The default threshold of 20 is off by 2e-9, which float64 would see.
    return F.softplus(x, threshold=40.0)


def _softplus_second(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 - sigmoid)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _gaussian_softplus(x: Tensor) -> Tensor:
    return x * torch.special.ndtr(x) + _normal_density(x)


def _elu_derivative(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=0))


def _elu_second(x: Tensor) -> Tensor:
    return torch.where(x < 0, torch.exp(x.clamp(max=0)), torch.zeros_like(x))


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, LEAKY_SLOPE)


def _leaky_step(x: Tensor) -> Tensor:
    return LEAKY_SLOPE + (1 - LEAKY_SLOPE) * _step(x)


ACTIVATIONS: dict[str, Activation] = {
    "softplus": Activation(_softplus, torch.sigmoid, _softplus_second, smooth=True, monotone=True),
    "gaussian_softplus": Activation(
        _gaussian_softplus, torch.special.ndtr, _normal_density, smooth=True, monotone=True
    ),
    "elu": Activation(F.elu, _elu_derivative, _elu_second, smooth=False, monotone=True),
    "relu": Activation(torch.relu, _step, torch.zeros_like, smooth=False, monotone=True),
    "leaky_relu": Activation(_leaky_relu, _leaky_step, torch.zeros_like, smooth=False, monotone=True),
    "squared_leaky_relu": Activation(
        lambda x: _leaky_relu(x).square(),
        lambda x: 2 * _leaky_relu(x) * _leaky_step(x),
        lambda x: 2 * _leaky_step(x).square(),
        smooth=False,
        monotone=False,
    ),
}


r"""The activations by name.

===================== =================================== ==========================================================
name                  value                               used by
===================== =================================== ==========================================================
softplus              log(1 + e^x)                        Huang et al. 2021 (2012.05942); the default
gaussian_softplus     x Phi(x) + phi(x)                   Huang et al. 2021 (2012.05942)
elu                   x if x > 0 else e^x - 1             Hoedt & Klambauer 2023 (2312.12474) compare activations
relu                  max(x, 0)                           Amos, Xu & Kolter 2017 (1609.07152)
leaky_relu            max(x, 0.2 x)                       Wang, Blei & Cunningham 2021 (2301.00537)
squared_leaky_relu    max(x, 0.2 x)^2, first layer only   Wang, Blei & Cunningham 2021 (2301.00537)
===================== =================================== ==========================================================
"""
