"""Networks for amortized guides: from a datum to the location and the positive scale of its latent variable."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_ilvae import _checks
from pyro_ilvae.networks import Module, mlp

__all__ = ["ConvEncoder", "MLPEncoder"]

# Softplus reaches exactly zero in float32, and a scale of zero has no log density.
_SMALLEST_SCALE = 1e-6


class MLPEncoder(Module):
    r"""A multilayer perceptron giving the location and scale of :math:`q(z \mid x) = N(\mu(x), \operatorname{diag}
    \sigma(x)^2)`.

    .. math:: (m, r) = \operatorname{MLP}(x), \qquad \mu = m, \qquad \sigma = \operatorname{softplus}(r + c) > 0,

    with :math:`c = \log(e - 1)`, so that the guide starts near the scale of a standard normal prior.

    Args:
        event_shape: the shape of one datum.
        latent_dim: the dimension :math:`K` of the latent variable.
        hidden_features: the widths of the hidden layers.
        input_transform: an elementwise function that is applied to the data first; ``torch.log1p`` suits counts.
        num_components: the number :math:`C` of components of a :class:`~pyro_ilvae.MixtureVAE`, if each component is to
            have its own posterior. ``forward`` then returns logits of :math:`q(y \mid x)`, of shape (..., C), and
            locations and scales of :math:`q(z \mid x, y)`, of shape (..., C, K).
        context_dim: the width of a context c, such as covariates, that the network reads beside x; None for x alone.
        takes_mask: whether entries of x may be missing. The network then reads x with 0 in place of missing entries,
            after ``input_transform``, and a mask of the same shape beside it.

    Raises:
        ValueError: for widths below 1. ``forward`` raises it for data, a context or a mask of another shape.

    Example:
        >>> loc, scale = MLPEncoder(event_shape=(8, 8), latent_dim=2)(torch.zeros(5, 8, 8))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([5, 2]), True)
    """

    _kind = "encoder"

    def __init__(
        self,
        *,
        event_shape: int | Sequence[int],
        latent_dim: int,
        hidden_features: Sequence[int] = (512, 512),
        input_transform: Callable[[Tensor], Tensor] | None = None,
        num_components: int | None = None,
        context_dim: int | None = None,
        takes_mask: bool = False,
    ) -> None:
        super().__init__()
        self.input_transform = None if input_transform is None else _checks.function("input_transform", input_transform)
        self.event_shape = _checks.event_shape(event_shape)
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.num_components = None if num_components is None else _checks.positive_int("num_components", num_components)
        self.context_dim = None if context_dim is None else _checks.positive_int("context_dim", context_dim)
        self.takes_mask = _checks.boolean("takes_mask", takes_mask)
        width = self.event_shape.numel() * (1 + self.takes_mask) + (self.context_dim or 0)
        self.network = mlp(width, _checks.widths("hidden_features", hidden_features), _num_outputs(self))

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return _sizes(self)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        r"""Location and scale, each of shape (..., K).

        With ``num_components``, logits of shape (..., C), and location and scale of shape (..., C, K).

        Args:
            x: data of shape (..., \*event_shape).
            context: of shape (..., context_dim); batch dimensions of ``x`` and context broadcast.
            mask: booleans of the shape of ``x``, False where an entry is missing; all are there if None.
        """
        x, mask, batch_shape = _inputs(x, mask, self)
        inputs = _joined(x, mask, (*batch_shape, self.event_shape.numel()), dim=-1)
        return _posterior(self.network(beside_context(inputs, context, self.context_dim)), self)


class ConvEncoder(Module):
    r"""A small convolutional network giving the location and scale of :math:`q(z \mid x)` for images.

    Each convolution (kernel 3, stride 2) halves height and width. A multilayer perceptron reads the last feature map
    and returns location and scale as in :class:`MLPEncoder`.

    Args:
        event_shape: the shape (H, W) or (C, H, W) of one image.
        latent_dim: the dimension :math:`K` of the latent variable.
        channels: the numbers of channels of the convolutions.
        hidden_features: the widths of the perceptron's hidden layers.
        input_transform: as for :class:`MLPEncoder`.
        num_components: as for :class:`MLPEncoder`.
        context_dim: as for :class:`MLPEncoder`; the perceptron reads the context beside the feature map.
        takes_mask: as for :class:`MLPEncoder`; the mask has channels of its own.

    Raises:
        ValueError: for an ``event_shape`` of another length and widths below 1. ``forward`` raises it for data, a
            context or a mask of another shape.

    Example:
        >>> loc, scale = ConvEncoder(event_shape=(28, 28), latent_dim=2)(torch.zeros(5, 28, 28))
        >>> loc.shape, bool((scale > 0).all())
        (torch.Size([5, 2]), True)
    """

    _kind = "encoder"

    def __init__(
        self,
        *,
        event_shape: Sequence[int],
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden_features: Sequence[int] = (256,),
        input_transform: Callable[[Tensor], Tensor] | None = None,
        num_components: int | None = None,
        context_dim: int | None = None,
        takes_mask: bool = False,
    ) -> None:
        super().__init__()
        self.input_transform = None if input_transform is None else _checks.function("input_transform", input_transform)
        self.event_shape = _checks.event_shape(event_shape)
        if len(self.event_shape) not in (2, 3):
            raise ValueError(f"Expected event_shape (H, W) or (C, H, W), got {tuple(self.event_shape)}")
        self.latent_dim = _checks.positive_int("latent_dim", latent_dim)
        self.num_components = None if num_components is None else _checks.positive_int("num_components", num_components)
        self.context_dim = None if context_dim is None else _checks.positive_int("context_dim", context_dim)
        self.takes_mask = _checks.boolean("takes_mask", takes_mask)
        self._image_shape = (1, *self.event_shape)[-3:]
        depths = [self._image_shape[0] * (1 + self.takes_mask), *_checks.widths("channels", channels)]
        layers: list[nn.Module] = []
        for shallow, deep in pairwise(depths):
            convolution = PyroModule[nn.Conv2d](shallow, deep, 3, stride=2, padding=1)  # type: ignore[call-arg]
            layers += [convolution, PyroModule[nn.Softplus]()]
        self.convolutions = PyroModule[nn.Sequential](*layers)  # type: ignore[arg-type]
        height, width = (math.ceil(size / 2 ** len(channels)) for size in self._image_shape[1:])
        features = depths[-1] * height * width + (self.context_dim or 0)
        self.network = mlp(features, _checks.widths("hidden_features", hidden_features), _num_outputs(self))

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return _sizes(self)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Location and scale, with arguments and value as for :meth:`MLPEncoder.forward`."""
        x, mask, batch_shape = _inputs(x, mask, self)
        images = _joined(x, mask, (batch_shape.numel(), *self._image_shape), dim=1)
        features = self.convolutions(images).flatten(1)
        features = features.reshape((*batch_shape, features.shape[-1]))
        return _posterior(self.network(beside_context(features, context, self.context_dim)), self)


def _joined(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], dim: int) -> Tensor:
    """Data, and a mask if there is one, side by side, each of a shape."""
    return x.reshape(shape) if mask is None else torch.cat([x.reshape(shape), mask.reshape(shape)], dim)


def _sizes(encoder: MLPEncoder | ConvEncoder) -> str:
    sizes = f"event_shape={tuple(encoder.event_shape)}, latent_dim={encoder.latent_dim}"
    for name in ("num_components", "context_dim", "takes_mask"):
        if getattr(encoder, name):
            sizes += f", {name}={getattr(encoder, name)}"
    return sizes


def _inputs(x: Any, mask: Any, encoder: MLPEncoder | ConvEncoder) -> tuple[Tensor, Tensor | None, torch.Size]:
    """What a network reads of data and of a mask, which is None for a network that takes none, and the batch shape."""
    x = _checks.tensor("x", x)
    split = x.dim() - len(encoder.event_shape)
    if split < 0 or x.shape[split:] != encoder.event_shape:
        expected = ", ".join(["...", *map(str, encoder.event_shape)])
        raise ValueError(f"Expected x of shape ({expected}), got {tuple(x.shape)}")
    if mask is not None:
        if not encoder.takes_mask:
            raise ValueError("Expected mask=None for an encoder without takes_mask=True, got a mask")
        mask = _checks.mask("mask", mask, x.shape)
        x = torch.where(mask, x, torch.zeros_like(x))  # before the transform, for which NaN may be no number
    inputs = _as_input(x, encoder, encoder.input_transform)
    if not encoder.takes_mask:
        return inputs, None, x.shape[:split]
    if mask is None:
        return inputs, torch.ones_like(inputs), x.shape[:split]
    given = mask.to(inputs)
    return inputs * given, given, x.shape[:split]


def beside_context(features: Tensor, context: Any, context_dim: int | None, kind: str = "an encoder") -> Tensor:
    """Features of shape (..., F) and a context of shape (..., C) side by side; the features without a context."""
    if context is not None:
        context = _checks.real("context", context)
    _checks.context(context, context_dim, kind)
    if context is None:
        return features
    try:
        batch_shape = torch.broadcast_shapes(features.shape[:-1], context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"Expected context with batch dimensions that broadcast with those of x, got {tuple(context.shape)} for "
            f"{tuple(features.shape[:-1])}"
        ) from None
    return torch.cat([part.to(features).expand(*batch_shape, -1) for part in (features, context)], -1)


def _as_input(x: Tensor, module: nn.Module, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    dtype = next(module.parameters()).dtype
    if x.dtype != dtype:
        # Counts and binary data may be integers, and a network's weights are floating point.
        x = _checks.tensor("x", x, dtype=dtype) if x.is_floating_point() or x.is_complex() else x.to(dtype)
    if transform is None:
        return x
    transformed = transform(x)
    if not isinstance(transformed, Tensor) or transformed.shape != x.shape:
        got = tuple(transformed.shape) if isinstance(transformed, Tensor) else f"a {type(transformed).__name__}"
        raise ValueError(f"Expected input_transform to return a tensor of shape {tuple(x.shape)}, got {got}")
    return transformed


def _num_outputs(encoder: MLPEncoder | ConvEncoder) -> int:
    numbers = 2 * encoder.latent_dim
    return numbers if encoder.num_components is None else encoder.num_components * (1 + numbers)


def _posterior(output: Tensor, encoder: MLPEncoder | ConvEncoder) -> tuple[Tensor, ...]:
    """Location and scale; with components, their logits come first."""
    logits: tuple[Tensor, ...] = ()
    if encoder.num_components is not None:
        logits = (output[..., : encoder.num_components],)
        output = output[..., encoder.num_components :].unflatten(-1, (encoder.num_components, -1))
    return *logits, *location_and_scale(output)


def location_and_scale(output: Tensor) -> tuple[Tensor, Tensor]:
    """Location and positive scale from the output of a network, of shape (..., 2 K); the scale starts near 1."""
    loc, raw = output.chunk(2, dim=-1)
    return loc, F.softplus(raw + math.log(math.e - 1)) + _SMALLEST_SCALE
